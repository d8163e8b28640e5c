"""The base and several adapters of one config on its challenge's benchmarks, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedtune.config.facts import load_preset
from fedtune.config.schema import FedTuneConfig
from fedtune.evaluation.benchmarks.find import parse_bench
from fedtune.evaluation.evaluate import BASE, BenchResult, EvalSettings, Subject, evaluate


def compare(config: FedTuneConfig, adapters: Mapping[str, Path], out: Path) -> list[BenchResult]:
    """Score the base and `adapters` (names to folders) on every benchmark of the config's challenge.

    Args:
        config: Names the base model, which is held as it was in training, and the challenge.
        adapters: The adapters' folders by the names that the table shows.
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
