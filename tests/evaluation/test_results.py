"""`results.json`: reading, refusals with their position, and that a refused file is never overwritten."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import MissingError
from fedtune.evaluation import results as module
from fedtune.evaluation.results import FORMAT, add_results, prepare_folder, read_results


def record(label: str = "base", **changes: Any) -> dict[str, Any]:
    return {
        "subject": label,
        "label": label,
        "bench": "tiny",
        "protocol": "flowertune",
        "mode": "fast",
        "accuracy": 0.25,
        "n": 8,
        "k": 2,
        "interval_95": [0.1, 0.5],
        "unparsed": 0,
        **changes,
    }


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    assert read_results(file) == []
    add_results(file, [record("a"), record("b")])
    add_results(file, [record("b", k=4, accuracy=0.5), record("c", format=FORMAT)])
    assert [(each["label"], each["k"]) for each in read_results(file)] == [("a", 2), ("b", 4), ("c", 2)]


def test_the_first_format_is_still_read(tmp_path: Path) -> None:
    """A list of results without `format`, as early versions of fedtune wrote it."""
    file = tmp_path / "results.json"
    file.write_text(json.dumps([record("old")]))
    add_results(file, [record("new", format=FORMAT)])
    assert [each["label"] for each in read_results(file)] == ["old", "new"]


WHOLE = json.dumps([record("a"), record("b")], indent=2)

REFUSED = {
    "empty": ("", "cut off"),
    "cut in an object": (WHOLE[: len(WHOLE) // 2], "cut off"),
    "cut in a string": (WHOLE[: WHOLE.index("flowertune") + 3], "cut off"),
    "without the last bracket": (WHOLE.rstrip()[:-1], "cut off"),
    "garbage": ("garbage", "is not JSON"),
    "NaN": (WHOLE.replace("0.25", "NaN", 1), "NaN"),
    "an object": ('{"results": []}', "not contain an array of results"),
    "a text": ('"results"', "not contain an array of results"),
    "a list of numbers": ("[1, 2]", "entry 1 is not a result"),
    "somebody else's list": ('[{"name": "run", "score": 0.5}]', "entry 1 is not a result"),
    "a good one and a bad one": (json.dumps([record(), record("b", accuracy=0.75)]), "entry 2 is not a result"),
    "counts that are texts": (json.dumps([record(k="2")]), "entry 1 is not a result"),
    "more right answers than questions": (json.dumps([record(k=9, accuracy=9 / 8)]), "entry 1 is not a result"),
    "a newer record": (json.dumps([record(format=FORMAT + 1)]), "newer version"),
    "a newer file": (json.dumps({"format": FORMAT + 7, "results": []}), "newer version"),
    "a newer record of another form": (json.dumps([{"format": 99}]), "newer version"),
    "a number beyond every float": (
        json.dumps([record(seconds=0)]).replace(": 0}", ": 1e999}"),
        "'seconds' contains a number",
    ),
    "such an accuracy": (WHOLE.replace("0.25", "1e999", 1), "entry 1 .*'accuracy' contains a number that is too large"),
    "an integer of 400 digits": (
        json.dumps([record(accuracy=10**400)]),
        "'accuracy' contains a number that is too large",
    ),
    "counts of 400 digits": (json.dumps([record(n=10**400, k=10**400, accuracy=1)]), "'n' contains a number"),
    "an integer of 5,000 digits": (WHOLE.replace("0.25", "9" * 5000, 1), "'accuracy' contains a number"),
    "half a character": (
        json.dumps([record("\ud800")]),
        r"entry 1 .*'subject' contains '\\ud800', which is not Unicode text",
    ),
    "half a character inside": (json.dumps([record(found=[{"of": ["\udfff"]}])]), "'of' contains .* not Unicode text"),
    "half a character as a key": (json.dumps([record(found={"\ud800": 1})]), "'found' contains .* not Unicode text"),
    "a key twice": (json.dumps([record()]).replace('"k": 2', '"k": 2, "k": 2'), "the key 'k' twice"),
    "a result inside a list": (json.dumps([[record()]]), "entry 1 is not a result"),
    "too many levels": ("[" * 100_000, "more than 32 levels"),
    "too many levels in a result": (
        json.dumps([record(found=1)]).replace(": 1}", f": {'[' * 400}{']' * 400}}}"),
        "32 levels",
    ),
    "a format that is a text": (json.dumps([record(format="two")]), "entry 1 is not a result"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_read_is_refused_and_stays(tmp_path: Path, name: str) -> None:
    content, said = REFUSED[name]
    file = tmp_path / "results.json"
    file.write_text(content)
    for refusing in (
        lambda: read_results(file),
        lambda: add_results(file, [record("fresh")]),
        lambda: prepare_folder(tmp_path),
    ):
        with pytest.raises(MissingError, match=said) as caught:
            refusing()
        assert str(file) in caught.value.message
        assert caught.value.hint
        assert file.read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_directory_in_its_place_is_refused_and_stays(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.mkdir()
    for refusing in (
        lambda: read_results(file),
        lambda: add_results(file, [record()]),
        lambda: prepare_folder(tmp_path),
    ):
        with pytest.raises(MissingError, match="it is a directory") as caught:
            refusing()
        assert f"mv {file} " in caught.value.hint
    assert file.is_dir()


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(b"[\xff\xfe]")
    with pytest.raises(MissingError, match="not UTF-8"):
        add_results(tmp_path / "results.json", [record()])
    assert (tmp_path / "results.json").read_bytes() == b"[\xff\xfe]"


def test_only_json_numbers_are_written(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    gaps = (float("nan"), float("inf"), 0.5)
    add_results(file, [record(verified={"smallest_gaps": gaps}, seconds=float("inf"))])
    text = file.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    (read,) = read_results(file)
    assert (read["verified"]["smallest_gaps"], read["seconds"]) == ([None, None, 0.5], None)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MissingError, match=r"Results cannot be written to .*file/out: Not a directory"):
        prepare_folder(tmp_path / "file" / "out")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_text", full)
    with pytest.raises(MissingError, match="No space left") as caught:
        add_results(tmp_path / "results.json", [record()])
    assert "continues" in caught.value.hint
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MissingError, match="No space left"):
        prepare_folder(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(MissingError, match="Permission denied"):
            prepare_folder(tmp_path)
    finally:
        tmp_path.chmod(stat.S_IRWXU)
