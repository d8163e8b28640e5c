"""The README of a submission: method, results, bytes, checkpoint and changes from the baseline, all computed from the run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedtune.config.facts import LEADERBOARD_CAP_MIB, load_preset, table_value
from fedtune.config.load import leaves, load_config
from fedtune.evaluation.results import Record
from fedtune.export.card import method_text, title, used_mib
from fedtune.export.finished import FinishedRun
from fedtune.export.submission_config import portable

_SAID_ELSEWHERE = ("challenge", "recipe")


def readme(
    finished: FinishedRun, results: Mapping[str, Record], missing: Sequence[str], ineligible: Sequence[str]
) -> str:
    """Return README.md.

    Args:
        finished: The adapter and its run.
        results: Its complete results by benchmark, in the challenge's order.
        missing: What makes this a draft.
        ineligible: Why the leaderboard's rules exclude it.
    """
    table = portable(finished.config)
    base = table["model"]["base"]
    parts = [f"# {base.rpartition('/')[2]} on the {finished.config.challenge} challenge"]
    if missing:
        parts.append("> **DRAFT, not to be submitted.** Missing:\n>\n" + "\n".join(f"> - {text}" for text in missing))
    if ineligible:
        parts.append("> **Not eligible for the leaderboard.**\n>\n" + "\n".join(f"> - {text}" for text in ineligible))
    parts += [
        f"`{base}`, fine-tuned with LoRA on `{table['data']['source']}` by {finished.config.federation.clients} clients that "
        "keep their rows. Every number on this page was computed by fedtune from the run.",
        f"## Results\n\n{_results(finished, results)}",
        f"## Method\n\n{method_text(finished)}",
        f"## Communication budget\n\n{_communication(finished)}",
        f"## Checkpoints\n\n{_checkpoints(finished)}",
        f"## Changes from the baseline\n\n{_changes(table)}",
        f"## Configuration\n\n{_configuration(table)}",
        f"## Run it again\n\n{_commands(finished, results)}",
    ]
    return "\n\n".join(parts) + "\n"


def _results(finished: FinishedRun, results: Mapping[str, Record]) -> str:
    if not results:
        return "Not evaluated yet."
    bases = [finished.base_result(record) for record in results.values()]
    rows = []
    for record, base in zip(results.values(), bases, strict=True):
        unparsed = record["unparsed"]
        rows.append(
            (
                title(record),
                str(record["n"]),
                str(record["k"]),
                f"{record['k'] / record['n']:.2%}",
                "not known" if unparsed is None else f"{unparsed / record['n']:.2%}",
                f"{base['k'] / base['n']:.2%}" if base else "not scored",
            )
        )
    known = [base["k"] / base["n"] for base in bases if base]
    average = sum(record["k"] / record["n"] for record in results.values()) / len(results)
    base_average = f"{sum(known) / len(known):.2%}" if len(known) == len(results) else ""
    rows.append(("average", "", "", f"{average:.2%}", "", base_average))
    text = _table(("benchmark", "questions", "correct", f"accuracy of {finished.name}", "unparsed", "base model"), rows)
    return (
        f"{text}\n\nThe leaderboard's own evaluation: FP4 weights, float32, one prompt at a time. `unparsed` are outputs that "
        "are no answer in form; they count as wrong. `benchmarks/` has the accuracy and every generated answer."
    )


def _communication(finished: FinishedRun) -> str:
    used = used_mib(finished)
    return (
        f"{used:.2f} MB of the {LEADERBOARD_CAP_MIB:,} MB that the leaderboard allows, {used / LEADERBOARD_CAP_MIB:.2%} of them: "
        f"all training messages of {finished.round} rounds, both ways. `comm_cost.txt` has every round. The leaderboard's MB "
        "are 2^20 bytes."
    )


def _checkpoints(finished: FinishedRun) -> str:
    others = ", ".join(f"peft_{number}" for number in finished.run.adapters() if number != finished.round)
    text = (
        f"`{finished.name}/` is the adapter after round {finished.round} of {finished.config.federation.rounds}; the sha256 of "
        f"its weights is `{finished.adapter_sha256}`."
    )
    return text + (f" The run also kept {others}." if others else "")


def _changes(table: Mapping[str, Any]) -> str:
    """Return where the run differs from the challenge's template, or that it does not."""
    challenge = load_preset("challenge", str(table["challenge"]))
    baseline = portable(load_config(challenge=challenge.name).config)
    if challenge.leaderboard:
        baseline["data"]["reshuffle"] = False  # the template repeats one order (protocol, section 1)
    paths = dict.fromkeys([*leaves(table), *leaves(baseline)])
    rows = [
        (f"`{path}`", _shown(table_value(table, path)), _shown(table_value(baseline, path)))
        for path in paths
        if path not in _SAID_ELSEWHERE and table_value(table, path) != table_value(baseline, path)
    ]
    recipe = f"From the recipe {table['recipe']}.\n\n" if table["recipe"] else ""
    return recipe + (_table(("value", "this run", "baseline"), rows) if rows else "None.")


def _configuration(table: Mapping[str, Any]) -> str:
    rows = [
        (f"`{path}`", _shown(table_value(table, path)))
        for path in leaves(table)
        if path not in _SAID_ELSEWHERE and table_value(table, path) is not None
    ]
    return _table(("value", "this run"), rows) + "\n\n`pyproject.toml` has them under the leaderboard's names."


def _commands(finished: FinishedRun, results: Mapping[str, Record]) -> str:
    about = finished.run.read_about()
    versions = ", ".join(f"{name} {number}" for name, number in (about.get("versions") or {}).items())
    size = finished.config.federation.clients
    evaluation = (
        f"\n\n```\nfedtune eval --bench {','.join(results)} --mode official --peft {finished.name} --base\n```\n\nscores it."
        if results
        else ""
    )
    return (
        "In an environment with fedtune and Ray (`pip install .` here):\n\n```\nflwr run . --stream\n```\n\n"
        f"runs the federation of {size} clients with the values of `pyproject.toml`; `--run-config "
        '"num-server-rounds=1"` overrides one. Where fedtune was installed from elsewhere than a package index, set '
        "`FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1`."
        f"{evaluation}\n\nMade on {about.get('device', 'an unknown device')} with {versions or 'fedtune'}."
    )


def _shown(value: object) -> str:
    if value is None:
        return "–"
    text = (
        ", ".join(value) or "none"
        if isinstance(value, list)
        else value
        if isinstance(value, str)
        else json.dumps(value)
    )
    return f"`{text}`".replace("\n", "⏎")


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
