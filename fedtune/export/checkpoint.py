"""One adapter of a run, with its scores and the bytes that it cost: what every export starts from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedtune.budget.ledger import Entry, read_ledger
from fedtune.config.facts import load_preset
from fedtune.config.schema import FedTuneConfig
from fedtune.errors import MissingError, UsageError
from fedtune.evaluation.results import FILE, Record, read_results
from fedtune.evaluation.tasks.registry import parse_bench
from fedtune.models.adapter import WEIGHTS_FILE, SavedAdapter, read_adapter
from fedtune.runs.directory import RUNS, RunDirectory, file_sha256, find_run
from fedtune.units import to_mib


@dataclass(frozen=True)
class RunCheckpoint:
    """The adapter that a run saved after one of its rounds; the run directory is only read."""

    run: RunDirectory
    config: FedTuneConfig
    """The run's config, revisions pinned."""
    round: int
    """The round after which the adapter was saved, from 1."""
    rounds_done: int
    """Number of committed rounds of the run."""

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
        """Whether the run has done all its rounds."""
        return self.rounds_done >= self.config.federation.rounds

    @property
    def is_last(self) -> bool:
        """Whether this is the adapter of the run's last round, which the leaderboard scores."""
        return self.round == self.config.federation.rounds

    @cached_property
    def saved(self) -> SavedAdapter:
        """The adapter's tensors and config, checked to be LoRA in safetensors."""
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
        """The training messages among `entries`, which the leaderboard counts."""
        return [entry for entry in self.entries if entry.kind == "train"]

    @property
    def used_mib(self) -> float:
        """Size of the training messages in both directions, in MiB (the leaderboard's "MB")."""
        return to_mib(sum(entry.bytes for entry in self.training_entries))

    @cached_property
    def results(self) -> list[Record]:
        """The results whose `adapter_sha256` is this adapter's, of every protocol and mode."""
        return [record for record in _results(self.run) if record.get("adapter_sha256") == self.adapter_sha256]

    @property
    def complete_results(self) -> list[Record]:
        """The results that may stand beside the leaderboard's numbers, one per benchmark, official mode before fast.

        They cover a whole benchmark by the leaderboard's protocol, with its questions, FP4 weights and batch size.
        """
        best: dict[str, Record] = {}
        for record in self.results:
            if record["protocol"] != "flowertune" or record.get("partial") or not _is_comparable(record):
                continue
            _check_bench(self.run, record["bench"])
            held = best.get(record["bench"])
            if held is None or (record["mode"] == "official" and held["mode"] != "official"):
                best[record["bench"]] = record
        return list(best.values())

    @property
    def official_results(self) -> dict[str, Record]:
        """The complete results in official mode by benchmark, in the order of the challenge."""
        results = {record["bench"]: record for record in self.complete_results if record["mode"] == "official"}
        return {bench: results[bench] for bench in self.challenge_benches if bench in results}

    def base_result(self, record: Record) -> Record | None:
        """Return the base model's result with the benchmark, questions, protocol, mode and model settings of `record`."""
        keys = ("bench", "prompts_sha256", "n", "protocol", "mode", "batch_size", "model")
        for other in _results(self.run):
            if other.get("adapter_sha256") is None and all(other.get(key) == record.get(key) for key in keys):
                return other
        return None

    @property
    def challenge_benches(self) -> list[str]:
        """The benchmarks that rank the run's challenge (`medmcqa`, `mmlu:stem`); empty without a challenge.

        They include benchmarks that fedtune cannot score, those of the code challenge.
        """
        if self.config.challenge is None:
            return []
        names = []
        for bench in load_preset("challenge", self.config.challenge).benchmarks:
            try:
                names += [selection.name for selection in parse_bench(bench)]
            except UsageError:
                names.append(bench)
        return names

    @property
    def missing_benches(self) -> list[str]:
        """The benchmarks of the challenge without a complete result."""
        scored = {record["bench"] for record in self.complete_results}
        return [bench for bench in self.challenge_benches if bench not in scored]

    @property
    def average_accuracy(self) -> float | None:
        """The mean accuracy on the challenge's benchmarks, which the leaderboard ranks by; None if a result is missing."""
        benches = self.challenge_benches
        if not benches or self.missing_benches:
            return None
        accuracies = {record["bench"]: record["accuracy"] for record in self.complete_results}
        return float(sum(accuracies[bench] for bench in benches) / len(benches))

    @property
    def evaluation_command(self) -> str:
        """The command that scores this adapter and its base model on the missing benchmarks."""
        return f"fedtune eval --bench {','.join(self.missing_benches) or 'NAME'} --peft {self.adapter} --base"

    @property
    def notes(self) -> tuple[str, ...]:
        """What an export of this adapter lacks, each with the command that makes it."""
        found = []
        if not self.is_finished:
            found.append(
                f"The run has done {self.rounds_done} of {self.config.federation.rounds} rounds; "
                f"continue it: fedtune train --resume {self.run.path}"
            )
        if not self.complete_results:
            found.append(f"{self.name} has no complete evaluation; run one: {self.evaluation_command}")
        elif missing := self.missing_benches:
            found.append(f"{self.name} is not evaluated on {', '.join(missing)}: {self.evaluation_command}")
        return tuple(found)


def open_run(name: str | None = None, adapter: str | None = None, runs: Path = RUNS) -> RunCheckpoint:
    """Return an adapter of a run, by default the last one.

    Args:
        name: The run: a path, a name under `runs`, or None for the latest.
        adapter: `peft_10` or `10`.
        runs: The folder of run directories.

    Raises:
        MissingError: there is no such run or adapter, or the run has not saved one yet; the hint is how to make it.
        UsageError: `adapter` is not the name of an adapter, or the run's config is damaged.
    """
    run = find_run(name, runs)
    config = run.read_config()
    kept = run.adapters()
    if not kept:
        raise MissingError(
            f"The run {run.path} has no adapter yet.", hint=f"Continue it: fedtune train --resume {run.path}"
        )
    number = kept[-1]
    if adapter is not None:
        match = re.fullmatch(r"(?:peft_)?(\d{1,9})", adapter.rstrip("/").rpartition("/")[2])
        if match is None:
            raise UsageError(f"{adapter!r} is not an adapter of a run.", hint=f"Example: --peft peft_{kept[-1]}")
        number = int(match[1])
    if number not in kept:
        names = ", ".join(f"peft_{each}" for each in kept)
        raise MissingError(f"The run {run.path} has no peft_{number}.", hint=f"It has {names}.")
    checkpoint = RunCheckpoint(run, config, number, run.committed_rounds())
    if checkpoint.adapter.is_symlink():
        raise UsageError(
            f"{checkpoint.adapter} is a link; only folders inside the run are exported.",
            hint="Replace the link with the folder.",
        )
    _ = checkpoint.saved  # reports a damaged adapter now, not in the middle of an upload
    return checkpoint


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


def _is_comparable(record: Record) -> bool:
    """Whether a result is on the official questions, in batches of 16 on FP4 weights (protocol, section 4)."""
    model = record.get("model") or {}
    quantization = model.get("quantization") if isinstance(model, dict) else None
    return quantization == "fp4" and record.get("batch_size") == 16 and record.get("comparable") is not False
