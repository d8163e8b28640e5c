"""Scores benchmarks with lm-eval's own tasks, on the model that fedtune loads.

lm-eval compares the log-likelihoods of the answers' letters under its own prompts. In the leaderboard's protocol the model
generates a letter. The two accuracies are never comparable, and every result of this backend states that.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager, get_task_dict

from fedtune.errors import UsageError
from fedtune.evaluation.model_slot import ModelSlot
from fedtune.evaluation.progress import EvalProgress, Listener
from fedtune.evaluation.provenance import describe
from fedtune.evaluation.results import BenchmarkResult, prepare_folder
from fedtune.evaluation.scoring import Score, SubsetScore
from fedtune.evaluation.settings import EvalSettings
from fedtune.evaluation.statistics import wilson
from fedtune.evaluation.subjects import Subject
from fedtune.evaluation.tasks.base import LmEvalTask, Selection
from fedtune.evaluation.tasks.files import files_of, read_rows
from fedtune.evaluation.tasks.hub import require_hub
from fedtune.evaluation.tasks.load import QuestionSet, load_questions
from fedtune.evaluation.tasks.registry import all_tasks
from fedtune.runs.log import silence_libraries

NOT_COMPARABLE = "log-likelihood, not comparable with the leaderboard"

_BATCH_SIZE = 16
"""Rows in a batch; results record it, because scores in bf16 depend on it."""


@contextmanager
def lm_eval_scorer(
    settings: EvalSettings, listener: Listener | None
) -> Iterator[Callable[[ModelSlot, Subject, Selection], BenchmarkResult]]:
    """Yield the function that scores one subject on one benchmark, without lm-eval's cache, which ignores adapters.

    Raises:
        UsageError: lm-eval has no task for a benchmark, or local data is not what the benchmark needs.
        MissingError: data cannot be found, or the folder of results cannot be written.
    """
    tasks = {each.name: _task_of(each) for each in settings.selections}
    with silence_libraries(), tempfile.TemporaryDirectory() as folder:
        # Local data is checked as for the leaderboard's protocol; lm-eval loads the hub's by itself.
        local = settings.data_dir is not None
        sets = {each.name: load_questions(each, settings.data_dir) if local else None for each in settings.selections}
        prepare_folder(settings.out)
        plans = {
            each.name: _local_tasks(each, tasks[each.name], settings, Path(folder)) for each in settings.selections
        }
        manager = TaskManager(include_path=folder)

        def score(slot: ModelSlot, subject: Subject, selection: Selection) -> BenchmarkResult:
            names = plans[selection.name]
            result = _score_one(slot, settings, subject, selection, sets[selection.name], names, manager)
            if listener is not None:
                n, k = result.score.n, result.score.k
                listener(EvalProgress(subject.name, selection.name, n, n, k, result.seconds, n))
            return result

        yield score


def _task_of(selection: Selection) -> LmEvalTask:
    if selection.task.lm_eval is None:
        known = sorted(name for name, task in all_tasks().items() if task.lm_eval is not None)
        raise UsageError(f"lm-eval has no task for {selection.name}.", hint=f"It has tasks for {', '.join(known)}.")
    return selection.task.lm_eval


def _local_tasks(selection: Selection, task: LmEvalTask, settings: EvalSettings, folder: Path) -> dict[str, str]:
    """Return the name of lm-eval's task for each part of a selection.

    For local data these are new tasks in `folder`, which include lm-eval's and replace their data.
    """
    if settings.data_dir is None:
        require_hub()
        return {part: task.name.format(part=part) for part in selection.parts}
    names = {}
    for part, path in files_of(selection, settings.data_dir).items():
        name = f"fedtune_{task.name.format(part=part)}"
        data = folder / f"{name}.jsonl"
        rows = (task.convert(row) for _, row in read_rows(path))
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings_of_task = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / task.file.format(part=part)),
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
        (folder / f"{name}.yaml").write_text(json.dumps(settings_of_task), encoding="utf-8")  # JSON is YAML
        names[part] = name
    return names


def _score_one(
    slot: ModelSlot,
    settings: EvalSettings,
    subject: Subject,
    selection: Selection,
    questions: QuestionSet | None,
    names: Mapping[str, str],
    manager: TaskManager,
) -> BenchmarkResult:
    base = slot.attach(subject)
    began = time.monotonic()
    model = HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=_BATCH_SIZE)
    tasks = get_task_dict(list(names.values()), manager)
    found = lm_eval.evaluate(model, tasks, limit=settings.limit, bootstrap_iters=0, log_samples=True)
    seconds = time.monotonic() - began
    score = _score({part: _correct(found["samples"][name]) for part, name in names.items()})
    total = questions.count if questions is not None else selection.expected
    partial = questions.partial_because if questions is not None else ""
    if settings.limit is not None and (total is None or score.n < total):
        partial = f"--limit {settings.limit} of each task's rows"
    return BenchmarkResult(
        subject=subject.name,
        bench=selection.name,
        label=settings.label(subject),
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
            **describe(slot.config, slot.sha256, subject.folder),
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
    """Return whether each document's answer is right, in the documents' order."""
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
