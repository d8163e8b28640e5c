"""The models that an evaluation scores: adapters with names, and their base model, found from the command line's words."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.budget.ledger import read_ledger
from fedtune.config.schema import ModelConfig
from fedtune.errors import MissingError, UsageError
from fedtune.runs.directory import RunDirectory, find_adapter
from fedtune.units import to_mib

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


BASE = "base"
"""Name of the base model without adapter in tables and file names."""


@dataclass(frozen=True)
class Subject:
    """The base model, or an adapter on it."""

    name: str
    """In tables and file names."""
    folder: Path | None = None
    """The adapter's folder; None for the base alone."""
    used_mib: float | None = None
    """Size of the training messages up to this adapter's round, where a ledger is present."""


@dataclass(frozen=True)
class Subjects:
    """The models to score, their base, and the folder of their results."""

    subjects: tuple[Subject, ...]
    model: ModelConfig
    """The base model as the evaluation loads it."""
    folder: Path
    """The default folder of the results."""


def find_subjects(
    adapters: Sequence[str], *, with_base: bool, model: str | None, quantization: str, runs: Path
) -> Subjects:
    """Find adapters and their base.

    Args:
        adapters: Paths, hub ids, or names of adapters of the latest run.
        with_base: Also score the base alone, first.
        model: The base; None for the adapters' own.
        quantization: Of the base's weights.
        runs: The folder of run directories.

    Raises:
        MissingError: an adapter does not exist, or the adapters belong to different base models.
        UsageError: neither an adapter nor a base is named.
    """
    if not adapters and not with_base:
        raise UsageError("There is nothing to score.", hint="Name an adapter, --peft peft_10, or the base, --base.")
    folders = list(dict.fromkeys(_folder(name, runs) for name in adapters))
    settings: dict[str, Any] = {"base": model} if model is not None else _common_base(folders)
    config = ModelConfig(**{**settings, "quantization": quantization})
    subjects = [Subject(BASE)] if with_base else []
    subjects += [
        Subject(name, folder, _used_mib(folder)) for name, folder in zip(_names(folders), folders, strict=True)
    ]
    owner = next((run for folder in folders if (run := _run_of(folder))), None)
    default = runs / "evaluations" / re.sub(r"[^\w.-]+", "-", config.base).strip("-")
    return Subjects(tuple(subjects), config, owner.path / "benchmarks" if owner else default)


def _folder(name: str, runs: Path) -> Path:
    try:
        return find_adapter(name, runs)
    except MissingError:
        if not _HUB_ID.fullmatch(name) or Path(name).exists():
            raise
    from fedtune.models.hub import fetch_adapter

    return fetch_adapter(name)


def _run_of(folder: Path) -> RunDirectory | None:
    """Return the run that contains an adapter; unlike a model's folder, a run's contains a run.json."""
    run = RunDirectory(folder.parent)
    return run if run.config_file.is_file() and run.about_file.is_file() else None


def _common_base(folders: Sequence[Path]) -> dict[str, Any]:
    """Return the base model of all adapters; one that names no revision gets the others'."""
    if not folders:
        raise UsageError("--base needs a base model.", hint="Name it: --model MODEL")
    found = sorted((_base_of(folder) for folder in folders), key=lambda each: each["revision"] is None)
    revisions = {each["revision"] for each in found} - {None}
    if len({each["base"] for each in found}) > 1 or len(revisions) > 1:
        names = {each["base"] + (f"@{each['revision']}" if each["revision"] else "") for each in found}
        raise MissingError(
            f"The adapters belong to different base models: {', '.join(sorted(names))}.",
            hint="Score them one by one, or name the base with --model.",
        )
    return found[0]


def _base_of(folder: Path) -> dict[str, Any]:
    """Return the base of an adapter: its run's model settings, else what its adapter_config.json names."""
    if run := _run_of(folder):
        return {**run.read_config().model.model_dump(mode="json"), "compute_dtype": "auto", "dequantize": "auto"}
    try:
        table = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = table["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = table = None
    if not base or not isinstance(base, str):
        raise MissingError(f"The adapter {folder} does not name its base model.", hint="Name it: --model MODEL")
    return {"base": base, "revision": table.get("revision")}


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the adapters' folder names, preceded by as many parent folders as make them unique."""
    paths = [_readable(folder) for folder in folders]
    names = [path[-1] for path in paths]
    for depth in range(2, max(map(len, paths), default=0) + 1):
        alike = [name for name in (*names, BASE) if (*names, BASE).count(name) > 1]
        names = ["-".join(path[-depth:]) if name in alike else name for name, path in zip(names, paths, strict=True)]
    return names


def _readable(folder: Path) -> tuple[str, ...]:
    """Return a folder's names from the top; in the hub's cache a repository's name replaces its snapshot."""
    parts = folder.absolute().parts
    if parts[-2:-1] == ("snapshots",) and parts[-3].startswith("models--"):
        return (*parts[1:-3], *parts[-3].removeprefix("models--").split("--"))
    return folder.resolve().parts[1:]


def _used_mib(folder: Path) -> float | None:
    """Return the size of the training messages, in MiB, up to an adapter of a run; None without a ledger."""
    ledger, match = folder.parent / "ledger.jsonl", re.fullmatch(r"peft_(\d+)", folder.name)
    if match is None or not ledger.is_file():
        return None
    return to_mib(sum(entry.bytes for entry in read_ledger(ledger) if entry.round <= int(match[1])))
