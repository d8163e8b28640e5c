"""The leaderboard's files: written to the byte, read back, and other files refused in one sentence."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.errors import MissingError, UsageError
from fedtune.evaluation.artefacts import accuracy_text, artefact_paths, rescore, write_artefacts
from fedtune.evaluation.tasks import careqa, fiqa, medmcqa, mmlu, pubmedqa
from fedtune.evaluation.tasks.base import Answer, Question
from fedtune.evaluation.tasks.registry import parse_bench
from fedtune.evaluation.tasks.sentiment import finance_prompt
from fedtune.evaluation.tasks.short_answer import choice_prompt, plain_prompt

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the published runs are not at hand")

# Without lone surrogates, which no tokenizer returns and pandas refuses.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


array_text, lines_text = mmlu.TASK.generations_text, fiqa.TASK.generations_text


def answer(prompt: str, gold: str, output: str, subset: str | None = None) -> Answer:
    return Answer(Question("x", prompt, gold, subset), output)


def choices(*pairs: tuple[str, str], instruction: str = mmlu.INSTRUCTION, subset: str | None = None) -> list[Answer]:
    options = ["x", "y", "z", "w"]
    return [
        answer(choice_prompt(instruction, f"Number {n}?", options), gold, output, subset)
        for n, (gold, output) in enumerate(pairs)
    ]


def test_names_and_bytes(tmp_path: Path) -> None:
    selection = parse_bench("mmlu:stem")[0]
    answers = choices(("A", "A"), ("B", "</é>"), subset="anatomy")
    written = write_artefacts(tmp_path / "benchmarks", selection, "peft_10", answers, 1 / 3)
    assert written == artefact_paths(tmp_path / "benchmarks", selection, "peft_10")
    assert written.accuracy.name == "acc_mmlu_stem_peft_10.txt"
    assert written.generations.name == "generation_mmlu_stem_peft_10.jsonl"
    assert written.accuracy.read_bytes() == b"Accuracy: 0.3333333333333333. "
    prompt = (
        r"Answer the following multiple choice question.\nQuestion: Number 0?\n\n"
        r"Options:\nA. x\nB. y\nC. z\nD. w\nThe answer is:\n"
    )
    assert written.generations.read_text(encoding="ascii") == (
        f'[{{"prompt":"{prompt}","gold":"A","subset":"anatomy","output":"A"}},'
        f'{{"prompt":"{prompt.replace("0", "1")}","gold":"B","subset":"anatomy","output":"<\\/\\u00e9>"}}]'
    )
    assert set(written.accuracy.parent.iterdir()) == {written.accuracy, written.generations}
    assert artefact_paths(tmp_path, parse_bench("medqa")[0], "x").accuracy.name == "acc_medqa_x.txt"


@pytest.mark.parametrize("run", ["", "a/b", "a/"])
def test_a_run_that_is_not_a_file_name_is_refused(tmp_path: Path, run: str) -> None:
    with pytest.raises(UsageError, match="file name"):
        artefact_paths(tmp_path, parse_bench("medqa")[0], run)


@pytest.mark.parametrize(("k", "n", "text"), [(1, 1, "1.0"), (0, 3, "0.0"), (2549, 4183, "0.609371264642601")])
def test_accuracy_is_written_in_full(k: int, n: int, text: str) -> None:
    assert accuracy_text(k / n) == f"Accuracy: {text}. "


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_generations_are_what_pandas_writes(pairs: list[tuple[str, str]]) -> None:
    import pandas as pd

    answers = [answer(prompt, "A", output) for prompt, output in pairs]
    frame = pd.DataFrame([{"prompt": prompt, "gold": "A", "output": output} for prompt, output in pairs])
    assert array_text(answers) == frame.to_json(orient="records")
    lines = [{"context": prompt, "new_target": "neutral", "new_out": "positive"} for prompt, _ in pairs]
    answers = [answer(prompt, "neutral", f"Positive {output}") for prompt, output in pairs]
    assert lines_text(answers) == pd.DataFrame(lines).to_json(orient="records", lines=True)


def test_rescore_of_own_files(tmp_path: Path) -> None:
    answers = choices(("A", "A"), ("B", "A"), ("C", "The"), subset="anatomy")
    path = write_artefacts(tmp_path, parse_bench("mmlu:anatomy")[0], "r", answers, 1 / 3).generations
    result = rescore(path)
    assert (result.form, result.benchmark, result.answer_type) == ("array", "mmlu:anatomy", "choice")
    assert (result.score.k, result.score.n, result.score.unparsed) == (1, 3, 1)
    assert (result.published, result.agrees, result.verified) == (None, None, False)

    finance = [
        answer(finance_prompt("Up .", "tweet"), "positive", "so Positive"),
        answer(finance_prompt("x"), "neutral", "?"),
    ]
    result = rescore(write_artefacts(tmp_path, parse_bench("fiqa")[0], "r", finance, 1.0).generations)
    assert (result.form, result.benchmark, result.answer_type) == ("lines", "fiqa", "sentiment")
    assert (result.score.k, result.score.n, result.score.unparsed) == (2, 2, None)


@pytest.mark.parametrize(
    ("name", "answers", "benchmark", "answer_type"),
    [
        ("x.json", choices(("A", "A")), "mmlu or tiny", "choice"),
        ("generation_tiny_x.jsonl", choices(("A", "A")), "tiny", "choice"),
        ("x.json", choices(("A", "A"), subset="anatomy"), "mmlu:anatomy", "choice"),
        ("x.json", choices(("A", "A"), subset="taste"), "mmlu or tiny", "choice"),
        ("x.json", choices(("A", "A"), instruction=medmcqa.INSTRUCTION), "careqa or medmcqa", "choice"),
        ("generation_careqa_x.jsonl", choices(("A", "A"), instruction=careqa.INSTRUCTION), "careqa", "choice"),
        ("x.json", choices(*[("A", "A")] * 5621, instruction=careqa.INSTRUCTION), "careqa", "choice"),
        ("x.json", choices(("A", "A"), instruction="Another."), "unknown", "choice"),
        ("x.json", [answer(plain_prompt(pubmedqa.INSTRUCTION, "Is it?"), "no", "No")], "pubmedqa", "yes-no"),
    ],
)  # fmt: skip
def test_content_identifies_the_benchmark(
    tmp_path: Path, name: str, answers: list[Answer], benchmark: str, answer_type: str
) -> None:
    path = tmp_path / name
    path.write_text(array_text(answers), encoding="utf-8")
    result = rescore(path)
    assert (result.benchmark, result.answer_type) == (benchmark, answer_type)
    assert result.score.accuracy == 1.0


def test_mixed_subjects_are_their_category(tmp_path: Path) -> None:
    answers = choices(("A", "A"), subset="anatomy") + choices(("A", "A"), subset="machine_learning")
    path = tmp_path / "x.json"
    path.write_text(array_text(answers), encoding="utf-8")
    assert rescore(path).benchmark == "mmlu:stem"


def test_forms(tmp_path: Path) -> None:
    rows = json.loads(array_text(choices(("A", "A"), ("B", "C"), ("B", "C\u2028"))))
    path = tmp_path / "x.json"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert (rescore(path).form, rescore(path).score.k) == ("lines", 1)
    path.write_text(json.dumps(rows[0]), encoding="utf-8")
    assert (rescore(path).form, rescore(path).score.n) == ("lines", 1)
    for accuracy, agrees in ((1 / 3, True), (0.3333, False), (None, None)):
        path.write_text(json.dumps({"published_accuracy": accuracy, "rows": rows}, indent=1), encoding="utf-8")
        assert (rescore(path).form, rescore(path).agrees) == ("published", agrees)
    finance = {"context": finance_prompt("x"), "new_target": "neutral", "new_out": "neutral"}
    path.write_text(json.dumps([finance]), encoding="utf-8")
    assert fiqa.TASK.name in rescore(path).benchmark


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"hello", "it is not JSON"),
        (b"12", "neither an array nor objects"),
        (b"[]", "does not contain any answers"),
        (b"[1]", "row 1 is not an object"),
        (b'[{"prompt": "p", "gold": "A"}]', "row 1 has no text in 'output'"),
        (b'[{"prompt": "p", "gold": "A", "output": null}]', "row 1 has no text in 'output'"),
        (b'[{"prompt": "p", "gold": "A", "output": "", "subset": 1}]', "'subset'"),
        (b'[{"prompt": "p", "gold": "F", "output": "A"}]', "'F'"),
        (b'[{"prompt": "", "gold": "A", "output": ""}, {"prompt": "", "gold": "yes", "output": ""}]', "letters beside"),
        (b'[{"prompt": "p", "gold": "A", "out', "cut off"),
        (b'[{"prompt": "p", "gold": "A", "output": "A"}', "cut off"),
        (b'{"prompt": "p", "gold": "A", "output": "A"}\n{"prompt": "p', "last line, 2, is cut off"),
        (b'{"a": 1}\nx\n{"a": 1}', "line 2 is not JSON"),
        (b'{"published_accuracy": "1", "rows": []}', "not a number"),
        (b'{"published_accuracy": NaN, "rows": []}', "not a number"),
        (b'{"published_accuracy": 1e400, "rows": []}', "not a number"),
        (b'{"published_accuracy": 1, "rows": {}}', "not an array"),
        (b'{"published_accuracy": 1, "rows": []}', "does not contain any answers"),
        (b"[" * 100_000, "its JSON"),
        (b"[" + b"1" * 5_000 + b"]", "its JSON"),
    ],
)  # fmt: skip
def test_garbage_is_one_sentence(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        rescore(path)
    assert said in caught.value.message
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no file"):
        rescore(tmp_path / "x.json")
    with pytest.raises(UsageError, match="cannot be read"):
        rescore(tmp_path)


tmp_once = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@tmp_once
@given(st.lists(st.tuples(texts, st.sampled_from("ABCDE"), texts, texts | st.none()), min_size=1, max_size=5))
def test_written_and_read_back(tmp_path: Path, rows: list[tuple[str, str, str, str | None]]) -> None:
    answers = [answer(*row) for row in rows]
    path = tmp_path / "x.json"
    path.write_text(array_text(answers), encoding="utf-8")
    result = rescore(path)
    assert result.score.n == len(answers)
    assert result.answer_type == "choice"


@tmp_once
@given(st.data())
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    whole = array_text(choices(("A", "Aé/"), ("B", "C"), subset="anatomy")).encode()
    published = b'{"published_accuracy": 0.5, "rows": ' + whole + b"}"
    content = data.draw(st.sampled_from([whole, published]))
    path = tmp_path / "x.json"
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(UsageError, match="not a generation file"):
        rescore(path)


FIELDS = ["prompt", "gold", "output", "subset", "rows", "published_accuracy", "context", "new_target", "new_out"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from("ABCDE"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(FIELDS),
            inner,
        )
    ),
    max_leaves=12,
)


@tmp_once
@given(st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()))
def test_anything_is_scored_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with suppress(UsageError):
        assert rescore(path).score.n > 0


@needs_shared
@pytest.mark.parametrize(
    ("run", "benchmark", "unparsed"),
    [
        ("medmcqa_a", "medmcqa", 15),
        ("medqa_b", "medqa", 151),
        ("pubmedqa_a", "pubmedqa", 0),
        ("mmlu_stem_c", "mmlu:stem", 623),
        ("fpb_d", "fpb", None),
    ],
)
def test_published_runs_to_the_last_digit(run: str, benchmark: str, unparsed: int | None) -> None:
    result = rescore(SHARED / "generations" / f"{run}.json")
    assert result.score.accuracy == result.published
    assert result.agrees
    assert result.verified
    assert (result.benchmark, result.score.unparsed) == (benchmark, unparsed)


@needs_shared
def test_published_runs_in_the_leaderboards_own_form(tmp_path: Path) -> None:
    for run, form in (("mmlu_stem_c", "array"), ("fpb_d", "lines")):
        source = json.loads((SHARED / "generations" / f"{run}.json").read_text(encoding="utf-8"))
        path = tmp_path / f"{run}.jsonl"
        lines = "".join(json.dumps(row) + "\n" for row in source["rows"])
        path.write_text(json.dumps(source["rows"]) if form == "array" else lines, encoding="utf-8")
        result = rescore(path)
        assert (result.form, result.verified, result.published) == (form, True, None)
        assert result.score.accuracy == source["published_accuracy"]
