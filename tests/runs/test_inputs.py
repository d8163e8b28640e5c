"""Fingerprints of what a run reads."""

import hashlib
from pathlib import Path

import pytest

from fedtune.errors import MissingError
from fedtune.runs import inputs
from fedtune.runs.inputs import Fingerprint, Inputs, fingerprint, fingerprints, read_inputs, write_inputs


def test_a_small_file_is_hashed_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"rows")
    assert fingerprint(path) == Fingerprint(4, hashlib.sha256(b"rows").hexdigest())
    with pytest.raises(MissingError, match="cannot be read"):
        fingerprint(tmp_path)


def test_a_large_file_is_sampled_from_its_first_byte_to_its_last(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    size = inputs.WHOLE_BYTES + 12345
    with path.open("wb") as file:
        file.truncate(size)
    before = fingerprint(path)
    assert (before.bytes, before.sampled) == (size, True)
    assert fingerprint(path) == before

    def changed_at(offset: int, data: bytes) -> bool:
        with path.open("r+b") as file:
            file.seek(offset)
            old = file.read(len(data))
            file.seek(offset)
            file.write(data)
            file.flush()
            differs = fingerprint(path) != before
            file.seek(offset)
            file.write(old)
        return differs

    assert changed_at(0, b"x")
    assert changed_at(2**20 - 1, b"x")
    assert changed_at(size - 1, b"x")
    # Blocks lie about 62 KiB apart: whatever is longer is met.
    for start in range(2**20, size - 2**17, 9_999_991):
        assert changed_at(start, b"x" * 2**17)
    with path.open("ab") as file:
        file.write(b"\0")
    assert fingerprint(path) != before


def test_changes_name_the_file_with_both_fingerprints() -> None:
    one, two = Fingerprint(1234, "a" * 64), Fingerprint(1235, "b" * 64)
    before = Inputs({"a.csv": one, "b.csv": one, "c.csv": one}, {"config.json": one})
    now = Inputs({"a.csv": one, "b.csv": two, "d.csv": one}, {"config.json": two})
    assert before.changes(before) == []
    assert before.changes(now) == [
        "data file c.csv: there when the run was started, missing now",
        "data file d.csv: not there when the run was started",
        "data file b.csv: 1,234 bytes, sha256 aaaaaaaaaaaa… when the run was started, 1,235 bytes, sha256 bbbbbbbbbbbb… now",
        "base model's config.json: 1,234 bytes, sha256 aaaaaaaaaaaa… when the run was started, "
        "1,235 bytes, sha256 bbbbbbbbbbbb… now",
    ]
    assert before.missing(now) == ["c.csv"]
    assert Inputs({"a.csv": one}, {}).changes(Inputs({"renamed.csv": one}, {})) == []


def test_inputs_come_back_and_damage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "inputs.json"
    assert read_inputs(path) is None
    (tmp_path / "a.csv").write_text("a")
    found = Inputs(fingerprints([tmp_path / "a.csv"]), {})
    write_inputs(path, found)
    assert read_inputs(path) == found
    for damage in ("", "{", "[]", '{"data": {}}', '{"data": {"a": {"bytes": "x"}}, "base": {}}'):
        path.write_text(damage)
        with pytest.raises(MissingError, match="it is damaged"):
            read_inputs(path)
