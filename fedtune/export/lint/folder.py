"""Lists and reads the files of a submission, which may come from anyone and hold anything."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fedtune.errors import MissingError, UsageError
from fedtune.runs.directory import file_sha256

_SKIPPED = ("__pycache__", "node_modules", "runs")
_MOST_FILES = 20_000
_LONGEST_TEXT_BYTES = 50_000_000


@dataclass(frozen=True)
class Finding:
    """One fault of a submission."""

    file: str
    """The file's name inside the folder."""
    text: str
    """What is wrong with the file, as the rest of a sentence about it, and what was expected."""


@dataclass(frozen=True)
class SubmissionFolder:
    """The files of a folder; links are listed and not followed."""

    path: Path
    files: tuple[str, ...]
    """Paths of the regular files inside the folder, sorted by depth; hidden folders are skipped."""
    links: tuple[str, ...]

    def named(self, pattern: str) -> list[str]:
        """Return the files whose name matches `pattern`, in any subfolder."""
        return [name for name in self.files if fnmatchcase(name.rpartition("/")[2], pattern)]

    def first(self, pattern: str) -> str | None:
        """Return the file nearest to the top whose name matches `pattern`, or None."""
        return next(iter(self.named(pattern)), None)

    def text(self, name: str) -> str | None:
        """Return the text of a file; None if it is not UTF-8, cannot be read, or is too long."""
        try:
            if (self.path / name).stat().st_size > _LONGEST_TEXT_BYTES:
                return None
            return (self.path / name).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            return None

    def sha256(self, name: str) -> str | None:
        """Return the sha256 of a file; None if it cannot be read."""
        try:
            return file_sha256(self.path / name)
        except OSError:
            return None


def open_folder(path: Path) -> SubmissionFolder:
    """List the files of a folder.

    Raises:
        MissingError: the folder does not exist.
        UsageError: it holds far more files than a submission.
    """
    if not path.is_dir():
        raise MissingError(
            f"There is no folder {path}.", hint="Name the folder of a submission: fedtune export --check PATH"
        )
    files: list[str] = []
    links: list[str] = []
    for folder, names, here in os.walk(path):
        paths = [Path(folder) / name for name in (*names, *here)]
        links += [each.relative_to(path).as_posix() for each in paths if each.is_symlink()]
        names[:] = [name for name in names if not name.startswith(".") and name not in _SKIPPED]
        files += [(Path(folder) / name).relative_to(path).as_posix() for name in here]
        if len(files) > _MOST_FILES:
            raise UsageError(f"{path} holds more than {_MOST_FILES:,} files; it is not a submission.")
    regular = [name for name in files if (path / name).is_file() and not (path / name).is_symlink()]
    return SubmissionFolder(
        path, tuple(sorted(regular, key=lambda name: (name.count("/"), name))), tuple(sorted(links))
    )


def flat_table(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested table by dotted name, as in Flower's run config."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flat_table(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
