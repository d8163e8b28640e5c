"""What an export stands on: one adapter of a run, with the scores and the bytes that belong to it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedtune.budget.ledger import Entry, read_ledger
from fedtune.config.schema import FedTuneConfig
from fedtune.errors import MissingError, UsageError
from fedtune.evaluation.results import FILE, Record, read_results
from fedtune.evaluation.tasks.registry import parse_bench
from fedtune.models.adapter import WEIGHTS_FILE, SavedAdapter, read_adapter
from fedtune.runs.directory import RUNS, RunDirectory, file_sha256, find_run


@dataclass(frozen=True)
class FinishedRun:
    """One adapter of a run; nothing in the run is changed."""

    run: RunDirectory
    config: FedTuneConfig
    """The run's config, revisions pinned."""
    round: int
    """The adapter's round, from 1."""
    rounds_done: int
    """Rounds that are committed."""

    @property
    def adapter(self) -> Path:
        """The adapter's folder."""
        return self.run.adapter_folder(self.round)

    @property
    def name(self) -> str:
        """The adapter's name: `peft_10`."""
        return self.adapter.name

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its last round."""
        return self.rounds_done >= self.config.federation.rounds

    @property
    def is_last(self) -> bool:
        """Whether this is the adapter of the run's last round, the one that counts."""
        return self.round == self.config.federation.rounds

    @cached_property
    def saved(self) -> SavedAdapter:
        """The adapter, read and checked to be LoRA in safetensors."""
        return read_adapter(self.adapter)

    @cached_property
    def adapter_sha256(self) -> str:
        """The sha256 of the adapter's weights."""
        return file_sha256(self.adapter / WEIGHTS_FILE)

    @cached_property
    def entries(self) -> list[Entry]:
        """The ledger up to the adapter's round, queries and lost messages included."""
        return [entry for entry in read_ledger(self.run.ledger_file) if entry.round <= self.round]

    @property
    def training_entries(self) -> list[Entry]:
        """Those that the leaderboard counts."""
        return [entry for entry in self.entries if entry.kind == "train"]

    @cached_property
    def results(self) -> list[Record]:
        """The results of this very adapter, told by the sha256 of its weights, whatever their protocol and mode."""
        return [record for record in _results(self.run) if record.get("adapter_sha256") == self.adapter_sha256]

    @property
    def complete_results(self) -> list[Record]:
        """Those on whole benchmarks by the leaderboard's protocol, one a benchmark, official mode before fast.

        On the official questions, weights and batch size only: what may stand beside the leaderboard's numbers, or, on
        benchmarks that it does not have, could.
        """
        best: dict[str, Record] = {}
        for record in self.results:
            if record["protocol"] != "flowertune" or record.get("partial") or not _as_the_leaderboard(record):
                continue
            _check_bench(self.run, record["bench"])
            held = best.get(record["bench"])
            if held is None or (record["mode"] == "official" and held["mode"] != "official"):
                best[record["bench"]] = record
        return list(best.values())

    def base_result(self, record: Record) -> Record | None:
        """Return the base's own result beside `record`: same benchmark, questions, protocol, mode and model settings."""
        keys = ("bench", "prompts_sha256", "n", "protocol", "mode", "batch_size", "model")
        return next(
            (
                other
                for other in _results(self.run)
                if other.get("adapter_sha256") is None and all(other.get(key) == record.get(key) for key in keys)
            ),
            None,
        )


def open_run(name: str | None = None, adapter: str | None = None, runs: Path = RUNS) -> FinishedRun:
    """Return an adapter of a run, its last one unless another is named.

    Args:
        name: The run: a path, a name under `runs`, or None for the latest.
        adapter: `peft_10` or `10`.
        runs: The folder of run directories.

    Raises:
        MissingError: there is no such run or adapter, or the run has none yet; what makes it is named.
        UsageError: `adapter` is no adapter's name, or the run's config is damaged.
    """
    run = find_run(name, runs)
    config = run.read_config()
    kept = run.adapters()
    if not kept:
        raise MissingError(
            f"The run {run.path} has no adapter yet.", hint=f"Go on with it: fedtune train --resume {run.path}"
        )
    number = kept[-1]
    if adapter is not None:
        match = re.fullmatch(r"(?:peft_)?(\d{1,9})", adapter.rstrip("/").rpartition("/")[2])
        if match is None:
            raise UsageError(f"{adapter!r} is no adapter of a run.", hint=f"Example: --peft peft_{kept[-1]}")
        number = int(match[1])
    if number not in kept:
        there = ", ".join(f"peft_{each}" for each in kept)
        raise MissingError(f"The run {run.path} has no peft_{number}.", hint=f"It has {there}.")
    finished = FinishedRun(run, config, number, run.committed_rounds())
    if finished.adapter.is_symlink():
        raise UsageError(f"{finished.adapter} is a link, and does not leave the run.", hint="Put the folder there.")
    _ = finished.saved  # a damaged adapter shows now, not in the middle of an upload
    return finished


def _results(run: RunDirectory) -> list[Record]:
    return read_results(run.path / "benchmarks" / FILE)


def _check_bench(run: RunDirectory, bench: str) -> None:
    try:
        parse_bench(bench)
    except UsageError as error:
        raise MissingError(
            f"{run.path / 'benchmarks' / FILE} holds a result on {bench!r}, a benchmark that fedtune does not know.",
            hint="Update fedtune, or remove that entry from the file.",
        ) from error


def _as_the_leaderboard(record: Record) -> bool:
    """Whether a result is on the official questions, in batches of 16 on FP4 weights (protocol, section 4)."""
    model = record.get("model") or {}
    quantization = model.get("quantization") if isinstance(model, dict) else None
    return quantization == "fp4" and record.get("batch_size") == 16 and record.get("comparable") is not False
