"""Loading questions from files and the hub, and comparing them with the official data."""

import json
import random
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

import fedtune.hub
from fedtune.errors import MissingError, UsageError
from fedtune.evaluation.tasks import hub, load
from fedtune.evaluation.tasks.base import Part, Question, Row, Selection, Source, Task, content_hash
from fedtune.evaluation.tasks.load import load_questions
from fedtune.evaluation.tasks.registry import all_tasks, parse_bench

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the official rows are not at hand")

MEDMCQA = all_tasks()["medmcqa"]


def row(number: int, **changes: Any) -> dict[str, Any]:
    options = {f"op{letter}": f"{letter}{number}" for letter in "abcd"}
    return {"question": f"Question {number}?", **options, "cop": number % 4} | changes


def bench_of(rows: int | None, sha256: str | None = None, **changes: Any) -> Selection:
    """MedMCQA with other official row counts and hashes."""
    return Selection(replace(MEDMCQA, parts={"": Part(rows, sha256)}, **changes))


def write(folder: Path, rows: Iterable[Row], name: str = "medmcqa.jsonl") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


def hash_of(task: Task, rows: Iterable[Row]) -> str:
    return content_hash(task.ask(each) for each in rows)


def test_rows_in_their_order_with_ids(tmp_path: Path) -> None:
    write(tmp_path, [row(0), row(1)])
    loaded = load_questions(bench_of(2), tmp_path)
    assert [question.id for question in loaded.questions] == ["medmcqa/0", "medmcqa/1"]
    assert [question.gold for question in loaded.questions] == ["A", "B"]
    assert (loaded.count, loaded.expected, loaded.partial) == (2, 2, False)
    assert loaded.source == str(tmp_path / "medmcqa.jsonl")
    assert [(finding.kind, finding.marks) for finding in loaded.findings] == [("unverified", False)]
    assert loaded.comparable


def test_right_content_is_verified_and_wrong_content_marked(tmp_path: Path) -> None:
    rows = [row(0), row(1)]
    selection = bench_of(2, hash_of(MEDMCQA, rows))
    write(tmp_path, rows)
    assert load_questions(selection, tmp_path).verified
    write(tmp_path, reversed(rows))
    loaded = load_questions(selection, tmp_path)
    assert [(finding.kind, finding.marks) for finding in loaded.findings] == [("content", True)]
    assert not loaded.verified
    assert not loaded.comparable


@pytest.mark.parametrize(("count", "partial"), [(2, True), (4, False)])
def test_wrong_row_count_marks(tmp_path: Path, count: int, partial: bool) -> None:
    write(tmp_path, [row(number) for number in range(count)])
    loaded = load_questions(bench_of(3), tmp_path)
    assert [(finding.kind, finding.count, finding.marks) for finding in loaded.findings] == [("row-count", 1, True)]
    assert f"{count} rows" in loaded.findings[0].text
    assert loaded.partial is partial
    assert not loaded.comparable


def test_duplicates_mark_unless_the_official_data_has_them(tmp_path: Path) -> None:
    rows = [row(0), row(1), row(0, cop=2)]
    write(tmp_path, rows)
    loaded = load_questions(bench_of(3), tmp_path)
    finding = next(each for each in loaded.findings if each.kind == "duplicates")
    assert (finding.count, finding.marks) == (1, True)
    assert "medmcqa/2" in finding.text
    loaded = load_questions(bench_of(3, hash_of(MEDMCQA, rows)), tmp_path)
    assert [(each.kind, each.count, each.marks) for each in loaded.findings] == [("duplicates", 1, False)]
    assert loaded.comparable


def test_limit_is_partial_and_checked_on_the_whole(tmp_path: Path) -> None:
    rows = [row(number) for number in range(3)]
    write(tmp_path, rows)
    selection = bench_of(3, hash_of(MEDMCQA, rows))
    loaded = load_questions(selection, tmp_path, limit=2)
    assert (loaded.count, loaded.expected, loaded.partial_because) == (2, 3, "--limit 2 of 3 rows")
    assert loaded.verified
    assert not loaded.comparable
    assert loaded.sha256 == hash_of(MEDMCQA, rows[:2])
    assert not load_questions(selection, tmp_path, limit=3).partial
    with pytest.raises(UsageError, match="--limit 0"):
        load_questions(selection, tmp_path, limit=0)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (row(1, cop=4), "line 2: cop is 4, not 0 to 3"),
        (row(1, cop=True), "line 2: cop is true"),
        (row(1, cop=-1), "line 2: cop is -1"),
        (row(1, opa=None), "line 2: opa is null, not a text"),
        (row(1, answer="A"), "line 2: an unknown field answer"),
        ({"question": "Q"}, "line 2: no field opa"),
    ],
)
def test_bad_rows_are_counted_and_refused(tmp_path: Path, bad: Row, said: str) -> None:
    path = write(tmp_path, [row(0), bad, bad])
    with pytest.raises(UsageError) as caught:
        load_questions(bench_of(3), tmp_path)
    assert said in caught.value.message
    assert f"{path}: 2 of 3 rows cannot be used" in caught.value.message
    assert "(2 such)" in caught.value.message


@pytest.mark.parametrize(
    ("name", "bad", "said"),
    [
        ("mmlu", {"input": "Q", "A": "", "B": "", "C": "", "D": "", "target": "E"}, "target"),
        ("pubmedqa", {"CONTEXTS": "text", "QUESTION": "Q", "final_decision": "yes"}, "CONTEXTS"),
        ("pubmedqa", {"CONTEXTS": [], "QUESTION": "Q", "final_decision": "Yes"}, "final_decision"),
        ("medqa", {"question": "Q", "options": [{"key": "A", "value": "x"}], "answer": "x"}, "options"),
        ("medqa", {"question": "Q", "options": {"A": "x"}, "answer": "x"}, "options"),
        ("careqa", {"question": "Q", "op1": "", "op2": "", "op3": "", "op4": "", "cop": 0}, "cop"),
        ("fpb", {"sentence": "S", "label": 3}, "label"),
        ("fiqa", {"sentence": "S", "sentiment_score": "0.1", "format": "post"}, "sentiment_score"),
        ("tfns", {"text": 1, "label": 0}, "text"),
    ],
)
def test_out_of_range_answers_are_refused_everywhere(tmp_path: Path, name: str, bad: Row, said: str) -> None:
    part = "anatomy" if name == "mmlu" else ""
    write(tmp_path, [bad], f"mmlu/{part}.jsonl" if part else f"{name}.jsonl")
    with pytest.raises(UsageError, match=said):
        load_questions(parse_bench(f"{name}:{part}" if part else name)[0], tmp_path)


@pytest.mark.parametrize(("text", "answer"), [("b", "option B, but answer_idx is A"), ("z", "not one of the options")])
def test_medqa_answer_must_be_an_option(tmp_path: Path, text: str, answer: str) -> None:
    options = [{"key": key, "value": key.lower()} for key in "ABCD"]
    write(tmp_path, [{"question": "Q", "options": options, "answer": text, "answer_idx": "A"}], "medqa.jsonl")
    with pytest.raises(UsageError, match=answer):
        load_questions(parse_bench("medqa")[0], tmp_path)


def test_missing_files_are_named_and_counted(tmp_path: Path) -> None:
    write(tmp_path, [], "mmlu/anatomy.jsonl")
    with pytest.raises(MissingError, match=r"18 of 19 files are not in .*mmlu/abstract_algebra.jsonl, .* and 15 more"):
        load_questions(parse_bench("mmlu:stem")[0], tmp_path)
    with pytest.raises(MissingError, match="no folder"):
        load_questions(bench_of(1), tmp_path / "nowhere")
    with pytest.raises(MissingError, match="no rows"):
        load_questions(parse_bench("mmlu:anatomy")[0], tmp_path)


def test_broken_files_are_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path, [row(0)])
    path.write_text(path.read_text() + '{"question": "cut', encoding="utf-8")
    with pytest.raises(UsageError, match="line 2 is not a JSON object"):
        load_questions(bench_of(1), tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_questions(bench_of(1), tmp_path)
    path.rename(tmp_path / "medmcqa.parquet")
    with pytest.raises(UsageError, match="not a Parquet file"):
        load_questions(bench_of(1), tmp_path)


def test_parquet_gives_the_same_questions(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    options = [{"key": key, "value": key.lower()} for key in "ABCD"]
    rows = [{"question": "A line\u2028break", "options": options, "answer": "c"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "medqa.parquet")
    selection = parse_bench("medqa")[0]
    from_parquet = load_questions(selection, tmp_path).questions
    write(tmp_path, rows, "medqa.jsonl")
    assert load_questions(selection, tmp_path).questions == from_parquet


def test_tiny_uses_its_own_file_unless_one_is_given(tmp_path: Path) -> None:
    shipped = write(tmp_path / "own", [row(0, subject="taste"), row(1, subject="colour")], "test.jsonl")
    tiny = Selection(replace(all_tasks()["tiny"], shipped=shipped))
    for data_dir in (None, tmp_path):
        loaded = load_questions(tiny, data_dir)
        assert [question.subset for question in loaded.questions] == ["taste", "colour"]
        assert (loaded.expected, loaded.source, loaded.findings) == (None, "shipped with fedtune", ())
    write(tmp_path, [row(2, subject="taste")], "tiny.jsonl")
    assert load_questions(tiny, tmp_path).count == 1


# --- The hub, without a network --------------------------------------------------------------------------------------


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Row] | Exception]:
    """The rows or the error of each hub id; the hub itself can be reached."""
    answers: dict[str, list[Row] | Exception] = {}

    def answer(source: Source, part: str) -> list[Row]:
        found = answers.get(source.hub_id, hub.SourceError("a script data set, which datasets 4 and later refuse"))
        if isinstance(found, Exception):
            raise found
        return list(source.rows(found))

    monkeypatch.setattr(load, "require_hub", lambda: None)
    monkeypatch.setattr(load, "hub_rows", answer)
    return answers


def test_the_first_source_with_the_official_rows_is_used(sources: dict[str, Any]) -> None:
    rows = [row(0, extra="columns of the hub do no harm"), row(1)]
    official = hash_of(MEDMCQA, rows)
    chain = (Source("copy/short", "test"), Source("copy/other", "test"), Source("the/original", "test", original=True))
    selection = bench_of(2, official, sources=chain)
    sources |= {"copy/short": rows[:1], "copy/other": [row(0), row(2)], "the/original": rows}
    loaded = load_questions(selection)
    assert (loaded.source, loaded.verified, loaded.findings) == ("the/original", True, ())
    sources["copy/other"] = rows
    assert load_questions(selection).source == "copy/other"
    del sources["the/original"]
    sources["copy/other"] = [row(0), row(2)]
    with pytest.raises(MissingError) as caught:
        load_questions(selection)
    assert "copy/short (has 1 of the 2 rows)" in caught.value.message
    assert "copy/other (its rows differ from the official ones)" in caught.value.message
    assert "the/original (a script data set" in caught.value.message
    assert "--data-dir" in caught.value.hint


def test_a_copy_without_known_hash_is_unverified(sources: dict[str, Any]) -> None:
    rows = [row(0), row(0)]
    copy = bench_of(2, sources=(Source("some/copy", "test", revision="0123456789" * 4),))
    sources["some/copy"] = rows
    loaded = load_questions(copy)
    assert loaded.source == "some/copy@01234567"
    assert [(each.kind, each.marks) for each in loaded.findings] == [("unverified", False), ("duplicates", False)]


def test_hub_rows_never_runs_a_script_and_asks_for_the_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[Row]:
        calls.append((args, kwargs))
        return [{"a": 1}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(hub.SourceError, match="script data set"):
        hub.hub_rows(Source("a/b", "test", script=True), "")
    assert calls == []
    assert hub.hub_rows(Source("a/b", "test", revision="c" * 40), "anatomy") == [{"a": 1}]
    hub.hub_rows(Source("a/b", "test", script=True, parquet_export=True), "anatomy")
    assert calls == [
        (("a/b", "anatomy"), {"split": "test", "revision": "c" * 40}),
        (
            ("parquet",),
            {"data_files": "hf://datasets/a/b@refs/convert/parquet/anatomy/test/*.parquet", "split": "train"},
        ),
    ]

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found b.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(hub.SourceError, match="no longer supported"):
        hub.hub_rows(Source("a/b", "test"), "")


def test_fpb_is_cut_to_the_leaderboards_quarter() -> None:
    import datasets

    from fedtune.evaluation.tasks.sentiment import held_out

    whole = datasets.Dataset.from_list([{"sentence": str(number), "label": 0} for number in range(4846)])
    rows = list(held_out(whole))
    assert len(rows) == 1212
    assert rows[0] != {"sentence": "0", "label": 0}


class Silent(BaseHTTPRequestHandler):
    """A hub that answers everything with 401."""

    def do_HEAD(self) -> None:
        self.send_response(401)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()


def test_an_unreachable_hub_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch, no_proxy: None) -> None:
    with HTTPServer(("127.0.0.1", 0), Silent) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        thread = Thread(target=server.handle_request)
        thread.start()
        hub.require_hub()
        thread.join()
    start = time.monotonic()
    with pytest.raises(MissingError, match=rf"{url} cannot be reached. .*--data-dir DIR"):
        load_questions(parse_bench("careqa")[0])
    assert time.monotonic() - start < 10


def test_a_hub_that_never_answers_is_an_error_after_the_deadline(
    monkeypatch: pytest.MonkeyPatch, no_proxy: None
) -> None:
    monkeypatch.setattr(fedtune.hub, "DEADLINE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts the connection and sends nothing
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(MissingError, match=r"did not answer within 0\.1 s"):
            hub.require_hub()
        assert time.monotonic() - start < 0.9
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        hub.require_hub()


# --- The official rows, where they are at hand -----------------------------------------------------------------------


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SHARED / "benchmarks" / name).read_text(encoding="utf-8").split("\n") if line]


def as_mmlu_copy(rows: list[dict[str, Any]]) -> list[Row]:
    shown = [["None" if each[letter] == "nan" else each[letter] for letter in "ABCD"] for each in rows]
    return [
        {"question": each["input"], "subject": "x", "choices": choices, "answer": "ABCD".index(each["target"])}
        for each, choices in zip(rows, shown, strict=True)
    ]


def as_pubmedqa_copy(rows: list[dict[str, Any]]) -> list[Row]:
    copy: list[Row] = [
        {
            "pubid": 0,
            "question": each["QUESTION"],
            "context": {"contexts": each["CONTEXTS"]},
            "final_decision": decision,
        }
        for each in rows
        for decision in [each["final_decision"]]
    ]
    copy += [{"question": f"Invented {i}?", "context": {"contexts": []}, "final_decision": "no"} for i in range(500)]
    random.Random(0).shuffle(copy)
    return copy


def as_medqa_copy(rows: list[dict[str, Any]]) -> list[Row]:
    return [each | {"options": {option["key"]: option["value"] for option in each["options"]}} for each in rows]


@needs_shared
@pytest.mark.parametrize(
    ("bench", "file", "hub_id", "copy"),
    [
        ("mmlu:college_mathematics", "mmlu/college_mathematics.jsonl", "cais/mmlu", as_mmlu_copy),
        ("pubmedqa", "pubmedqa.jsonl", "qiaojin/PubMedQA", as_pubmedqa_copy),
        ("medqa", "medqa.jsonl", "GBaker/MedQA-USMLE-4-options", as_medqa_copy),
        ("medmcqa", "medmcqa.jsonl", "openlifescienceai/medmcqa", list),
    ],
)
def test_a_copy_with_the_official_rows_is_used(
    sources: dict[str, Any], bench: str, file: str, hub_id: str, copy: Callable[[list[dict[str, Any]]], list[Row]]
) -> None:
    sources[hub_id] = copy(read(file))
    selection = parse_bench(bench)[0]
    loaded = load_questions(selection)
    assert loaded.verified
    assert loaded.source.startswith(hub_id)
    assert loaded.questions == load_questions(selection, SHARED / "benchmarks").questions
    assert all(isinstance(question, Question) for question in loaded.questions)


@needs_shared
def test_duplicates_of_the_official_mmlu_do_not_mark_it() -> None:
    loaded = load_questions(parse_bench("mmlu:stem")[0], SHARED / "benchmarks")
    assert [(each.kind, each.count, each.marks) for each in loaded.findings] == [("duplicates", 12, False)]
    assert loaded.comparable
