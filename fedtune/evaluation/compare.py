"""Scores the base and several adapters of one config on its challenge's benchmarks (`compare`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedtune.config.facts import load_preset
from fedtune.config.schema import FedTuneConfig
from fedtune.evaluation.driver import evaluate
from fedtune.evaluation.results import BenchmarkResult
from fedtune.evaluation.settings import EvalSettings
from fedtune.evaluation.subjects import BASE, Subject
from fedtune.evaluation.tasks.registry import parse_bench


def compare(config: FedTuneConfig, adapters: Mapping[str, Path], out: Path) -> list[BenchmarkResult]:
    """Score the base and `adapters` (names to folders) on every benchmark of the config's challenge.

    Args:
        config: Its base model, quantized as in training, and its challenge.
        adapters: The adapters' folders by their names in the table.
        out: Folder of the results.
    """
    benches = load_preset("challenge", config.challenge).benchmarks if config.challenge else ()
    settings = EvalSettings(
        model=config.model,
        subjects=(Subject(BASE), *(Subject(name, folder) for name, folder in adapters.items())),
        selections=tuple(selection for bench in benches for selection in parse_bench(bench)),
        out=out,
    )
    return list(evaluate(settings).results)
