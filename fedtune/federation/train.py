"""train(config) -> TrainResult: opens the run directory, picks the engine, closes the books."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedtune.config.facts import ineligible_because
from fedtune.config.schema import FedTuneConfig
from fedtune.data.order import share_seen
from fedtune.data.source import resolved_revision
from fedtune.data.tokenize import check_skipped
from fedtune.errors import MissingError, Problem, UsageError
from fedtune.federation.events import DataReady, Event, Listener, RunOpened, listening, tell
from fedtune.federation.workspace import workspace_of
from fedtune.models.hub import resolve_base
from fedtune.runs.atomic import read_json_lines, write_json
from fedtune.runs.directory import RUNS, RunDirectory, create_run
from fedtune.runs.report import write_report

_FREE_TO_CHANGE = (
    "checkpoint.save_every",
    "communication.cap_mib",
    "federation.client_cpus",
    "federation.client_gpus",
    "federation.client_timeout_s",
    "federation.engine",
    "federation.min_success",
    "federation.superlink",
    "federation.superlink_ca",
    "federation.superlink_insecure",
    "model.gradient_checkpointing",
    "privacy.epsilon",
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
    first_loss: float | None
    """Mean training loss of the first round's clients; None where clients do not tell it."""
    last_loss: float | None
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
    if config.federation.engine == "superlink":
        from fedtune.federation.engines.superlink import without_data_set

        config = without_data_set(config)
    if resume is not None:
        _check_same(resume, config)
    # Data first: a wrong path or an unreachable hub shows before a run directory is made or a model loaded.
    place = _Elsewhere(config) if config.federation.engine == "superlink" else _Here(config)
    run = resume or create_run(out, config)
    with run.lock(), listening(place.heard(listener)):
        if resume is None:
            write_json(run.config_file, place.pinned.model_dump(mode="json"))
        tell(RunOpened(run.path, place.rounds_done(run)))
        place.tell_data()
        _write_about(run, config, origins or {}, place.device, place.base_weights)
        try:
            _run_engine(place.config, run)
        finally:
            if run.metrics_file.exists():
                write_report(run)
        return _result(config, run, place.sizes, time.monotonic() - started)


class _Here:
    """Data and base model, where they lie on this machine."""

    def __init__(self, config: FedTuneConfig) -> None:
        if config.data.source is None:
            raise UsageError("data.source is not set.", hint="Name your data: --data FILE, or take a --challenge.")
        self.config = config
        self._workspace = workspace_of(config.model_dump_json())
        self._table = self._workspace.partitions.table()
        base = self._workspace.base
        self.device = str(base.device)
        self.base_weights: dict[str, Any] | None = {
            "quantization": config.model.quantization,
            "stored_quantized": base.stored_quantized,
            "dequantized": base.dequantized,
        }
        self.pinned = pin_revisions(config, base.revision, resolved_revision(config.data))
        self.sizes: list[int] = []

    def heard(self, listener: Listener | None) -> Listener | None:
        """Return who listens to the run."""
        return listener

    def rounds_done(self, run: RunDirectory) -> int:
        """Return the last committed round of a run."""
        state = run.last_state()
        return int(state.name.removeprefix("round-")) if state else 0

    def tell_data(self) -> None:
        """Tokenise the data and tell of it."""
        parts = [self._workspace.rows(partition) for partition in range(self.config.federation.clients)]
        check_skipped(parts)
        tell(DataReady(self._table, sum(part.skipped for part in parts), sum(part.total for part in parts)))
        self.sizes = [len(part) for part in parts]


class _Elsewhere:
    """Data and base model, where they lie with a SuperLink's nodes: what is known of them here is what the nodes tell."""

    def __init__(self, config: FedTuneConfig) -> None:
        from fedtune.federation.engines import superlink

        superlink.check(config.federation)
        # One commit of the base for all nodes, which are not asked to agree on what a branch means today.
        commit = None
        with suppress(MissingError):
            commit = resolve_base(config.model, only_config=True).revision
        self.config = self.pinned = pin_revisions(config, commit, None)
        self.device = f"the nodes of {config.federation.superlink}"
        self.base_weights: dict[str, Any] | None = None
        self.rounds_done = superlink.rounds_done
        self.sizes: list[int] = []

    def heard(self, listener: Listener | None) -> Listener:
        """Return who listens to the run: the listener, and this, which notes the clients' rows."""

        def hear(event: Event) -> None:
            if isinstance(event, DataReady):
                self.sizes = [row.rows for row in event.table]
            if listener is not None:
                listener(event)

        return hear

    def tell_data(self) -> None:
        """Tell nothing: the nodes are asked when the run has begun."""


def _run_engine(config: FedTuneConfig, run: RunDirectory) -> None:
    name = config.federation.engine.replace("-", "_")
    import_module(f"fedtune.federation.engines.{name}").run(config, config.model_dump_json(), run)


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


def _write_about(
    run: RunDirectory,
    config: FedTuneConfig,
    origins: Mapping[str, str],
    device: str,
    base_weights: Mapping[str, Any] | None,
) -> None:
    before = run.read_about()
    write_json(
        run.about_file,
        {
            "origins": dict(origins) or before.get("origins", {}),
            "eligible": None if (reasons := ineligible_because(config)) is None else not reasons,
            "ineligible_because": list(reasons or ()),
            "device": device,
            "base_weights": base_weights,
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
        sizes or _sizes_said(config, accepted),
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


def _sizes_said(config: FedTuneConfig, accepted: list[Mapping[str, Any]]) -> list[int]:
    """Return what the clients' replies say of their rows; clients that never replied count as having none."""
    said = {line["partition"]: line["num_examples"] for line in accepted}
    return [said.get(partition, 0) for partition in range(config.federation.clients)]


def round_loss(lines: list[Mapping[str, float]], server_round: int) -> float | None:
    """Return a round's training loss: the mean of its clients', weighted by their numbers of examples; None where untold."""
    of_round = [line for line in lines if line["round"] == server_round]
    if any("train_loss" not in line for line in of_round):
        return None
    weights = sum(line["num_examples"] for line in of_round)
    return sum(line["train_loss"] * line["num_examples"] for line in of_round) / weights
