"""The run directory: whole files or none, states that prove themselves, runs and adapters found by name."""

import errno
import json
import logging
import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from fedtune.config.load import load_config
from fedtune.errors import MissingError, UsageError
from fedtune.runs.atomic import (
    drop_torn_line,
    os_error_in,
    read_json_lines,
    remove_leftovers,
    write_folder,
    write_json,
    write_text,
)
from fedtune.runs.directory import (
    RunDirectory,
    append_line,
    create_run,
    cut_to,
    find_adapter,
    find_run,
    is_intact,
)
from fedtune.runs.report import write_report


def test_a_writer_that_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "peft_1"
    write_folder(folder, lambda path: (path / "a").write_text("old") and None)

    def fail(path: Path) -> None:
        (path / "a").write_text("new")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_folder(folder, fail)
    assert (folder / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["peft_1"]
    (tmp_path / ".peft_1.123.tmp").mkdir()  # of a writer that was killed
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["peft_1"]
    write_folder(folder, lambda path: (path / "b").write_text("new") and None)
    assert [path.name for path in folder.iterdir()] == ["b"]


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]


@given(st.lists(st.dictionaries(st.text(), st.one_of(st.integers(), st.text(), st.none()), max_size=3), max_size=5))
def test_json_lines_survive_any_cut(tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, object]]) -> None:
    """Property: whatever byte a kill cuts the file at, the whole lines before it are read, and nothing else."""
    path = tmp_path_factory.mktemp("lines") / "file.jsonl"
    path.touch()
    for record in records:
        append_line(path, record)
    assert read_json_lines(path) == records
    data = path.read_bytes()
    for cut in range(0, len(data), max(1, len(data) // 7)):
        path.write_bytes(data[:cut])
        assert read_json_lines(path) == records[: data[:cut].count(b"\n")]


@given(st.integers(1, 60))
def test_a_line_after_a_torn_one_is_whole(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    """Whatever a stopped writer has left of its last line, the next line begins a new one."""
    path = tmp_path_factory.mktemp("lines") / "file.jsonl"
    for number in range(3):
        append_line(path, {"n": number, "text": "é" * 10})
    data = path.read_bytes()[:-cut]
    path.write_bytes(data)
    append_line(path, {"n": 9})
    assert [line["n"] for line in read_json_lines(path)] == [*range(data.count(b"\n")), 9]


def test_a_torn_line_is_dropped_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a"')
    with caplog.at_level(logging.WARNING, "fedtune"):
        drop_torn_line(path)
        drop_torn_line(path)
        drop_torn_line(tmp_path / "none.jsonl")
    assert path.read_bytes() == b'{"a": 1}\n{"a": 2}\n'
    (record,) = caplog.records
    assert f"{path} (line 3) is incomplete" in record.getMessage()


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (
            RuntimeError("[Errno 122] Error writing bytes to file. Detail: [errno 122] Disk quota exceeded"),
            errno.EDQUOT,
        ),
        (ValueError("nothing of the kind"), None),
        (OSError("a text without a number"), None),
        (KeyError(28), None),
        (KeyboardInterrupt("os error 28"), None),
        (MissingError("os error 28"), None),
    ],
)
def test_trouble_with_the_disk_is_found_in_any_exception(error: BaseException, number: int | None) -> None:
    found = os_error_in(error)
    assert (found.errno if found else None) == number
    wrapped = RuntimeError("a library's own words")
    wrapped.__cause__ = error
    found = os_error_in(wrapped)
    assert (found.errno if found else None) == number


def test_a_failed_writer_names_its_target_and_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "part").write_text("x")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left") as caught:
        write_folder(tmp_path / "peft_1", fail)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "peft_1"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder") as caught:
        write_text(tmp_path / "folder", "text")
    assert caught.value.filename == str(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_damaged_state_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunDirectory(tmp_path)
    for number in (1, 2):
        run.commit_state(number, lambda path: (path / "progress.json").write_text("{}") and None)
    (run.state_folder / "round-0002" / "progress.json").write_text("{")
    assert run.last_state() == run.state_folder / "round-0001"
    assert "round-0002 is damaged" in caplog.text


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"name": "a"}', '{"name": 1, "run_id": 1, "event": 1, "rounds": 1, "rows": []}']
)
def test_a_damaged_superlink_file_is_refused(text: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.state_folder.mkdir()
    run.superlink_file.write_text(text)
    with pytest.raises(MissingError, match=r"superlink\.json is damaged"):
        run.committed_rounds()


def test_a_home_folder_is_expanded_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(challenge="tiny").config
    run = create_run(Path("~/runs"), config)
    assert run.path.parent == tmp_path / "runs"
    write_json(run.config_file, config.model_dump(mode="json"))
    assert find_run(None, Path("~/runs")) == run
    assert find_run(f"~/runs/{run.path.name}") == run


def test_a_folder_that_takes_no_run_is_missing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MissingError, match="No run directory can be made"):
        create_run(tmp_path / "file", load_config(challenge="tiny").config)


def test_a_damaged_line_is_no_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_json_lines(path)


def test_states_are_verified_and_two_are_kept(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.last_state() is None
    for number in (1, 2, 3):
        run.commit_state(number, lambda path, number=number: (path / "x").write_text(str(number)) and None)
    assert sorted(path.name for path in run.state_folder.iterdir()) == ["round-0002", "round-0003"]
    last = run.last_state()
    assert last is not None
    assert is_intact(last)
    assert json.loads((last / "manifest.json").read_text()).keys() == {"x"}
    (last / "x").write_text("4")
    assert run.last_state() == run.state_folder / "round-0002"
    (run.state_folder / "round-0002" / "manifest.json").unlink()
    with pytest.raises(MissingError, match="damaged"):
        run.last_state()


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with run.lock(), pytest.raises(UsageError, match="Another process"), run.lock():
        pass
    with run.lock():
        pass


def test_runs_are_found(tmp_path: Path) -> None:
    config = load_config(challenge="tiny").config
    with pytest.raises(MissingError, match="no run in"):
        find_run(None, tmp_path / "runs")
    runs = [create_run(tmp_path / "runs", config) for _ in range(3)]
    assert len({run.path for run in runs}) == 3  # in the same second
    for age, run in enumerate(runs):
        write_json(run.config_file, config.model_dump(mode="json"))
        stamp = time.time() - 100 + age
        os.utime(run.config_file, (stamp, stamp))
    assert find_run(None, tmp_path / "runs") == runs[-1]
    assert find_run(runs[0].path.name, tmp_path / "runs") == runs[0]
    assert find_run(str(runs[1].path), tmp_path / "elsewhere") == runs[1]
    with pytest.raises(MissingError, match="no run 'nowhere'"):
        find_run("nowhere", tmp_path / "runs")
    assert runs[0].read_config() == config
    with pytest.raises(MissingError, match="no run directory"):
        RunDirectory(tmp_path).read_config()


def test_adapters_are_found_by_path_or_in_the_latest_run(tmp_path: Path) -> None:
    config = load_config(challenge="tiny").config
    for number, name in enumerate(("a", "b")):
        run = RunDirectory(tmp_path / name)
        for peft in ("peft_5",) if name == "b" else ("peft_5", "peft_10"):
            (run.path / peft).mkdir(parents=True)
            (run.path / peft / "adapter_config.json").write_text("{}")
        write_json(run.config_file, config.model_dump(mode="json"))
        os.utime(run.config_file, (number, number))
    assert find_adapter("peft_5", tmp_path) == tmp_path / "b" / "peft_5"
    assert find_adapter("peft_10", tmp_path) == tmp_path / "a" / "peft_10"
    assert find_adapter(str(tmp_path / "a" / "peft_5"), tmp_path) == tmp_path / "a" / "peft_5"
    assert RunDirectory(tmp_path / "a").adapters() == [5, 10]
    with pytest.raises(MissingError, match="no adapter 'peft_7'"):
        find_adapter("peft_7", tmp_path)


def test_cutting_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    cut_to(path, 5)
    path.write_text("123456789")
    cut_to(path, 5)
    assert path.read_text() == "12345"
    cut_to(path, 50)
    assert path.read_text() == "12345"


def test_the_report_takes_a_run_at_any_stage_and_escapes_what_it_shows(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    config = load_config(
        challenge="medical", flags={"data.source": ("--data", "<script>alert(1)</script>.jsonl")}
    ).config
    write_json(run.config_file, config.model_dump(mode="json"))
    write_report(run)  # nothing has happened yet
    assert "Nothing to draw yet" in run.report_file.read_text()
    write_json(run.about_file, {"eligible": False, "ineligible_because": ["data.source is <b>mine</b>"]})
    line = {"partition": 3, "status": "ok", "learning_rate": 1e-3, "num_examples": 4}
    append_line(run.metrics_file, {"round": 1, "train_loss": 2.0, **line})
    append_line(run.metrics_file, {"round": 2, "train_loss": 1.0, **line})
    append_line(run.metrics_file, {**line, "round": 2, "partition": 4, "status": "refused", "reason": "nan"})
    append_line(run.ledger_file, {"round": 1, "bytes": 2**20, "node": 3, "direction": "up", "kind": "train"})
    write_report(run)
    text = run.report_file.read_text()
    assert "<script>alert" not in text
    assert "data.source is &lt;b&gt;" in text
    assert "Not eligible" in text
    assert "1.00 MiB of 200,000 MiB used" in text
    assert text.count("<polyline") == 5  # client 3, the mean, the learning rate, the bytes, the cap


@pytest.mark.parametrize("cap_mib", [5.0, 200_000.0])
def test_the_chart_of_bytes_shows_curve_and_cap_however_far_the_cap_is(tmp_path: Path, cap_mib: float) -> None:
    config = load_config(settings=[f"communication.cap_mib={cap_mib}"]).config
    run = create_run(tmp_path, config)
    write_json(run.config_file, config.model_dump(mode="json"))
    for number in (1, 2, 3):
        append_line(run.ledger_file, {"round": number, "bytes": 2**20})
    write_report(run)
    text = run.report_file.read_text()
    heights = {
        name: [float(point.split(",")[1]) for point in found[1].split()]
        for name in ("sent so far, MiB", "cap")
        if (found := re.search(f"<title>{name}</title><polyline points='([^']+)'", text))
    }
    used, cap = heights["sent so far, MiB"], heights["cap"]
    assert cap[0] == cap[1] < used[2] < used[1] < used[0]  # SVG counts from the top
    assert used[0] - used[2] > 10, "the curve is no flat line"
