"""The files of a leaderboard submission, and what a run lacks to be one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.config.facts import LEADERBOARD_CAP_MIB, ineligible_because, load_preset, preset_names, table_value
from fedtune.config.load import leaves, load_config
from fedtune.errors import FedTuneError, UsageError
from fedtune.evaluation.artefacts import artefact_paths, rescore
from fedtune.evaluation.tasks.registry import parse_bench
from fedtune.export.card import method_values, title
from fedtune.export.checkpoint import RunCheckpoint
from fedtune.export.package import hub_base, hub_data, redact
from fedtune.export.render import render, shown
from fedtune.export.submission_config import portable, to_flat

_NOT_IN_TABLES = ("challenge", "recipe")
"""Keys that the text of the README names."""


@dataclass(frozen=True)
class Readiness:
    """What a run lacks for the leaderboard."""

    missing: tuple[str, ...]
    """What the run lacks; a submission that lacks something is a draft."""
    hint: str
    """The command that makes the first of it."""
    ineligible: tuple[str, ...]
    """Why the leaderboard's rules exclude the run, complete or not."""


def readiness(checkpoint: RunCheckpoint) -> Readiness:
    """Return what this adapter lacks for the leaderboard.

    Raises:
        UsageError: the run does not belong to a challenge.
    """
    config = checkpoint.config
    if config.challenge is None:
        raise UsageError(
            f"The run {checkpoint.run.path} does not belong to a challenge, which a submission needs.",
            hint=f"Train with --challenge {', '.join(preset_names('challenge'))}; or export a folder: --to folder",
        )
    missing, hint = [], ""
    if not checkpoint.is_finished:
        missing.append(f"{checkpoint.rounds_done} of {config.federation.rounds} rounds are done")
        hint = f"Continue the run: fedtune train --resume {checkpoint.run.path}"
    elif not checkpoint.is_last:
        missing.append(f"{checkpoint.name} is not the last checkpoint, the one that counts")
        hint = f"Omit --peft, or name peft_{config.federation.rounds}; --draft exports {checkpoint.name} as a draft."
    results = checkpoint.official_results
    if benches := [bench for bench in checkpoint.challenge_benches if bench not in results]:
        missing.append(f"{checkpoint.name} has no result of --mode official on all of {', '.join(benches)}")
        command = (
            f"fedtune eval --bench {','.join(benches)} --mode official --peft {checkpoint.adapter} --base; or --draft"
        )
        if config.challenge == "code":
            command = "fedtune runs no generated code: export with --draft, and add the scores of other tools."
        hint = hint or command
    return Readiness(tuple(missing), hint, tuple(_ineligible(checkpoint)))


def _ineligible(checkpoint: RunCheckpoint) -> Iterator[str]:
    """Yield why the leaderboard's rules exclude a run, and why others could not repeat it."""
    config = checkpoint.config
    challenge = load_preset("challenge", config.challenge or "")
    if not challenge.leaderboard:
        yield f"{challenge.name} is not a challenge of the leaderboard"
        return
    yield from ineligible_because(config) or ()
    if checkpoint.used_mib > LEADERBOARD_CAP_MIB:
        yield f"{checkpoint.used_mib:,.2f} MB were sent; the rules allow {LEADERBOARD_CAP_MIB:,}"
    if hub_base(config) is None:
        yield "the base model is not on the hub, so nobody else can repeat the run"
    elif hub_data(config) is None:
        yield "the data set is not on the hub, so nobody else can repeat the run"


def readme(checkpoint: RunCheckpoint, found: Readiness) -> str:
    """Return README.md: method, results, bytes, checkpoint and changes from the baseline."""
    config = portable(checkpoint.config)
    results = checkpoint.official_results
    about = checkpoint.run.read_about()
    text = render(
        "submission_readme.md",
        checkpoint=checkpoint,
        config=checkpoint.config,
        missing=found.missing,
        ineligible=found.ineligible,
        base=config["model"]["base"],
        data=config["data"]["source"],
        results=_result_rows(checkpoint),
        benches=list(results),
        cap_mib=LEADERBOARD_CAP_MIB,
        other_adapters=[f"peft_{number}" for number in checkpoint.run.adapters() if number != checkpoint.round],
        changes=_changes(config),
        configuration=[
            (f"`{path}`", _cell(table_value(config, path)))
            for path in leaves(config)
            if path not in _NOT_IN_TABLES and table_value(config, path) is not None
        ],
        device=about.get("device", "an unknown device"),
        versions=", ".join(f"{name} {number}" for name, number in (about.get("versions") or {}).items()),
        **method_values(checkpoint),
    )
    return redact(text)


def _result_rows(checkpoint: RunCheckpoint) -> list[tuple[str, ...]]:
    """Return the rows of the table of results, the average last; empty without official results."""
    results = list(checkpoint.official_results.values())
    bases = [checkpoint.base_result(record) for record in results]
    rows = []
    for record, base in zip(results, bases, strict=True):
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
    if not rows:
        return []
    average = sum(record["k"] / record["n"] for record in results) / len(results)
    known = [base["k"] / base["n"] for base in bases if base]
    base_average = f"{sum(known) / len(known):.2%}" if len(known) == len(results) else ""
    return [*rows, ("average", "", "", f"{average:.2%}", "", base_average)]


def _changes(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the keys in which a run differs from the template of its challenge, with both values."""
    challenge = load_preset("challenge", str(config["challenge"]))
    baseline = portable(load_config(challenge=challenge.name).config)
    if challenge.leaderboard:
        baseline["data"]["reshuffle"] = False  # the template repeats one order (protocol, section 1)
    return [
        (f"`{path}`", _cell(table_value(config, path)), _cell(table_value(baseline, path)))
        for path in dict.fromkeys([*leaves(config), *leaves(baseline)])
        if path not in _NOT_IN_TABLES and table_value(config, path) != table_value(baseline, path)
    ]


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"`{'none' if value == [] else shown(value)}`".replace("\n", "⏎")


def app_files(config: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, str]:
    """Return the Flower app of a submission: pyproject.toml and a package with fedtune's server and client.

    Args:
        config: The run's config as `portable` returns it.
        about: The run's `run.json`: versions and device.
    """
    name = f"fedtune-{config['challenge']}"
    module = name.replace("-", "_")
    flat = to_flat(config)
    version = str((about.get("versions") or {}).get("fedtune", ""))
    values = {
        "name": name,
        "module": module,
        "challenge": config["challenge"],
        "requirement": f"fedtune[ray]=={version}" if re.fullmatch(r"[\w.+!-]{1,40}", version) else "fedtune[ray]",
        "free": {key: value for key, value in flat.items() if not key.startswith("static.")},
        "fixed": {key.removeprefix("static."): value for key, value in flat.items() if key.startswith("static.")},
        "gpus": 0.0 if about.get("device", "cpu") == "cpu" else 1.0,
    }
    return {
        "pyproject.toml": render("pyproject.toml", **values),
        f"{module}/__init__.py": '"""A federated fine-tuning, as fedtune ran it."""\n',
        f"{module}/server_app.py": render("server_app.py"),
        f"{module}/client_app.py": render("client_app.py"),
    }


def artefacts(checkpoint: RunCheckpoint) -> dict[str, Path]:
    """Return the accuracy and generation files of the official results under the adapter's name.

    Raises:
        MissingError: a file is missing.
        UsageError: the generations do not give the accuracy in results.json.
    """
    files: dict[str, Path] = {}
    folder = checkpoint.run.path / "benchmarks"
    for bench, record in checkpoint.official_results.items():
        selection = parse_bench(bench)[0]
        source = artefact_paths(folder, selection, str(record.get("label") or record["subject"]))
        target = artefact_paths(Path("benchmarks"), selection, checkpoint.name)
        again = f"Score again: fedtune eval --bench {bench} --mode official --peft {checkpoint.adapter}"
        try:
            scored = rescore(source.generations).score
        except FedTuneError as error:
            error.hint = again
            raise
        if (scored.k, scored.n) != (record["k"], record["n"]) or not source.accuracy.is_file():
            raise UsageError(
                f"{source.generations} and {source.accuracy.name} do not agree with results.json: {scored.k} of {scored.n} "
                f"answers are right, not {record['k']} of {record['n']}.",
                hint=again,
            )
        files |= {target.accuracy.as_posix(): source.accuracy, target.generations.as_posix(): source.generations}
    return files
