"""lm-eval behind one function: the same benchmark names on its own tasks, on the model that fedtune built.

lm-eval compares the log-likelihoods of the answers' letters under prompts of its own. The leaderboard's protocol has the model
write a letter. The two numbers are never comparable, and a result of this one says so wherever it is shown.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager, get_task_dict

from fedtune.errors import UsageError
from fedtune.evaluation.benchmarks.base import Row, Selection
from fedtune.evaluation.benchmarks.files import files_of, read_rows
from fedtune.evaluation.benchmarks.hub import require_hub
from fedtune.evaluation.benchmarks.load import QuestionSet, load_questions
from fedtune.evaluation.evaluate import (
    Asked,
    Bench,
    BenchResult,
    EvalResult,
    EvalSettings,
    Listener,
    Subject,
    check_adapters,
    finish,
    identity,
    label_of,
)
from fedtune.evaluation.results import prepare_folder
from fedtune.evaluation.scoring import Score, SubsetScore
from fedtune.evaluation.statistics import wilson
from fedtune.runs.log import silence_libraries

NOT_COMPARABLE = "log-likelihood, not comparable with the leaderboard"

_BATCH_SIZE = 16
"""Rows in a batch; recorded, because in bf16 scores move with it."""


@dataclass(frozen=True)
class HarnessTask:
    """lm-eval's task of a benchmark."""

    task: str
    """Its name; `{part}` stands for MMLU's subject."""
    file: str
    """Its YAML file below lm-eval's folder of tasks."""
    convert: Callable[[Row], Mapping[str, Any]]
    """From a row in the leaderboard's fields to one in the task's."""


def _same(row: Row) -> Mapping[str, Any]:
    return row


def _medqa(row: Row) -> Mapping[str, Any]:
    options = [option["value"] for option in row["options"]]
    endings = {f"ending{place}": option for place, option in enumerate(options)}
    return {"sent1": row["question"], **endings, "label": options.index(row["answer"])}


def _mmlu(row: Row) -> Mapping[str, Any]:
    return {"question": row["input"], "choices": [row[x] for x in "ABCD"], "answer": "ABCD".index(row["target"])}


TASKS = {
    "medmcqa": HarnessTask("medmcqa", "medmcqa/medmcqa.yaml", _same),
    "medqa": HarnessTask("medqa_4options", "medqa/medqa.yaml", _medqa),
    "pubmedqa": HarnessTask("pubmedqa", "pubmedqa/pubmedqa.yaml", _same),
    "careqa": HarnessTask("careqa_en", "careqa/careqa_en.yaml", _same),
    "mmlu": HarnessTask("mmlu_{part}", "mmlu/default/mmlu_{part}.yaml", _mmlu),
}


@silence_libraries()
def evaluate_with_harness(settings: EvalSettings, listener: Listener | None = None) -> EvalResult:
    """Score every subject on every benchmark with lm-eval, caching off (its cache does not tell adapters apart).

    Raises:
        UsageError: lm-eval has no task for a benchmark.
        MissingError: model, adapter or data cannot be had.
    """
    check_adapters(settings.subjects)
    for selection in settings.selections:
        if selection.benchmark.name not in TASKS:
            raise UsageError(
                f"lm-eval has no task for {selection.name}.", hint=f"It has them for {', '.join(sorted(TASKS))}."
            )
    bench = Bench(settings.model)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        sets = [_checked(selection, settings) for selection in settings.selections]
        prepare_folder(settings.out)
        plans = [_local_tasks(selection, settings, Path(folder)) for selection in settings.selections]
        manager = TaskManager(include_path=folder)
        for subject in settings.subjects:
            for selection, questions, names in zip(settings.selections, sets, plans, strict=True):
                results.append(_score_one(bench, settings, subject, selection, questions, names, manager))
                if listener is not None:
                    score, seconds = results[-1].score, results[-1].seconds
                    listener(Asked(subject.name, selection.name, score.n, score.n, score.k, seconds, score.n))
            bench.check_base(subject)
    return finish(settings, results)


def _checked(selection: Selection, settings: EvalSettings) -> QuestionSet | None:
    """Return the questions of local data, checked as for the leaderboard's protocol; lm-eval loads the hub's by itself."""
    return None if settings.data_dir is None else load_questions(selection, settings.data_dir)


def _local_tasks(selection: Selection, settings: EvalSettings, folder: Path) -> dict[str, str]:
    """Return lm-eval's task name for each part of a selection; for local data, tasks of ours that include lm-eval's."""
    known = TASKS[selection.benchmark.name]
    if settings.data_dir is None:
        require_hub()
        return {part: known.task.format(part=part) for part in selection.parts}
    names = {}
    for part, path in files_of(selection, settings.data_dir).items():
        name = f"fedtune_{known.task.format(part=part)}"
        data = folder / f"{name}.jsonl"
        rows = (known.convert(row) for _, row in read_rows(path))
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        task = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / known.file.format(part=part)),
            "task": name,
            "tag": None,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
            "training_split": None,
            "validation_split": None,
            "fewshot_split": None,
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
        names[part] = name
    return names


def _score_one(
    bench: Bench,
    settings: EvalSettings,
    subject: Subject,
    selection: Selection,
    questions: QuestionSet | None,
    names: Mapping[str, str],
    manager: TaskManager,
) -> BenchResult:
    base = bench.put_on(subject)
    began = time.monotonic()
    with silence_libraries():
        model = HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=_BATCH_SIZE)
        tasks = get_task_dict(list(names.values()), manager)
        found = lm_eval.evaluate(model, tasks, limit=settings.limit, bootstrap_iters=0, log_samples=True)
    seconds = time.monotonic() - began
    parts = {part: _correct(found["samples"][name]) for part, name in names.items()}
    score = _score(parts)
    everything = questions.count if questions is not None else selection.expected
    partial = questions.partial_because if questions is not None else ""
    if settings.limit is not None and (everything is None or score.n < everything):
        partial = f"--limit {settings.limit} of each task's rows"
    return BenchResult(
        subject=subject.name,
        bench=selection.name,
        label=label_of(settings, subject, protocol="lm-eval"),
        protocol="lm-eval",
        mode=settings.mode,
        score=score,
        interval=wilson(score.k, score.n),
        partial=partial,
        findings=tuple(finding.text for finding in questions.findings) if questions is not None else (),
        comparable=False,
        seconds=seconds,
        prompt_tokens=0,
        details={
            **identity(bench, subject),
            "protocol": "lm-eval",
            "comparability": NOT_COMPARABLE,
            "tasks": sorted(names.values()),
            "batch_size": _BATCH_SIZE,
            "lm_eval": version("lm_eval"),
        },
        used_mib=subject.used_mib,
        answer_path="lm-eval",
        answer_path_reason="its own batches",
    )


def _correct(samples: Iterable[Mapping[str, Any]]) -> list[bool]:
    """Return whether each document was answered rightly, in the documents' order."""
    return [sample["acc"] == 1.0 for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


def _score(parts: Mapping[str, Sequence[bool]]) -> Score:
    correct = tuple(right for part in parts.values() for right in part)
    subsets = [SubsetScore(part, len(right), sum(right), None) for part, right in parts.items() if part]
    return Score(
        n=len(correct),
        k=sum(correct),
        unparsed=None,
        unparsed_outputs=(),
        k_parsed=sum(correct),
        subsets=tuple(subsets),
        majority="",
        majority_count=0,
        correct=correct,
    )
