"""Files and folders that appear whole or not at all: written beside, flushed to disk, renamed."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from fedtune.errors import FedTuneError

logger = logging.getLogger(__name__)

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG})
"""Numbers of errors that say that a disk is full, read-only or failing."""

_OS_ERROR = re.compile(r"\bos error (\d+)|\[?errno (\d+)", re.IGNORECASE)
"""How Rust and C++ libraries (safetensors, Arrow) write the operating system's error number into a text."""


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by a file holding `data`; a crash leaves the old file or the new one, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        _raise_about(path, error)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a UTF-8 file holding `text`, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by a file holding `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Replace `folder` by one that `fill` has filled; a folder of that name is complete whenever it is there.

    Raises:
        OSError: the disk is full, or another trouble with it, whatever exception a library has made of that.
    """
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        fill(beside)
        for path in sorted(beside.rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        sync_folder(beside)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        _raise_about(folder, error)
    if folder.exists():
        # A folder cannot be renamed over a full one. Whoever replaces a folder can write it again after a crash.
        shutil.rmtree(folder)
    beside.rename(folder)
    sync_folder(folder.parent)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Let one process at a time into the block, of all that name the folder; for files that are read, changed and written."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed writer left beside its targets in `folder`."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename outlives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _raise_about(path: Path, error: BaseException) -> NoReturn:
    """Raise the error of writing `path`: an OSError that names it, where trouble with the disk is behind `error`."""
    found = os_error_in(error)
    if found is None or found.errno is None:
        raise error
    raise OSError(found.errno, os.strerror(found.errno), str(path)) from error


def os_error_in(error: BaseException) -> OSError | None:
    """Return the trouble of the operating system that is behind an error, None where there is none.

    Libraries that are not written in Python raise exceptions of their own about a full disk; their texts hold the number.
    """
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen and not isinstance(current, FedTuneError | KeyboardInterrupt):
        seen.append(current)
        if isinstance(current, OSError) and current.errno is not None:
            return current
        if match := _OS_ERROR.search(str(current)):
            number = int(match[1] or match[2])
            if number in errno.errorcode:
                return OSError(number, os.strerror(number))
        current = current.__cause__
    return None


def read_json_lines(path: Path) -> list[Mapping[str, Any]]:
    """Read a file of one JSON object a line; a torn last line (the writer was killed in it) is left out.

    Raises:
        ValueError: a line other than the last is no JSON object; the text names the line.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records: list[Mapping[str, Any]] = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is empty or torn
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"line {number} of {path} is not a JSON object")
        records.append(record)
    return records


def drop_torn_line(path: Path) -> None:
    """Cut off what follows the last newline of a file, with a warning: its writer was killed, or the disk was full.

    Otherwise the next line would be appended to it, and both would be lost.
    """
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        if not end:
            return
        file.seek(end - 1)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        whole = file.read(end)
        file.truncate(whole.rfind(b"\n") + 1)
    logger.warning(
        "The last line of %s (line %d) is incomplete, because its writer was stopped in it; the line is dropped.",
        path,
        whole.count(b"\n") + 1,
    )
