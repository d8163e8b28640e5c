"""What a cell that is no text becomes: the table of docs/how-to/own-data.md, in every format and from the hub."""

import csv
import datetime
import io
import json
import logging
import re
import threading
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fedtune.config.load import load_config
from fedtune.config.schema import DataConfig, ModelConfig
from fedtune.data import source
from fedtune.data.files import read_file
from fedtune.data.source import load_rows
from fedtune.data.tokenize import tokenize_rows
from fedtune.data.values import ValueRefusedError, arrow_texts, parse_float, to_text
from fedtune.errors import UsageError
from fedtune.federation.train import train
from fedtune.models.base import load_tokenizer

NAN = float("nan")
DAY = datetime.date(2026, 11, 25)


@pytest.mark.parametrize("value", [None, NAN, np.float32("nan"), pandas.NaT, pandas.NA, Decimal("NaN")])
def test_missing_in_every_spelling_is_missing(value: object) -> None:
    assert to_text(value) is None
    assert to_text({"a": [value]}) == '{"a": [null]}'


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("nan", "nan"),
        ("", ""),
        (True, "true"),
        (np.bool_(False), "false"),
        (1, "1"),
        (1.0, "1.0"),
        (10**30, "1000000000000000000000000000000"),
        (0.1, "0.1"),
        (1e22, "1e+22"),
        (np.float32(0.1), "0.1"),
        (np.int64(-3), "-3"),
        (Decimal("1.500"), "1.500"),
        (Decimal("1E+3"), "1000"),
        ("é".encode(), "é"),
        (DAY, "2026-11-25"),
        (datetime.datetime(2026, 11, 25, 12, 30), "2026-11-25T12:30:00"),
        (datetime.datetime(2026, 11, 25, 12, 30, tzinfo=datetime.UTC), "2026-11-25T12:30:00+00:00"),
        (datetime.time(12, 30, 0, 500_000), "12:30:00.500000"),
        (datetime.timedelta(days=1, hours=2, minutes=3, seconds=4, milliseconds=500), "P1DT2H3M4.5S"),
        (datetime.timedelta(seconds=-1), "-PT1S"),
        (datetime.timedelta(0), "PT0S"),
        (datetime.timedelta(days=2), "P2D"),
        (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        ([1, "é", None, {"b": True}], '[1, "é", null, {"b": true}]'),
        ({1: b"x", "d": DAY, "n": Decimal("1.50")}, '{"1": "x", "d": "2026-11-25", "n": 1.50}'),
    ],
)
def test_values_become_these_texts(value: object, text: str) -> None:
    assert to_text(value) == text


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("inf"), "an infinite number"),
        (Decimal("-Infinity"), "an infinite number"),
        ([float("-inf")], "an infinite number"),
        (b"\xff", "bytes that are no UTF-8 text"),
        ({"a": b"\xff"}, "bytes that are no UTF-8 text"),
        ("\ud800", "half of a surrogate pair"),
        ({1: "a", "1": "b"}, "two keys '1'"),
        ({None: "a"}, "a missing key"),
        (object(), "of the type object"),
    ],
)
def test_values_without_a_text_are_refused(value: object, said: str) -> None:
    with pytest.raises(ValueRefusedError, match=said):
        to_text(value)


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        (pyarrow.float32(), 0.1, "0.1"),
        (pyarrow.float16(), np.float16(0.1), "0.1"),
        (pyarrow.float64(), NAN, None),
        (pyarrow.null(), None, None),
        (pyarrow.int64(), 2**62, "4611686018427387904"),
        (pyarrow.bool_(), True, "true"),
        (pyarrow.binary(), b"x", "x"),
        (pyarrow.binary_view(), b"x", "x"),
        (pyarrow.large_string(), "x", "x"),
        (pyarrow.string_view(), "x", "x"),
        (pyarrow.decimal128(10, 3), Decimal("1.500"), "1.500"),
        (pyarrow.date32(), DAY, "2026-11-25"),
        (pyarrow.timestamp("ns"), 1, "1970-01-01T00:00:00.000000001"),
        (pyarrow.timestamp("s", tz="Europe/Berlin"), 0, "1970-01-01T01:00:00+01:00"),
        (pyarrow.timestamp("ms"), None, None),
        (pyarrow.time64("ns"), 1, "00:00:00.000000001"),
        (pyarrow.time32("s"), 60, "00:01:00"),
        (pyarrow.duration("s"), -90061, "-P1DT1H1M1S"),
        (pyarrow.list_(pyarrow.float32()), [0.1, None, NAN], "[0.1, null, null]"),
        (pyarrow.struct([("a", pyarrow.binary()), ("b", pyarrow.bool_())]), {"a": b"x", "b": True}, '{"a": "x", "b": true}'),
        (pyarrow.map_(pyarrow.int32(), pyarrow.float32()), [(1, 0.1)], '{"1": 0.1}'),
    ],
)  # fmt: skip
def test_parquet_columns_of_every_type(kind: pyarrow.DataType, value: object, text: str | None, tmp_path: Path) -> None:
    array = pyarrow.array([value, value], kind)
    for column in (array, array.dictionary_encode()) if kind == pyarrow.float32() else (array,):
        assert arrow_texts(pyarrow.chunked_array([column]), str) == [text, text]
    if kind != pyarrow.float16():
        parquet.write_table(pyarrow.table({"a": array, "b": ["x", "y"]}), tmp_path / "a.parquet")
        assert read_file(tmp_path / "a.parquet")["a"][:] == [text, text]


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (pyarrow.binary(), b"\xff", "bytes that are no UTF-8"),
        (pyarrow.float64(), float("inf"), "an infinite number"),
        (pyarrow.date32(), 10**8, "outside of the years 1 to 9999"),
        (pyarrow.map_(pyarrow.string(), pyarrow.int8()), [("a", 1), ("a", 2)], "one key twice"),
    ],
)
def test_a_refused_parquet_cell_is_named_and_only_where_it_is_needed(
    kind: pyarrow.DataType, value: object, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.parquet"
    column = pyarrow.array([None, value], kind)
    parquet.write_table(pyarrow.table({"instruction": ["q", "r"], "output": column}), path)
    with pytest.raises(UsageError, match=rf"a\.parquet, row 2, column 'output': the value is .*{said}") as caught:
        load_rows(DataConfig(source=str(path)), 0)
    assert caught.value.exit_code == 2
    rows = load_rows(DataConfig(source=str(path), response="{instruction}"), 0)
    assert sorted(rows["instruction"]) == ["q", "r"]


def test_the_same_rule_holds_for_a_data_set_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A float column's NaN, a float32, bytes, a nested value; columns that no template names stay as they are."""
    table = pyarrow.table(
        {
            "instruction": pyarrow.array([0.1, NAN], pyarrow.float32()),
            "output": [b"yes", None],
            "input": [[1.5, NAN], []],
            "label": [1, 0],
            "picture": [b"\xff", b"\xff"],
        }
    )
    monkeypatch.setattr(source, "load_hub", lambda *_: datasets.Dataset(table))
    config = DataConfig(source="me/toy", instruction="{instruction} {input}", partition_by="label")
    rows = sorted(load_rows(config, 0).to_list(), key=lambda row: row["label"])
    assert rows == [
        {"instruction": None, "output": None, "input": "[]", "label": 0, "picture": b"\xff"},
        {"instruction": "0.1", "output": "yes", "input": "[1.5, null]", "label": 1, "picture": b"\xff"},
    ]
    with pytest.raises(UsageError, match=r"data set me/toy, split train, row 1, column 'picture': the value is bytes"):
        load_rows(DataConfig(source="me/toy", response="{picture}"), 0)


@pytest.mark.parametrize(
    ("written", "text"),
    [("1.50", "1.5"), ("1e400", "1e400"), ("0.10000000000000001", "0.1"), ("1234567890123456789.5", "1234567890123456789.5"),
     ("1E-400", "1E-400"), ("-0.0", "-0.0"), ("1e22", "1e+22")],
)  # fmt: skip
def test_a_json_number_loses_no_digit(written: str, text: str, tmp_path: Path) -> None:
    assert to_text(parse_float(written)) == text
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"a": {written}, "b": [{written}]}}')
    assert read_file(path).to_list() == [{"a": text, "b": f"[{text}]"}]


def test_a_missing_answer_is_a_skipped_row_whatever_the_template_puts_around_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "q", "output": NaN}\n{"instruction": "q", "output": null}\n{"instruction": "q"}\n')
    with path.open("a") as file:
        file.write('{"instruction": "q", "output": ""}\n{"instruction": "q", "output": "a"}\n')
    for template in ("{output}", "Answer: {output}"):
        config = DataConfig(source=str(path), response=template)
        rows = tokenize_rows(load_rows(config, 0), config, tokenizer(), 64)
        assert (rows.total, rows.skipped) == (5, 4)


def test_nan_answers_are_refused_by_train_as_null_ones_are(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for missing in ("NaN", "null"):
        path.write_text(f'{{"instruction": "q", "input": "", "output": {missing}}}\n' * 16)
        config = load_config(challenge="tiny", settings=[f"data.source={path}", "data.partitioner=iid"]).config
        with pytest.raises(UsageError, match="16 of 16 rows"):
            train(config, out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_words_for_missing_in_a_csv_are_text_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b\nnan,None\n,NaN\n")
    with caplog.at_level(logging.WARNING, "fedtune"):
        assert read_file(path).to_list() == [{"a": "nan", "b": "None"}, {"a": None, "b": "NaN"}]
    assert [re.sub(r".*: (\d)", r"\1", record.getMessage()).split(",")[0] for record in caplog.records] == [
        "1 cells of the column 'a' are the word nan",
        "1 cells of the column 'b' are the word NaN",
    ]


@pytest.mark.parametrize("characters", [200_000, 20_000_000])
def test_a_long_cell_is_the_same_row_in_csv_and_json_lines(characters: int, tmp_path: Path) -> None:
    cell = "word, " * (characters // 6)
    (tmp_path / "a.csv").write_text(f'instruction,output\nq,"{cell}"\n')
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "q", "output": cell}))
    before = csv.field_size_limit()
    rows = read_file(tmp_path / "a.csv").to_list()
    assert rows == read_file(tmp_path / "a.jsonl").to_list() == [{"instruction": "q", "output": cell}]
    assert csv.field_size_limit() == before  # other code in the process keeps its limit


def test_long_cells_are_read_by_several_threads(tmp_path: Path) -> None:
    """The csv module's limit belongs to the process: one reader must not lower it under another."""
    (tmp_path / "a.csv").write_text("a,b\n" + f"{'x' * 150_000},1\n" * 20)
    found: list[int] = []
    readers = [threading.Thread(target=lambda: found.append(len(read_file(tmp_path / "a.csv")))) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert found == [20] * 4


def tokenizer() -> Any:
    return load_tokenizer(ModelConfig(base="builtin:tiny", quantization="none"))


TEXT = st.text(
    st.one_of(st.sampled_from('",\n\r\0\u2028\u2029\ufeff\x85\x1c \t;{}\\'), st.characters(codec="utf-8")), max_size=12
)
# Values of one column, each with how a program writes it to a CSV file, where there is nothing but text.
COLUMNS = {
    pyarrow.string(): st.one_of(TEXT, st.just("long " * 40_000), st.just("inf"), st.just("true")),
    pyarrow.int64(): st.integers(-(2**63), 2**63 - 1),
    pyarrow.float64(): st.floats(allow_infinity=False),
    pyarrow.float32(): st.floats(width=32, allow_infinity=False),
    pyarrow.bool_(): st.booleans(),
    pyarrow.binary(): TEXT.map(str.encode),
    pyarrow.date32(): st.dates(),
    pyarrow.timestamp("us"): st.datetimes(),
    pyarrow.time64("us"): st.times(),
    pyarrow.decimal128(20, 4): st.decimals(-(10**9), 10**9, places=4),
    pyarrow.list_(pyarrow.float64()): st.lists(st.floats(allow_infinity=False), max_size=3),
    pyarrow.struct([("a", pyarrow.string()), ("b", pyarrow.int32())]): st.builds(
        lambda a, b: {"a": a, "b": b}, st.one_of(st.none(), TEXT), st.integers(-9, 9)
    ),
}


def as_json(value: Any, kind: pyarrow.DataType) -> Any:
    """Return a value as a JSON writer takes it; what JSON has no type for is text."""
    if kind == pyarrow.float32() and value is not None:
        return float(str(np.float32(value)))
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return format(value, "f")
    return value


def as_csv(value: Any) -> str:
    """Return a JSON value as a CSV writer writes it."""
    if value is None or value != value:
        return ""
    if isinstance(value, bool | list | dict):
        return re.sub(r"\bNaN\b", "null", json.dumps(value, ensure_ascii=False)) if value != "NaN" else value
    return str(value)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=40)
@given(st.data())
def test_the_same_rows_in_every_format_give_the_same_tokens(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    kinds = [data.draw(st.sampled_from(list(COLUMNS)), label=name) for name in ("instruction", "output")]
    rows = data.draw(
        st.lists(st.tuples(*(st.one_of(st.none(), COLUMNS[kind]) for kind in kinds)), min_size=1, max_size=4)
    )
    names = ("instruction", "output")
    folder = tmp_path_factory.mktemp("formats")
    columns = {name: pyarrow.array([row[place] for row in rows], kinds[place]) for place, name in enumerate(names)}
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    records = [{name: as_json(row[place], kinds[place]) for place, name in enumerate(names)} for row in rows]
    (folder / "a.json").write_text(json.dumps(records), encoding="utf-8")
    # In JSON lines a missing value may also be a key that is not there.
    present = [{name: value for name, value in record.items() if value is not None} for record in records]
    lines = [{"id": "1", **record} for record in present] + [{"id": "2", "instruction": "", "output": ""}]
    (folder / "a.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\r\n" for line in lines), "utf-8")
    with io.StringIO(newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", *names))
        writer.writerows(("1", *(as_csv(record[name]) for name in names)) for record in records)
        (folder / "a.csv").write_bytes(b"\xef\xbb\xbf" + file.getvalue().encode())
    found = []
    for name in ("a.parquet", "a.json", "a.jsonl", "a.csv"):
        table = read_file(folder / name).select(range(len(rows)))
        tokens = tokenize_rows(table, DataConfig(), tokenizer(), 512)
        found.append((tokens.skipped, [ids.tolist() for ids in tokens.input_ids], tokens.prompt_lengths.tolist()))
    assert found[1:] == found[:1] * 3


def test_a_column_that_is_infinite_is_refused_in_each_format_that_has_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": Infinity}')
    (tmp_path / "a.json").write_text('[{"a": -Infinity}]')
    parquet.write_table(pyarrow.table({"a": [float("inf")]}), tmp_path / "a.parquet")
    for path in tmp_path.iterdir():
        with pytest.raises(UsageError, match="an infinite number"):
            read_file(path)
