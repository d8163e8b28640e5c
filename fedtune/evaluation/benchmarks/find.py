"""From a `--bench` text to benchmarks; they are found in this folder, not listed."""

from __future__ import annotations

import difflib
import pkgutil
from functools import cache
from importlib import import_module

import fedtune.evaluation.benchmarks as folder
from fedtune.config.facts import load_preset, preset_names
from fedtune.errors import UsageError
from fedtune.evaluation.benchmarks.base import Benchmark, Selection


@cache
def benchmarks() -> dict[str, Benchmark]:
    """Return every benchmark by name: each module of this folder that has a `BENCHMARK`."""
    modules = (import_module(f"{folder.__name__}.{info.name}") for info in pkgutil.iter_modules(folder.__path__))
    found = [module.BENCHMARK for module in modules if hasattr(module, "BENCHMARK")]
    return {benchmark.name: benchmark for benchmark in found}


def parse_bench(text: str) -> tuple[Selection, ...]:
    """Return what `--bench` names, in the leaderboard's order.

    Args:
        text: A benchmark (`medmcqa`), one category or subject of it (`mmlu:stem`, `mmlu:anatomy`), a challenge (its
            ranked benchmarks), or several of these with commas. `mmlu` alone is its three ranked categories.

    Raises:
        UsageError: there is no such benchmark, or it is one of the code challenge's.
    """
    chosen = {selection.name: selection for part in text.split(",") for selection in _parse_one(part.strip())}
    return tuple(chosen.values())


def bench_names() -> list[str]:
    """Return everything that `parse_bench` reads as one name, challenges included."""
    names = [name for challenge in preset_names("challenge") if _is_supported(challenge) for name in [challenge]]
    for name, benchmark in benchmarks().items():
        names += [name, *(f"{name}:{part}" for part in (*benchmark.categories, *benchmark.parts) if part)]
    return list(dict.fromkeys(names))


def _parse_one(text: str) -> list[Selection]:
    name, _, category = text.partition(":")
    benchmark = benchmarks().get(name)
    if benchmark is not None:
        if not category and not text.endswith(":"):
            ranked = [Selection(benchmark, benchmark.categories[each], each) for each in benchmark.ranked]
            return ranked or [Selection(benchmark)]
        if category in benchmark.categories:
            return [Selection(benchmark, benchmark.categories[category], category)]
        if category and category in benchmark.parts:
            return [Selection(benchmark, (category,), category)]
    elif text in preset_names("challenge") and _is_supported(text):
        return [each for bench in load_preset("challenge", text).benchmarks for each in _parse_one(bench)]
    generated_code = load_preset("challenge", "code").benchmarks
    if text == "code" or text in generated_code:
        raise UsageError(
            f"--bench {text}: the code challenge's benchmarks ({', '.join(generated_code)}) run generated code, "
            "which fedtune does not do.",
            hint="Score them with the leaderboard's own scripts.",
        )
    names = bench_names()
    near = difflib.get_close_matches(text, names, n=1)
    raise UsageError(
        f"--bench {text!r}: there is no such benchmark.",
        hint=f"Did you mean --bench {near[0]}?"
        if near
        else f"There are {', '.join(each for each in names if ':' not in each)}.",
    )


def _is_supported(challenge: str) -> bool:
    names = (name.partition(":")[0] for name in load_preset("challenge", challenge).benchmarks)
    return all(name in benchmarks() for name in names)
