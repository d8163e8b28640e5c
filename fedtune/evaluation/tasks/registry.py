"""Finds the benchmarks in this package, and reads `--bench` texts."""

from __future__ import annotations

import difflib
import pkgutil
from functools import cache
from importlib import import_module

import fedtune.evaluation.tasks as package
from fedtune.config.facts import load_preset, preset_names
from fedtune.errors import UsageError
from fedtune.evaluation.tasks.base import Selection, Task


@cache
def all_tasks() -> dict[str, Task]:
    """Return every benchmark by name: the `TASK` of each module in this package that has one."""
    modules = (import_module(f"{package.__name__}.{info.name}") for info in pkgutil.iter_modules(package.__path__))
    found = [module.TASK for module in modules if hasattr(module, "TASK")]
    return {task.name: task for task in found}


def parse_bench(text: str) -> tuple[Selection, ...]:
    """Return the benchmarks that a `--bench` text names, in the leaderboard's order.

    Args:
        text: A benchmark (`medmcqa`), one category or subject of it (`mmlu:stem`, `mmlu:anatomy`), a challenge (its
            ranked benchmarks), or several of these with commas. `mmlu` alone means its three ranked categories.

    Raises:
        UsageError: there is no such benchmark, or it belongs to the code challenge.
    """
    chosen = {selection.name: selection for part in text.split(",") for selection in _parse_one(part.strip())}
    return tuple(chosen.values())


def bench_names() -> list[str]:
    """Return every name that `parse_bench` reads, challenges included."""
    names = [challenge for challenge in preset_names("challenge") if _is_supported(challenge)]
    for name, task in all_tasks().items():
        names += [name, *(f"{name}:{part}" for part in (*task.categories, *task.parts) if part)]
    return list(dict.fromkeys(names))


def _parse_one(text: str) -> list[Selection]:
    name, _, category = text.partition(":")
    task = all_tasks().get(name)
    if task is not None:
        if not category and not text.endswith(":"):
            ranked = [Selection(task, task.categories[each], each) for each in task.ranked]
            return ranked or [Selection(task)]
        if category in task.categories:
            return [Selection(task, task.categories[category], category)]
        if category and category in task.parts:
            return [Selection(task, (category,), category)]
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
        else f"The benchmarks are {', '.join(each for each in names if ':' not in each)}.",
    )


def _is_supported(challenge: str) -> bool:
    names = (name.partition(":")[0] for name in load_preset("challenge", challenge).benchmarks)
    return all(name in all_tasks() for name in names)
