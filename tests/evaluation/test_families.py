"""Every model family gives the same answers on the path that the probe chooses as one prompt at a time.

`pytest -m slow tests/evaluation/test_families.py` prints a table: family, benchmark, equal answers, path, and why.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.families import FAMILIES, NOT_BUILT, NOT_CAUSAL, build

from fedtune.config.schema import ModelConfig
from fedtune.errors import UsageError
from fedtune.evaluation.backends.fast import PATHS
from fedtune.evaluation.backends.probe import ONE_BY_ONE
from fedtune.evaluation.driver import evaluate
from fedtune.evaluation.results import BenchmarkResult
from fedtune.evaluation.settings import EvalSettings
from fedtune.evaluation.subjects import BASE, Subject
from fedtune.evaluation.tasks.registry import parse_bench
from fedtune.evaluation.tasks.sentiment import SentimentTask

SHARED, OWN_MASKS, RIGHT, LEFT, EQUAL = (path.name for path in PATHS)

QUICK = {
    "llama": (SHARED, SHARED),
    "gemma3_text": (LEFT, SHARED),
    "mistral": (LEFT, SHARED),
    "gemma2": (LEFT, SHARED),
    "opt": (OWN_MASKS, OWN_MASKS),
    "bloom": (OWN_MASKS, OWN_MASKS),
    "mamba": (LEFT, RIGHT),
}
"""Families of the default tests, with their paths on FPB, whose answers are texts, and on the tiny benchmark, whose answers are
one letter: there no token follows the padding that a window or a running state could lose."""

SENTENCE = "profit rose fell sharply in the third quarter as net sales grew and the company sold its unit"


def answered(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[BenchmarkResult]:
    """Score a family's random model on a few questions of FPB and of the tiny benchmark, all of them verified."""
    words = SENTENCE.split()
    sentences = [" ".join(words[start : start + 1 + 2 * (start % 6)]) for start in range(12)]
    rows = [{"sentence": f"{text} {n}.", "label": n % 3} for n, text in enumerate(sentences)]
    (folder / "fpb.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = replace(SentimentTask.padded_batches, max_length=105)
    monkeypatch.setattr(SentimentTask, "padded_batches", short)  # a model that never stops writes up to 512 tokens
    settings = EvalSettings(
        model=ModelConfig(base=str(build(family, folder)), quantization="none", compute_dtype="fp32"),
        subjects=(Subject(BASE),),
        selections=parse_bench("fpb"),
        out=folder / "out",
        data_dir=folder,
        verify=12,
    )
    (long,) = evaluate(settings).results
    (short,) = evaluate(
        EvalSettings(
            settings.model, settings.subjects, parse_bench("tiny"), folder / "out", data_dir=None, limit=16, verify=16
        )
    ).results
    return [long, short]


@pytest.mark.parametrize("family", QUICK)
def test_a_family_answers_as_one_by_one(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = answered(family, tmp_path, monkeypatch)
    for result in results:
        assert result.agreement is not None
        assert result.agreement.equal == result.agreement.asked >= 12
        assert result.answer_path_reason
    assert tuple(result.answer_path for result in results) == QUICK[family]


def test_a_model_with_random_answers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reformer's attention hashes tokens into buckets with random directions, also in evaluation."""
    with pytest.raises(UsageError, match="reformer model computes other logits each time"):
        answered("reformer", tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in (*NOT_CAUSAL, "reformer")])
def test_all_families_answer_as_one_by_one(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = answered(family, tmp_path, monkeypatch)
    with capsys.disabled():
        for result in results:
            agreement = result.agreement
            assert agreement is not None
            equal = f"{agreement.equal}/{agreement.asked}"
            row = f"{family:20} {result.bench:5} {equal:6} {result.answer_path:40} {result.answer_path_reason}"
            sys.stdout.write(f"\n{row}")
    for result in results:
        assert result.agreement is not None
        assert result.agreement.holds
        assert result.answer_path in {*(path.name for path in PATHS), ONE_BY_ONE}


@pytest.mark.slow
def test_families_that_are_not_tried_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert len([name for name in FAMILIES if name not in NOT_CAUSAL]) >= 60
    with capsys.disabled():
        sys.stdout.write(f"\nnot causal, refused when loaded: {', '.join(NOT_CAUSAL)}\n")
        for name, reason in NOT_BUILT.items():
            sys.stdout.write(f"not built: {name} ({reason})\n")
