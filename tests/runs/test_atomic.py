"""Files that appear whole or not at all: what is flushed, in which order, and what a failure leaves behind."""

import fcntl
import os
import threading
from pathlib import Path

import pytest

from fedtune.runs.atomic import (
    alone_in,
    read_json_lines,
    remove_leftovers,
    write_bytes,
    write_folder,
    write_json,
    write_text,
)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is flushed and renamed, by name, in order."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system does not tell which file a descriptor is of")
    seen: list[tuple[str, str]] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def flush(file: int) -> None:
        seen.append(("flush", Path(f"/proc/self/fd/{file}").readlink().name))
        fsync(file)

    def move(kind: str, original):  # type: ignore[no-untyped-def]
        def moved(self: Path, target: Path) -> Path:
            seen.append((kind, Path(target).name))
            return original(self, target)  # type: ignore[no-any-return]

        return moved

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "replace", move("replace", replace))
    monkeypatch.setattr(Path, "rename", move("rename", rename))
    return seen


def test_a_file_is_on_disk_before_it_has_its_name_and_its_name_before_the_call_returns(
    tmp_path: Path, steps: list[tuple[str, str]]
) -> None:
    write_bytes(tmp_path / "file", b"content")
    beside = f".file.{os.getpid()}.tmp"
    assert steps == [("flush", beside), ("replace", "file"), ("flush", tmp_path.name)]


def test_all_bytes_are_there_when_the_file_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer that is written after the flush would be lost in a power cut."""
    sizes: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (sizes.append(os.fstat(file).st_size), fsync(file))[1])
    write_text(tmp_path / "file", "ü" * 10)
    assert sizes[0] == 20


def test_a_folder_and_all_its_files_are_on_disk_before_it_has_its_name(
    tmp_path: Path, steps: list[tuple[str, str]]
) -> None:
    def fill(folder: Path) -> None:
        (folder / "b").write_text("1")
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("2")

    write_folder(tmp_path / "state", fill)
    beside = f".state.{os.getpid()}.tmp"
    assert sorted(steps[:2]) == [("flush", "a"), ("flush", "b")]
    assert steps[2:] == [("flush", beside), ("rename", "state"), ("flush", tmp_path.name)]
    assert (tmp_path / "state" / "inner" / "a").read_text() == "2"


def test_a_folder_starts_empty_in_parents_that_are_made(tmp_path: Path) -> None:
    """What an interrupted writer of the same process number has left is not taken over."""
    left = tmp_path / "runs" / f".state.{os.getpid()}.tmp"
    left.mkdir(parents=True)
    (left / "stale").write_text("x")
    write_folder(tmp_path / "runs" / "state", lambda folder: (folder / "new").write_text("y") and None)
    assert [path.name for path in (tmp_path / "runs" / "state").iterdir()] == ["new"]
    write_folder(tmp_path / "deeper" / "still" / "state", lambda folder: None)
    assert (tmp_path / "deeper" / "still" / "state").is_dir()


def test_a_failed_writer_leaves_nothing_beside(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "part").write_text("x")
        raise KeyError("no such tensor")

    with pytest.raises(KeyError, match="no such tensor"):
        write_folder(tmp_path / "state", fail)
    assert list(tmp_path.iterdir()) == []


def test_json_is_readable_and_ends_with_a_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": ["ü"]})
    assert (tmp_path / "x.json").read_text() == '{\n  "a": [\n    "ü"\n  ]\n}\n'


def test_one_at_a_time_in_a_folder(tmp_path: Path) -> None:
    """The second waits for the first, and neither leaves the folder locked."""
    handle = os.open(tmp_path, os.O_RDONLY)
    order: list[str] = []

    def second() -> None:
        with alone_in(tmp_path):
            order.append("second")

    with alone_in(tmp_path):
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        waiting = threading.Thread(target=second)
        waiting.start()
        order.append("first")
    waiting.join(10)
    assert order == ["first", "second"]
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)
    with pytest.raises(RuntimeError), alone_in(tmp_path):
        raise RuntimeError
    with alone_in(tmp_path):
        pass


def test_no_file_stays_open(tmp_path: Path) -> None:
    """A run commits thousands of times."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system does not tell which files are open")

    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    for _ in range(3):
        write_text(tmp_path / "x", "y")
        write_folder(tmp_path / "state", lambda folder: (folder / "a").write_text("b") and None)
        with alone_in(tmp_path):
            pass
    assert count() == before


def test_leftovers_are_files_and_folders_and_nothing_else_is_touched(tmp_path: Path) -> None:
    (tmp_path / ".x.1.tmp").write_text("left")
    (tmp_path / ".y.2.tmp").mkdir()
    (tmp_path / ".y.2.tmp" / "inner").write_text("left")
    for name in (".hidden", "x.tmp", "round-0001"):
        (tmp_path / name).write_text("kept")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".hidden", "x.tmp", "round-0001"}


def test_lines_that_are_not_there_or_not_objects(tmp_path: Path) -> None:
    assert read_json_lines(tmp_path / "none.jsonl") == []
    path = tmp_path / "x.jsonl"
    for text, number in (("7\n", 1), ('{"a": 1}\n[]\n{}\n', 2), ('{"a": 1}\n\n', 2), ('{"a": 1}\n"x"\n', 2)):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"^line {number} of .*x.jsonl is not a JSON object$"):
            read_json_lines(path)
