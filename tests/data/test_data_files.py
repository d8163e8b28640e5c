"""Local files, folders, and what is said of broken ones."""

import json
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from fedtune.config.schema import DataConfig
from fedtune.data.files import read_file, read_folder
from fedtune.data.source import BUILTIN_FOLDER, load_files, load_rows, resolved_revision
from fedtune.errors import ConfigError, FedTuneError, MissingError, UsageError

ROWS = [
    {"instruction": "a, b", "output": 'quote " and\nline'},
    {"instruction": "é {x} \u2028", "output": "2"},
]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    cells = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
    quoted = "\r\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in cells)
    paths = [
        write(tmp_path, "a.jsonl", f"{lines}\n\n"),
        write(tmp_path, "b.jsonl", "\ufeff" + lines.replace("\n", "\r\n")),
        write(tmp_path, "c.json", json.dumps(ROWS, indent=1)),
        write(tmp_path, "d.json", lines),
        write(tmp_path, "e.csv", "\ufeff" + quoted),
        tmp_path / "F.PARQUET",
    ]
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), paths[-1])
    for path in paths:
        assert read_file(path).to_list() == ROWS, path.name


def test_values_become_text_and_missing_ones_stay_none(tmp_path: Path) -> None:
    mixed = write(tmp_path, "a.jsonl", '{"n": 1, "s": "x"}\n{"n": "007", "t": [1]}\n{"n": true, "s": null}\n')
    assert read_file(mixed).to_list() == [
        {"n": "1", "s": "x", "t": None},
        {"n": "007", "s": None, "t": "[1]"},
        {"n": "true", "s": None, "t": None},
    ]
    assert read_file(write(tmp_path, "b.csv", "n,s\n007,\n")).to_list() == [{"n": "007", "s": None}]
    parquet.write_table(pyarrow.table({"n": [1, None], "f": [0.5, 2.0]}), tmp_path / "c.parquet")
    assert read_file(tmp_path / "c.parquet").to_list() == [{"n": "1", "f": "0.5"}, {"n": None, "f": "2.0"}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"a": "1"}\n\n{"a": \n', "a.jsonl, line 3: malformed JSON at column"),
        ("a.jsonl", '{"a": "1"}\n[1]\n', "a.jsonl, line 2: a row must be a JSON object"),
        ("a.jsonl", b'{"a": "1"}\n{"a": "\xff"}\n', "a.jsonl, line 2: the text is not UTF-8"),
        ("a.jsonl", '{"a": "\\ud800"}\n', "a.jsonl, line 1: the text has half of a surrogate pair"),
        ("a.jsonl", "{}\n", "without any column"),
        ("a.jsonl", '{"a": ' + "[" * 100_000, "line 1: malformed JSON"),
        ("a.json", '[{"a": "1"},\n {"a" "2"}]', "a.json: malformed JSON at line 2, column 7"),
        ("a.json", '[{"a": "1"}, 5]', "a.json, item 2: a row must be a JSON object"),
        ("a.json", "[]", "has no rows"),
        ("a.csv", "a,b\n1,2\n3\n", "a.csv, line 3: 1 fields, but the header names 2"),
        ("a.csv", "a,a\n1,2\n", "two columns named 'a'"),
        ("a.csv", 'a,b\n1,"2\n', "a.csv, line 2: malformed CSV"),
        ("a.csv", b"a,b\n1,\xff\n", "a.csv, line 2: the text is not UTF-8"),
        ("a.csv", "a,b\n", "has no rows"),
        ("a.jsonl", '{"a": "1"}\n{"a": "1", "a": "2"}\n', "a.jsonl, line 2: an object has the key 'a' twice"),
        ("a.jsonl", '{"a": {"b": 1, "b": 2}}', "a.jsonl, line 1: an object has the key 'b' twice"),
        ("a.jsonl", '{"a": "1"}\n\n{"a": Infinity}', "a.jsonl, line 3, column 'a': the value is an infinite number"),
        ("a.json", '[{"a": [1, -Infinity]}]', "a.json, item 1, column 'a': the value is an infinite number"),
        ("a.csv", "a;b\n1;2\n", "separated by ';' instead of commas"),
        ("a.csv", "a\tb\n1\t2\n", "separated by '\\t' instead of commas"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), "a.csv, line 1: the text is not UTF-8"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16-le"), "a.csv, line 1: the header holds NUL characters"),
        ("a.csv", "a,b\n1,é\n".encode("latin-1"), "a.csv, line 2: the text is not UTF-8"),
        ("a.jsonl", '{"a": "1"}'.encode("utf-16"), "a.jsonl, line 1: the text is not UTF-8"),
        ("a.csv", "a,b,\n1,2\n", "a.csv, line 2: 2 fields, but the header names 3"),
        ("a.parquet", "PAR1 no", "not a readable Parquet file"),
        ("a.jsonl", " \n", "is empty"),
        ("a.tsv", "a\tb\n", "not a data file"),
    ],
)
def test_broken_files_are_refused_by_line(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_file(write(tmp_path, name, content))
    assert caught.value.exit_code == 2
    assert said in str(caught.value)
    assert "\n" not in caught.value.message


@given(st.lists(st.fixed_dictionaries({"a": st.text(), "b": st.text()}), min_size=1, max_size=4))
def test_json_lines_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]) -> None:
    lines = "\n".join(json.dumps(row) for row in rows)
    path = write(tmp_path_factory.mktemp("rows"), "a.jsonl", lines)
    assert read_file(path).to_list() == rows


@given(st.binary(max_size=60), st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str) -> None:
    path = write(tmp_path_factory.mktemp("bytes"), f"a{suffix}", content)
    try:
        rows = len(read_file(path))
    except UsageError:
        return
    assert rows > 0


def test_folder_is_read_by_name_with_the_same_columns(tmp_path: Path) -> None:
    write(tmp_path, "b.csv", "output,instruction\n1,2\n")
    write(tmp_path, "a.jsonl", '{"instruction": "3", "output": "4"}')
    write(tmp_path, "README.md", "about")
    write(tmp_path, ".hidden", "x")
    (tmp_path / "sub").mkdir()
    tables = read_folder(tmp_path)
    assert list(tables) == ["a.jsonl", "b.csv"]
    assert tables["b.csv"].column_names == ["instruction", "output"]
    assert tables["b.csv"][0] == {"instruction": "2", "output": "1"}
    config = DataConfig(source=str(tmp_path), partitioner="files")
    assert list(load_files(config)) == ["a.jsonl", "b.csv"]
    assert sorted(load_rows(config, 0)["output"]) == ["1", "4"]

    write(tmp_path, "c.csv", "instruction,answer\n1,2\n")
    with pytest.raises(UsageError, match=r"c\.csv has the columns instruction, answer, but a\.jsonl has inst"):
        read_folder(tmp_path)
    write(tmp_path, "c.csv", "x")
    write(tmp_path, "c.tsv", "x")
    with pytest.raises(UsageError, match=r"c\.csv has no rows"):
        read_folder(tmp_path)
    (tmp_path / "c.csv").unlink()
    with pytest.raises(UsageError, match=r"c\.tsv is not a data file"):
        read_folder(tmp_path)
    with pytest.raises(UsageError, match="holds no data file"):
        read_folder(tmp_path / "sub")


@pytest.mark.parametrize(
    "source",
    ["no/such.jsonl", "gone.csv", "./gone", "/gone/away", "~/gone-away", "~nobody-here/x", "a/b/c", "a b", "x" * 999],
)
def test_missing_paths_are_not_looked_for_on_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for call in (lambda: load_rows(DataConfig(source=source), 0), lambda: resolved_revision(DataConfig(source=source))):
        with pytest.raises(MissingError, match="There is no file") as caught:
            call()
        assert caught.value.exit_code == 3
        assert "--data" in caught.value.hint


def test_other_sources_are_refused(tmp_path: Path) -> None:
    for config, said in [
        (DataConfig(), "data.source: is missing"),
        (DataConfig(source="builtin:tinny"), "did you mean builtin:tiny"),
        (DataConfig(source="builtin:tiny", split="no"), "data.split"),
    ]:
        with pytest.raises(ConfigError, match=said):
            load_rows(config, 0)
    file = write(tmp_path, "a.jsonl", '{"a": "1"}')
    with pytest.raises(ConfigError, match=r"data\.partitioner: files needs a folder"):
        load_files(DataConfig(source=str(file), partitioner="files"))
    assert resolved_revision(DataConfig(source=str(file))) is None


def test_errors_are_ours(tmp_path: Path) -> None:
    with pytest.raises(FedTuneError):
        read_file(tmp_path)
    with pytest.raises(MissingError):
        read_file(tmp_path / "gone.csv")


@pytest.mark.skipif(not (BUILTIN_FOLDER / "train.jsonl").is_file(), reason="the tiny challenge's data is not there")
def test_builtin_tiny_loads() -> None:
    rows = load_rows(DataConfig(source="builtin:tiny"), 0)
    assert {"instruction", "input", "output", "clinic"} <= set(rows.column_names)
    assert resolved_revision(DataConfig(source="builtin:tiny")) is None
