"""Tasks: found in their package, prompts to the byte, official facts; one is added and removed again in one file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedtune.cli.app import app
from fedtune.config.facts import load_preset
from fedtune.errors import UsageError
from fedtune.evaluation import tasks
from fedtune.evaluation.artefacts import rescore
from fedtune.evaluation.tasks import base, mmlu, pubmedqa
from fedtune.evaluation.tasks.load import load_questions
from fedtune.evaluation.tasks.registry import all_tasks, bench_names, parse_bench
from fedtune.evaluation.tasks.sentiment import finance_prompt
from fedtune.evaluation.tasks.short_answer import choice_prompt

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the published runs are not at hand")

CHOICE_ROWS = {
    "mmlu": {"input": "Which is largest", "A": "Mars", "B": "Jupiter", "C": "Venus", "D": "Earth", "target": "B"},
    "medmcqa": {"question": "Which is largest", "cop": 1}
    | dict(zip(("opa", "opb", "opc", "opd"), ("Mars", "Jupiter", "Venus", "Earth"), strict=True)),
    "careqa": {"question": "Which is largest", "cop": 2}
    | dict(zip(("op1", "op2", "op3", "op4"), ("Mars", "Jupiter", "Venus", "Earth"), strict=True)),
    "medqa": {
        "question": "Which is largest",
        "options": [{"key": k, "value": v} for k, v in zip("ABCD", ("Mars", "Jupiter", "Venus", "Earth"), strict=True)],
        "answer": "Jupiter",
    },
}  # fmt: skip
CHOICE_ROWS["tiny"] = CHOICE_ROWS["medmcqa"] | {"subject": "size"}


@pytest.mark.parametrize("name", CHOICE_ROWS)
def test_choice_prompt_to_the_byte(name: str) -> None:
    bench = all_tasks()[name]
    prompt, gold = bench.ask(CHOICE_ROWS[name])
    body = "\nQuestion: Which is largest?\n\nOptions:\nA. Mars\nB. Jupiter\nC. Venus\nD. Earth\nThe answer is:\n"
    assert prompt == bench.instruction + body
    assert gold == "B"
    assert bench.wrap(prompt) == f"<|im_start|>question\n{prompt}<|im_end|>\n<|im_start|>answer\n"


@pytest.mark.parametrize(
    ("question", "shown"), [("Why", "Why?"), ("Why?", "Why?"), ("So.", "So."), ("Why:", "Why:?"), ("Why? ", "Why? ?")]
)
def test_question_mark_is_added_unless_there_is_a_mark(question: str, shown: str) -> None:
    assert choice_prompt("I", question, ["x"]) == f"I\nQuestion: {shown}\n\nOptions:\nA. x\nThe answer is:\n"


def test_pubmedqa_prompt_has_contexts_then_question() -> None:
    prompt, gold = pubmedqa.ask({"CONTEXTS": ["One.", "Two."], "QUESTION": "Is it so?", "final_decision": "maybe"})
    assert prompt == f"{pubmedqa.INSTRUCTION}\nOne.\nTwo.\nIs it so?\nThe answer is:\n"
    assert gold == "maybe"


def test_finance_prompts_and_labels() -> None:
    ask = "What is the sentiment of this {}? Please choose an answer from {{negative/neutral/positive}}."
    news = "Instruction: " + ask.format("news") + "\nInput: Up .\nAnswer: "
    tweet = "Instruction: " + ask.format("tweet") + "\nInput: Up .\nAnswer: "
    found = all_tasks()
    golds = [found["fpb"].ask({"sentence": "Up .", "label": label}) for label in range(3)]
    assert golds == [(news, "negative"), (news, "neutral"), (news, "positive")]
    golds = [found["tfns"].ask({"text": "Up .", "label": label}) for label in range(3)]
    assert golds == [(tweet, "negative"), (tweet, "positive"), (tweet, "neutral")]
    golds = [
        found["fiqa"].ask({"sentence": "Up .", "sentiment_score": score, "format": kind})
        for score, kind in ((-0.11, "post"), (-0.1, "headline"), (0.0999, "post"), (0.1, "headline"))
    ]
    assert golds == [(tweet, "negative"), (news, "neutral"), (tweet, "neutral"), (news, "positive")]
    assert found["fpb"].wrap(news) == news


@pytest.mark.parametrize("name", sorted(all_tasks()))
def test_every_task_has_its_facts(name: str) -> None:
    bench = all_tasks()[name]
    assert Path(base.__file__).with_name(f"{name}.py").is_file()
    assert bench.instruction.endswith(".")
    assert "\n" not in bench.instruction
    assert bench.sources or bench.shipped
    assert all(source.revision is None or len(source.revision) == 40 for source in bench.sources)
    assert all(part.sha256 is None or len(part.sha256) == 64 for part in bench.parts.values())
    assert all(set(parts) <= set(bench.parts) for parts in bench.categories.values())
    assert all(not source.script or source.parquet_export for source in bench.sources)


def test_official_row_counts() -> None:
    counts = {name: parse_bench(name)[0].expected for name in ("medmcqa", "medqa", "pubmedqa", "careqa")}
    assert counts == {"medmcqa": 4183, "medqa": 1273, "pubmedqa": 500, "careqa": 5621}
    assert [parse_bench(name)[0].expected for name in ("fpb", "fiqa", "tfns")] == [1212, 304, 2388]
    assert [selection.expected for selection in parse_bench("mmlu")] == [3153, 3077, 4705]
    assert parse_bench("mmlu:other")[0].expected == 14_042 - 3153 - 3077 - 4705
    assert [len(subjects) for subjects in mmlu.TASK.categories.values()] == [19, 12, 13, 13]
    assert parse_bench("tiny")[0].expected is None


def test_bench_texts() -> None:
    assert [selection.name for selection in parse_bench("mmlu")] == [
        "mmlu:stem",
        "mmlu:social_sciences",
        "mmlu:humanities",
    ]
    assert [selection.name for selection in parse_bench("medical")] == ["pubmedqa", "medmcqa", "medqa", "careqa"]
    assert parse_bench("general-nlp") == parse_bench("mmlu")
    assert parse_bench("mmlu:anatomy")[0].parts == ("anatomy",)
    assert [selection.name for selection in parse_bench("tiny, mmlu:stem,tiny")] == ["tiny", "mmlu:stem"]


def test_every_name_can_be_parsed_and_every_ranked_benchmark_exists() -> None:
    for name in bench_names():
        assert parse_bench(name), name
    for challenge in ("general-nlp", "finance", "medical", "tiny"):
        names = list(load_preset("challenge", challenge).benchmarks)
        assert [selection.name for selection in parse_bench(challenge)] == names


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("medmqa", "--bench medmcqa"),
        ("anatomy", "--bench mmlu:anatomy"),
        ("mmlu:anatmy", "--bench mmlu:anatomy"),
        ("medqa:stem", "--bench medqa"),
        ("mmlu:", "--bench mmlu"),
        ("zzz", "The benchmarks are "),
        ("", "The benchmarks are "),
        ("code", "run generated code"),
        ("humaneval", "run generated code"),
    ],
)
def test_unknown_bench_names_the_nearest(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bench(text)
    assert said in str(caught.value)


def test_mmlu_copy_gets_the_originals_fields_and_nans() -> None:
    rows = [{"question": "Q", "subject": "x", "choices": ["None", "no", "", "none"], "answer": 3}]
    assert list(mmlu.from_copy(rows)) == [{"input": "Q", "A": "nan", "B": "no", "C": "nan", "D": "none", "target": "D"}]


def test_pubmedqa_fold_keeps_only_known_questions() -> None:
    rows = [{"question": "Invented?", "context": {"contexts": ["Text."]}, "final_decision": "yes"}]
    assert list(pubmedqa.from_copy(rows)) == []
    keys = Path(base.__file__).with_name("pubmedqa_test.txt").read_text().split()
    assert len(set(keys)) == 500


@needs_shared
@pytest.mark.parametrize(
    ("bench", "run"),
    [("medmcqa", "medmcqa_a"), ("medqa", "medqa_b"), ("pubmedqa", "pubmedqa_a"), ("mmlu:stem", "mmlu_stem_c")],
)
def test_prompts_equal_the_published_ones(bench: str, run: str) -> None:
    published = json.loads((SHARED / "generations" / f"{run}.json").read_text(encoding="utf-8"))["rows"]
    loaded = load_questions(parse_bench(bench)[0], SHARED / "benchmarks")
    ours = [(question.prompt, question.gold, question.subset) for question in loaded.questions]
    assert ours == [(row["prompt"], row["gold"], row.get("subset")) for row in published]
    assert loaded.verified
    assert loaded.comparable


@needs_shared
def test_fpb_prompts_equal_the_published_ones() -> None:
    rows = json.loads((SHARED / "generations" / "fpb_d.json").read_text(encoding="utf-8"))["rows"]
    texts = [row["context"].partition("\nInput: ")[2].removesuffix("\nAnswer: ") for row in rows]
    assert [finance_prompt(text) for text in texts] == [row["context"] for row in rows]
    pairs = [(row["context"], row["new_target"]) for row in rows]
    assert base.content_hash(pairs) == all_tasks()["fpb"].parts[""].sha256


CAPITALS = '''
"""Capitals: a benchmark whose answer is the name of a city."""

from fedtune.evaluation.tasks.base import Part, Prediction, Task, text_of


class CapitalsTask(Task):
    answer_type = "city"
    golds = frozenset(("Paris", "Rome"))

    def wrap(self, prompt):
        return prompt

    def new_tokens(self, counted):
        return [4] * len(counted.questions)

    def output(self, generated):
        return generated.strip()

    def score(self, question, output):
        return Prediction(output, bool(output), output == question.gold)

    def artefact_names(self, category, run):
        return f"capitals_{run}.txt", f"capitals_{run}.json"


TASK = CapitalsTask(
    name="capitals",
    title="Capitals",
    instruction="Name the capital.",
    fields=("country", "city"),
    ask=lambda row: (f"Name the capital.\\n{text_of(row, 'country')}: ", text_of(row, "city")),
    parts={"": Part(2)},
)
'''


def test_a_task_is_added_and_removed_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new kind of answer: found, listed, evaluated from the command line, scored again, and gone with its file."""
    folder = tmp_path / "more_tasks"
    folder.mkdir()
    (folder / "capitals.py").write_text(CAPITALS)
    (tmp_path / "capitals.jsonl").write_text(
        '{"country": "France", "city": "Paris"}\n{"country": "Italy", "city": "Rome"}\n'
    )
    with monkeypatch.context() as patched:
        patched.setattr(tasks, "__path__", [*tasks.__path__, str(folder)])
        all_tasks.cache_clear()
        assert "capitals" in bench_names()
        words = ["eval", "--bench", "capitals", "--data-dir", str(tmp_path), "--base", "--model", "builtin:tiny"]
        done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out"), "--verify", "2", "--json"])
        assert done.exit_code == 0, done.stderr
        (result,) = json.loads(done.stdout)["results"]
        assert (result["bench"], result["n"], result["partial"]) == ("capitals", 2, None)
        assert result["verified"]["equal"] == 2
        assert (tmp_path / "out" / "capitals_base_fast.txt").is_file()
        again = rescore(tmp_path / "out" / "capitals_base_fast.json")
        assert (again.benchmark, again.answer_type, again.score.k) == ("capitals", "city", result["k"])
    (folder / "capitals.py").unlink()
    sys.modules.pop("fedtune.evaluation.tasks.capitals")
    all_tasks.cache_clear()
    assert "capitals" not in bench_names()


def test_imports_are_light() -> None:
    modules = ("tasks.load", "scoring", "statistics", "artefacts", "results", "settings", "progress")
    lines = [f"import fedtune.evaluation.{module}" for module in modules]
    lines += ["import sys", "from fedtune.evaluation.tasks.registry import all_tasks", "all_tasks()"]
    heavy = "{'torch', 'transformers', 'datasets', 'pandas', 'pyarrow', 'huggingface_hub', 'httpx'}"
    lines.append(f"print({heavy} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
