"""train(config) -> TrainResult: opens the run directory, picks the engine, closes the books."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from fedtune.config.facts import ineligible_because
from fedtune.config.schema import FedTuneConfig
from fedtune.data.order import share_seen
from fedtune.data.source import resolved_revision
from fedtune.data.tokenize import check_skipped
from fedtune.errors import Problem, UsageError
from fedtune.federation.events import DataReady, Listener, RunOpened, listening, tell
from fedtune.federation.workspace import workspace_of
from fedtune.runs.atomic import read_json_lines, write_json
from fedtune.runs.directory import RUNS, RunDirectory, create_run
from fedtune.runs.report import write_report

_FREE_TO_CHANGE = (
    "checkpoint.save_every",
    "communication.cap_mib",
    "federation.client_timeout_s",
    "federation.engine",
    "federation.min_success",
    "model.gradient_checkpointing",
)
"""What a resumed run may change: none of these moves a bit of the adapter."""

_PACKAGES = ("fedtune", "torch", "transformers", "peft", "bitsandbytes", "flwr", "flwr-datasets")


@dataclass(frozen=True)
class TrainResult:
    """What a finished run came to."""

    run: Path
    """The run directory."""
    adapter: Path
    """The last adapter, the one that counts."""
    rounds: int
    first_loss: float
    """Mean training loss of the first round's clients."""
    last_loss: float
    """Mean training loss of the last round's clients."""
    used_bytes: int
    """The leaderboard's count of all training messages, both ways."""
    refused: int
    """Replies that were not aggregated."""
    share_seen: float
    """Share of all clients' rows that at least one training step has seen."""
    seconds: float
    """Wall time of this call."""
    ineligible: tuple[str, ...] | None
    """Why the run cannot be submitted to the leaderboard; None when it is of no leaderboard challenge."""


def train(
    config: FedTuneConfig,
    *,
    out: Path = RUNS,
    resume: RunDirectory | None = None,
    origins: Mapping[str, str] | None = None,
    listener: Listener | None = None,
) -> TrainResult:
    """Run a federation and return what it came to.

    Args:
        config: The config; for a resumed run it must agree with the run's own in everything that matters.
        out: Folder in which the run directory is made.
        resume: The run to continue, None for a new one.
        origins: Where the config's values come from, kept beside the results.
        listener: Is told what happens (see `federation/events.py`).

    Raises:
        UsageError: the config lacks a data source, or differs from the resumed run's.
        MissingError: base model or data cannot be had.
        FederationError: too few usable replies in a round.
        CapError: the communication cap would be passed.
    """
    started = time.monotonic()
    # Data owners' runs are nobody else's business; who wants Flower's telemetry sets this to 1.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    if config.data.source is None:
        raise UsageError("data.source is not set.", hint="Name your data: --data FILE, or take a --challenge.")
    if resume is not None:
        _check_same(resume, config)
    # Data first: a wrong path or an unreachable hub shows before a run directory is made or a model loaded.
    config_json = config.model_dump_json()
    workspace = workspace_of(config_json)
    table = workspace.partitions.table()
    base = workspace.base
    pinned = pin_revisions(config, base.revision, resolved_revision(config.data))
    run = resume or create_run(out, config)
    with run.lock(), listening(listener):
        if resume is None:
            write_json(run.config_file, pinned.model_dump(mode="json"))
        state = run.last_state()
        tell(RunOpened(run.path, int(state.name.removeprefix("round-")) if state else 0))
        parts = [workspace.rows(partition) for partition in range(config.federation.clients)]
        check_skipped(parts)
        tell(DataReady(table, sum(part.skipped for part in parts), sum(part.total for part in parts)))
        _write_about(run, config, origins or {}, str(base.device))
        try:
            _run_engine(config, config_json, run)
        finally:
            if run.metrics_file.exists():
                write_report(run)
        return _result(config, run, [len(part) for part in parts], time.monotonic() - started)


def _run_engine(config: FedTuneConfig, config_json: str, run: RunDirectory) -> None:
    name = config.federation.engine.replace("-", "_")
    import_module(f"fedtune.federation.engines.{name}").run(config, config_json, run)


def pin_revisions(config: FedTuneConfig, base: str | None, data: str | None) -> FedTuneConfig:
    """Return the config with the commits of base model and data set that were actually used."""
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"revision": base or config.model.revision}),
            "data": config.data.model_copy(update={"revision": data or config.data.revision}),
        }
    )


def differences(saved: FedTuneConfig, given: FedTuneConfig) -> list[Problem]:
    """Return where two configs differ in anything that moves a bit of the result.

    A revision that `given` leaves open is that of the run.
    """
    given = pin_revisions(
        given,
        given.model.revision or saved.model.revision,
        given.data.revision or saved.data.revision,
    )
    from fedtune.config.facts import table_value
    from fedtune.config.load import leaves

    old, new = saved.model_dump(mode="json"), given.model_dump(mode="json")
    paths = sorted({*leaves(old), *leaves(new)} - set(_FREE_TO_CHANGE))
    return [
        Problem(path, f"{table_value(old, path)!r} in the run, {table_value(new, path)!r} now")
        for path in paths
        if table_value(old, path) != table_value(new, path)
    ]


def _check_same(run: RunDirectory, config: FedTuneConfig) -> None:
    if problems := differences(run.read_config(), config):
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise UsageError(
            f"The run {run.path} cannot go on with another config:\n{lines}",
            hint=f"Leave these out (fedtune train --resume {run.path}), or start a new run.",
        )


def _write_about(run: RunDirectory, config: FedTuneConfig, origins: Mapping[str, str], device: str) -> None:
    before = run.read_about()
    write_json(
        run.about_file,
        {
            "origins": dict(origins) or before.get("origins", {}),
            "eligible": None if (reasons := ineligible_because(config)) is None else not reasons,
            "ineligible_because": list(reasons or ()),
            "device": device,
            "python": platform.python_version(),
            "versions": {name: version(name) for name in _PACKAGES},
            "started": before.get("started") or time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    )


def _result(config: FedTuneConfig, run: RunDirectory, sizes: list[int], seconds: float) -> TrainResult:
    from fedtune.budget.ledger import read_ledger

    lines = read_json_lines(run.metrics_file)
    accepted = [line for line in lines if line["status"] == "ok"]
    last = config.federation.rounds
    seen = share_seen(
        sizes,
        [(line["partition"], line["round"]) for line in accepted],
        config.training,
        seed=config.seed,
        reshuffle=config.data.reshuffle,
    )
    return TrainResult(
        run=run.path,
        adapter=run.adapter_folder(last),
        rounds=last,
        first_loss=round_loss(accepted, accepted[0]["round"]),
        last_loss=round_loss(accepted, last),
        used_bytes=sum(entry.bytes for entry in read_ledger(run.ledger_file)),
        refused=len(lines) - len(accepted),
        share_seen=seen,
        seconds=seconds,
        ineligible=ineligible_because(config),
    )


def round_loss(lines: list[Mapping[str, float]], server_round: int) -> float:
    """Return a round's training loss: the mean of its clients', weighted by their numbers of examples."""
    of_round = [line for line in lines if line["round"] == server_round]
    weights = sum(line["num_examples"] for line in of_round)
    return sum(line["train_loss"] * line["num_examples"] for line in of_round) / weights
