"""How far a run has come, and whether its files still are what they were when its last round was committed.

A committed state names the lengths and hashes of the ledger and the metrics, the config's values that decide the result, and
the hash of each client's newest state. A resumed run compares all of them before it trains: with other bytes it would end in
other bits or in a wrong account, without a word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.config.base import facts_of, keys_of
from fedtune.config.facts import table_value
from fedtune.config.load import leaves
from fedtune.config.schema import FedTuneConfig
from fedtune.errors import MissingError, Problem, UsageError
from fedtune.runs.directory import RunDirectory, file_sha256

_HINT = "Restore the run directory from a backup, or start a new run."


Mark = Sequence[int | str]
"""Bytes of a file from its start, and their sha256 in hex."""


@dataclass(frozen=True)
class Progress:
    """The small part of a committed state; what states of older versions lack is not compared."""

    round: int = 0
    """Rounds that are committed."""
    ledger_entries: int = 0
    metrics_bytes: int = 0
    ledger_marks: Sequence[Mark] = ()
    """Length and sha256 of the ledger, with its last line and without it."""
    metrics_marks: Sequence[Mark] = ()
    decisive: Mapping[str, Any] = field(default_factory=dict)
    """Values of the config's keys that move a bit of the result, by dotted path."""
    inputs_sha256: str = ""
    """Hash of the run's inputs.json, which names its data and base; empty where those are on data owners' nodes."""
    clients: Mapping[str, str] = field(default_factory=dict)
    """sha256 of each client's newest state, by its path inside the run directory."""


class Prefix:
    """The bytes of a file that is only appended to, as far as the last commit."""

    def __init__(self, path: Path) -> None:
        """Start at the beginning of `path`."""
        self.path = path
        self.bytes = 0
        self._digest = hashlib.sha256()
        self._before: Mark = (0, self._digest.hexdigest())

    @property
    def marks(self) -> Sequence[Mark]:
        """Length and hash so far, with the last line and without it."""
        return (self.bytes, self._digest.hexdigest()), self._before

    def grow(self, size_bytes: int | None = None) -> None:
        """Take in the file up to `size_bytes`, or to its end."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.bytes)
            data = file.read() if size_bytes is None else file.read(max(0, size_bytes - self.bytes))
        last = data.rstrip(b"\n").rfind(b"\n") + 1
        self._digest.update(data[:last])
        if data:
            self._before = (self.bytes + last, self._digest.hexdigest())
        self._digest.update(data[last:])
        self.bytes += len(data)

    def check(self, marks: Sequence[Mark], server_round: int) -> None:
        """Take in what was committed and compare it; a torn last line, which was dropped, may be missing.

        Raises:
            MissingError: the file is shorter or holds other bytes.
        """
        if not marks:
            return
        size = self.path.stat().st_size if self.path.exists() else 0
        whole, without_last = (list(mark) for mark in marks)
        known = without_last if size == without_last[0] else whole
        self.grow(int(known[0]))
        if [self.bytes, self._digest.hexdigest()] != known:
            what = "is shorter than" if size < int(known[0]) else "holds other lines than"
            raise MissingError(f"{self.path} {what} when round {server_round} was committed.", hint=_HINT)


def check_config(progress: Progress, decisive: Mapping[str, Any]) -> None:
    """Refuse a config that is not the one with which the committed rounds were trained.

    Raises:
        UsageError: each key that differs is named.
    """
    changed = [
        Problem(path, f"{value!r} in the rounds that are committed, {decisive.get(path)!r} now")
        for path, value in progress.decisive.items()
        if decisive.get(path) != value
    ]
    if changed:
        lines = "\n".join(f"  {problem}" for problem in changed)
        raise UsageError(
            f"The run's config.json or state was changed after round {progress.round}:\n{lines}", hint=_HINT
        )


def check_inputs(progress: Progress, run: RunDirectory) -> None:
    """Refuse a state that another run has committed, on other data or another base.

    Raises:
        UsageError: the state is of another run.
    """
    if progress.inputs_sha256 and inputs_sha256(run) not in ("", progress.inputs_sha256):
        raise UsageError(
            f"The state after round {progress.round} in {run.state_folder} is not of this run: its data or base differ.",
            hint=_HINT,
        )


def inputs_sha256(run: RunDirectory) -> str:
    """Return the hash of the run's inputs.json; empty where there is none."""
    return file_sha256(run.inputs_file) if run.inputs_file.is_file() else ""


def check_clients(progress: Progress, run: RunDirectory) -> None:
    """Refuse to go on where a client's state, such as its rounding errors, is missing or damaged.

    Raises:
        MissingError: the first such file is named.
    """
    for name, sha256 in progress.clients.items():
        path = run.path / name
        if not path.is_file() or file_sha256(path) != sha256:
            what = "is damaged" if path.is_file() else "is missing"
            raise MissingError(f"The client state {path} {what}, and without it the result would differ.", hint=_HINT)


def client_states(run: RunDirectory, partitions: Iterable[int], server_round: int) -> dict[str, str]:
    """Return the hash of the newest state, up to a round, of each of these clients that has one on this machine."""
    found = {}
    for partition in partitions:
        folder = run.client_state(partition)
        files = (path for path in folder.glob("round-*.safetensors") if path.stem.removeprefix("round-").isdigit())
        rounds = {int(path.stem.removeprefix("round-")): path for path in files}
        if known := [number for number in rounds if number <= server_round]:
            path = rounds[max(known)]
            found[path.relative_to(run.path).as_posix()] = file_sha256(path)
    return found


def decisive_values(config: FedTuneConfig) -> dict[str, Any]:
    """Return the values that decide a run's result; data and base are compared by their files instead."""
    table = config.model_dump(mode="json")
    free = {path for path, info in keys_of(FedTuneConfig) if facts_of(info).resumable}
    left_out = {*free, "model.base", "model.revision", "data.source", "data.revision"}
    return {path: table_value(table, path) for path in sorted({*leaves(table)} - left_out)}
