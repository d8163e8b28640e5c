"""train(config) -> TrainResult: opens the run directory, picks the engine, closes the books."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedtune.config.base import facts_of, keys_of
from fedtune.config.facts import ineligible_because, value_at
from fedtune.config.schema import BUILTIN_TINY, FedTuneConfig
from fedtune.data.folder import client_files
from fedtune.data.order import share_seen
from fedtune.data.source import local_path, resolved_revision
from fedtune.data.tokenize import check_skipped
from fedtune.errors import MissingError, Problem, UsageError
from fedtune.federation.account import ACCOUNT_OF_RUN, AccountBook
from fedtune.federation.engines.base import engine_named, without_data_set
from fedtune.federation.events import DataReady, Event, Listener, RunOpened, listening, tell
from fedtune.federation.workspace import workspace_of
from fedtune.models.hub import base_files, resolve_base
from fedtune.runs.atomic import drop_torn_line, read_json_lines, write_json
from fedtune.runs.directory import RUNS, RunDirectory, create_run, expanded
from fedtune.runs.inputs import Inputs, fingerprints, read_inputs, write_inputs
from fedtune.runs.log import RunLog, run_log
from fedtune.runs.report import write_report
from fedtune.training.local import check_trainable

logger = logging.getLogger(__name__)

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
    with run_log() as log:
        try:
            return _train(config, out, resume, origins or {}, listener, log)
        except Exception:
            logger.debug("The run ended with an error.", exc_info=True)
            raise


def _train(
    config: FedTuneConfig,
    out: Path,
    resume: RunDirectory | None,
    origins: Mapping[str, str],
    listener: Listener | None,
    log: RunLog,
) -> TrainResult:
    started = time.monotonic()
    # Data owners' runs are nobody else's business; who wants Flower's telemetry sets this to 1.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    engine = engine_named(config.federation.engine)
    if not engine.is_local:
        config = without_data_set(config)
    config = with_absolute_paths(config)
    inputs = inputs_of(config)
    is_moved = resume is not None and _check_same(resume, config, inputs)
    if engine.is_local and config.data.source is None:
        raise UsageError("data.source is not set.", hint="Name your data: --data FILE, or take a --challenge.")
    engine.check(config)
    with engine.prepare(config):
        # Data first: a wrong path or an unreachable hub shows before a run directory is made or a model loaded.
        place = _Here(config, inputs) if engine.is_local else _Elsewhere(config)
        run = resume or create_run(out, config)
        with run.lock(), listening(place.heard(listener)):
            log.write_to(run.log_file)
            logger.info("fedtune %s %s the run.", version("fedtune"), "starts" if resume is None else "resumes")
            if resume is not None:
                _check_files(run)
            else:
                write_inputs(run.inputs_file, inputs)
            if config.privacy.mode == "local" and engine.is_local:
                _check_accounts(run, config.federation.clients, engine.rounds_done(run), new=resume is None)
            if resume is None or is_moved or place.pinned != run.read_config():
                write_json(run.config_file, place.pinned.model_dump(mode="json"))
            tell(RunOpened(run.path, engine.rounds_done(run)))
            place.tell_data()
            _write_about(run, config, origins, place.device, place.base_weights)
            try:
                engine.run(place.config, run)
            except BaseException:
                with suppress(Exception):  # the error that is on its way says more
                    _write_report(run)
                raise
            _write_report(run)
            return _result(config, run, place.sizes, time.monotonic() - started)


class _Here:
    """Data and base model, where they lie on this machine."""

    def __init__(self, config: FedTuneConfig, inputs: Inputs) -> None:
        self.config = config
        self._workspace = workspace_of(config.model_dump_json())
        if self._workspace.inputs not in (None, inputs):  # a file was changed since this process read it
            workspace_of.cache_clear()
            self._workspace = workspace_of(config.model_dump_json())
        self._workspace.inputs = inputs
        self._table = self._workspace.partitions.table()
        base = self._workspace.base
        check_trainable(self._workspace.adapted)
        self.device = str(base.device)
        self.base_weights: dict[str, Any] | None = {
            "quantization": config.model.quantization,
            "stored_quantized": base.stored_quantized,
            "dequantized": base.dequantized,
        }
        self.pinned = pin_revisions(config, base.revision, resolved_revision(config.data))
        self._parts = [self._workspace.rows(partition) for partition in range(config.federation.clients)]
        check_skipped(self._parts)
        self.sizes = [len(part) for part in self._parts]

    def heard(self, listener: Listener | None) -> Listener | None:
        """Return who listens to the run."""
        return listener

    def tell_data(self) -> None:
        """Tell of the data."""
        parts = self._parts
        tell(DataReady(self._table, sum(part.skipped for part in parts), sum(part.total for part in parts)))


class _Elsewhere:
    """Data and base model, where they lie with a SuperLink's nodes: what is known of them here is what the nodes tell."""

    def __init__(self, config: FedTuneConfig) -> None:
        # One commit of the base for all nodes, which are not asked to agree on what a branch means today.
        commit = None
        with suppress(MissingError):
            commit = resolve_base(config.model, only_config=True).revision
        self.config = self.pinned = pin_revisions(config, commit, None)
        self.device = f"the nodes of {config.federation.superlink}"
        self.base_weights: dict[str, Any] | None = None
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


def _is_local(config: FedTuneConfig) -> bool:
    return engine_named(config.federation.engine).is_local


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

    free = {path for path, info in keys_of(FedTuneConfig) if facts_of(info).resumable}
    old, new = saved.model_dump(mode="json"), given.model_dump(mode="json")
    paths = sorted({*leaves(old), *leaves(new)} - free)
    return [
        Problem(path, f"{table_value(old, path)!r} in the run, {table_value(new, path)!r} now")
        for path in paths
        if table_value(old, path) != table_value(new, path)
    ]


def with_absolute_paths(config: FedTuneConfig) -> FedTuneConfig:
    """Return the config with absolute paths in place of those that mean a file or folder here.

    A hub id, a builtin name and what is not there stay as they are. With the engine `superlink` the base lies on other machines.
    """
    source, base, ca = config.data.source, config.model.base, config.federation.superlink_ca
    if source and (path := local_path(config.data)) is not None and source != BUILTIN_TINY:
        source = str(_absolute(path))
    if _is_local(config) and (folder := _base_folder(config)) is not None and base != BUILTIN_TINY:
        base = str(_absolute(folder))
    if ca is not None:
        ca = str(_absolute(expanded(Path(ca))))
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"source": source}),
            "model": config.model.model_copy(update={"base": base}),
            "federation": config.federation.model_copy(update={"superlink_ca": ca}),
        }
    )


def _absolute(path: Path) -> Path:
    # A link to a file keeps its own name, whose suffix says what the file is.
    return path.resolve() if path.is_dir() else path.parent.resolve() / path.name


def _base_folder(config: FedTuneConfig) -> Path | None:
    """Return the folder of a base model that does not come from the hub, None for one that does."""
    if config.model.base == BUILTIN_TINY or expanded(Path(config.model.base)).is_dir():
        return resolve_base(config.model).folder
    return None


def inputs_of(config: FedTuneConfig) -> Inputs:
    """Return the fingerprints of the local files that a run of `config` reads.

    Raises:
        ConfigError, MissingError, UsageError: the data or the base is not there, or cannot be read.
    """
    data: list[Path] = []
    if config.data.source and (path := local_path(config.data)) is not None:
        data = client_files(path) if path.is_dir() else [path]
    folder = _base_folder(config) if _is_local(config) else None
    base = base_files(folder, with_code=config.model.trust_remote_code) if folder else []
    return Inputs(fingerprints(data), fingerprints(base))


def _check_same(run: RunDirectory, config: FedTuneConfig, inputs: Inputs) -> bool:
    """Refuse to go on with another config or other files; return whether the same files lie elsewhere now.

    Raises:
        UsageError: the config or a file's content differs.
        MissingError: a file is not there any more, or inputs.json is damaged.
    """
    saved = run.read_config()
    before = read_inputs(run.inputs_file)
    places = {path for path in _PLACES if _is_elsewhere(saved, config, path)} if before is not None else set()
    if problems := [problem for problem in differences(saved, config) if problem.path not in places]:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise UsageError(
            f"The run {run.path} cannot go on with another config:\n{lines}",
            hint=f"Leave these out (fedtune train --resume {run.path}), or start a new run.",
        )
    if before is None:
        logger.warning(
            "%s is not there, so nothing shows whether the run's data and base are the same.", run.inputs_file
        )
        return False
    if not _is_local(config):
        before = Inputs({}, {})  # data and base lie with the nodes
    if changes := before.changes(inputs):
        lines = "\n".join(f"  {change}" for change in changes)
        message = f"The run {run.path} cannot go on with other files than it was started with:\n{lines}"
        hint = "Put back the files as they were, or start a new run."
        raise MissingError(message, hint=hint) if before.missing(inputs) else UsageError(message, hint=hint)
    return bool(places)


_PLACES = ("data.source", "model.base")


def _is_elsewhere(saved: FedTuneConfig, given: FedTuneConfig, path: str) -> bool:
    """Whether a key names a local file or folder in both configs, another one each."""
    old, new = str(value_at(saved, path)), str(value_at(given, path))
    return old != new and Path(old).is_absolute() and Path(new).is_absolute()


def _check_files(run: RunDirectory) -> None:
    """Drop torn last lines of a resumed run's files; refuse a file that is damaged elsewhere, before anything is trained.

    Raises:
        UsageError: a line is damaged; the file and the line are named.
    """
    from fedtune.budget.ledger import read_ledger

    run.read_about()
    for path in (run.ledger_file, run.metrics_file):
        drop_torn_line(path)
    read_ledger(run.ledger_file)
    try:
        lines = read_json_lines(run.metrics_file)
        for number, line in enumerate(lines, 1):
            if not isinstance(line.get("status"), str) or not all(
                type(line.get(key)) is int for key in ("round", "partition")
            ):
                raise ValueError(f"line {number} of {run.metrics_file} lacks its round, partition or status")
    except ValueError as error:
        raise UsageError(f"The metrics are damaged: {error}.", hint="Restore the file from a backup.") from None


def _write_report(run: RunDirectory) -> None:
    if run.metrics_file.exists():
        write_report(run)


def _check_accounts(run: RunDirectory, clients: int, committed: int, *, new: bool) -> None:
    """Make the clients' privacy accounts of a new run; those of a resumed one are there, or the run cannot go on.

    Raises:
        MissingError: an account is gone or damaged, or holds fewer releases than the run has accepted.
    """
    lines = read_json_lines(run.metrics_file)
    accepted = {(line["partition"], line["round"]) for line in lines if line["status"] == "ok"}
    released = Counter(partition for partition, number in accepted if number <= committed)
    for partition in range(clients):
        book = AccountBook(run.client_state(partition))
        if new:
            book.open()
        else:
            account = book.account(ACCOUNT_OF_RUN)
            if account is None or len(account.releases) < released[partition]:
                raise MissingError(
                    f"{book.file} holds fewer releases than the {released[partition]} that the run has accepted of client "
                    f"{partition}.",
                    hint="Restore the run directory from a backup, or start a new run.",
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
    if not of_round or any("train_loss" not in line for line in of_round):
        return None
    weights = sum(line["num_examples"] for line in of_round)
    return sum(line["train_loss"] * line["num_examples"] for line in of_round) / weights
