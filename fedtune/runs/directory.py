"""The run directory: what lies where, and the state that a run resumes from.

runs/medical-20261121-231500/
├── config.json   run.json     the resolved config; where its values came from, versions, eligibility
├── inputs.json                size and sha256 of the local data files and of the base's files
├── peft_5/ peft_10/           adapters as PEFT reads them
├── metrics.jsonl              one line per client and round
├── ledger.jsonl comm_cost.txt one line per message; the same in the leaderboard's form
├── debug.log                 warnings and tracebacks of server and clients
├── state/round-0007/          what resume needs, with manifest.json holding a sha256 for every other file
│   or state/superlink.json     where that lies on a SuperLink's machine: the run there, and how much of it has come here
└── report.html
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.config.load import load_config, read_table
from fedtune.config.schema import FedTuneConfig
from fedtune.errors import MissingError, UsageError
from fedtune.runs.atomic import drop_torn_line, remove_leftovers, write_folder, write_json
from fedtune.runs.log import LOG_NAME

logger = logging.getLogger(__name__)

RUNS = Path("runs")
"""Where runs lie unless `--out` says otherwise."""

_SUPERLINK_NUMBERS = ("run_id", "event", "rounds")

_STATE = re.compile(r"round-\d{4,}")
"""Names of committed states; a copy that somebody keeps beside them is none."""
_KEPT_STATES = 2
"""The last state and the one before it, in case the disk damages the last."""


@dataclass(frozen=True)
class RunDirectory:
    """One run's folder."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved config, as `--config` reads it."""
        return self.path / "config.json"

    @property
    def about_file(self) -> Path:
        """Origins of values, versions, eligibility, time of start."""
        return self.path / "run.json"

    @property
    def inputs_file(self) -> Path:
        """Fingerprints of the local files that the run reads."""
        return self.path / "inputs.json"

    @property
    def metrics_file(self) -> Path:
        """One JSON line per client and round."""
        return self.path / "metrics.jsonl"

    @property
    def ledger_file(self) -> Path:
        """One JSON line per message."""
        return self.path / "ledger.jsonl"

    @property
    def comm_cost_file(self) -> Path:
        """The ledger in the leaderboard's form."""
        return self.path / "comm_cost.txt"

    @property
    def report_file(self) -> Path:
        """Curves and tables for people."""
        return self.path / "report.html"

    @property
    def log_file(self) -> Path:
        """Warnings and tracebacks of server and clients."""
        return self.path / LOG_NAME

    @property
    def state_folder(self) -> Path:
        """Resume states, one folder a committed round."""
        return self.path / "state"

    def client_state(self, partition: int) -> Path:
        """The folder of what a client on this machine keeps between rounds."""
        return self.state_folder / "clients" / str(partition)

    @property
    def flower_file(self) -> Path:
        """Flower's id of a run that a plain `flwr run` has started; its clients find the run directory by it."""
        return self.state_folder / "flower.json"

    @property
    def superlink_file(self) -> Path:
        """What is known here of a run whose state lies on a SuperLink's machine."""
        return self.state_folder / "superlink.json"

    def committed_rounds(self) -> int:
        """Return the number of committed rounds, without touching the run: it may be running.

        Of a run on a SuperLink those whose results are here.
        """
        signed = [state for state in self._states() if (state / "manifest.json").is_file()]
        here = max((int(state.name.removeprefix("round-")) for state in signed), default=0)
        if not self.superlink_file.is_file():
            return here
        return max(here, int(self.read_superlink()["rounds"]))

    def read_superlink(self) -> Mapping[str, Any]:
        """Read what is known here of a run on a SuperLink's machine.

        Raises:
            MissingError: the file is damaged.
        """
        try:
            table = json.loads(self.superlink_file.read_text(encoding="utf-8"))
            if not isinstance(table["name"], str) or not all(isinstance(table[key], int) for key in _SUPERLINK_NUMBERS):
                raise TypeError
            return {**table, "rows": tuple(int(rows) for rows in table["rows"])}
        except (OSError, ValueError, TypeError, KeyError):
            raise MissingError(
                f"{self.superlink_file} is damaged, so the run is not found on the SuperLink's machine.",
                hint="Restore the file from a backup, or start a new run.",
            ) from None

    def adapter_folder(self, server_round: int) -> Path:
        """The folder of the adapter after `server_round` (from 1)."""
        return self.path / f"peft_{server_round}"

    def adapters(self) -> list[int]:
        """Rounds whose adapters are kept, ascending."""
        matches = (re.fullmatch(r"peft_(\d+)", path.name) for path in self.path.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def read_config(self) -> FedTuneConfig:
        """Read the run's config.

        Raises:
            MissingError: this is no run directory.
            UsageError: its config.json is damaged, or of another version of fedtune.
        """
        if not self.config_file.is_file():
            raise MissingError(f"{self.path} is no run directory: it has no config.json.")
        return load_config(files=[self.config_file]).config

    def read_about(self) -> Mapping[str, Any]:
        """Read what is known of the run beside its config; empty where nothing was written."""
        return read_table(self.about_file, "file") if self.about_file.is_file() else {}

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process, so that no two write to it at once.

        Raises:
            UsageError: another process holds it.
        """
        self.state_folder.mkdir(parents=True, exist_ok=True)
        with (self.state_folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(
                    f"Another process is writing to {self.path}.", hint="Wait for it, or end it."
                ) from None
            yield

    def commit_state(self, server_round: int, fill: Callable[[Path], None]) -> None:
        """Commit the state after `server_round`: `fill` writes files into a folder, the manifest follows, one rename."""

        def fill_and_sign(folder: Path) -> None:
            fill(folder)
            digests = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
            write_json(folder / "manifest.json", digests)

        write_folder(self.state_folder / f"round-{server_round:04d}", fill_and_sign)
        for old in self._states()[:-_KEPT_STATES]:
            shutil.rmtree(old, ignore_errors=True)

    def last_state(self) -> Path | None:
        """Return the newest state whose files match their manifest, None before the first commit.

        Raises:
            MissingError: there are states and all of them are damaged.
        """
        if self.state_folder.is_dir():
            remove_leftovers(self.state_folder)
        states = self._states()
        for state in reversed(states):
            if is_intact(state):
                return state
            logger.warning("The state %s is damaged (its files do not match manifest.json) and is not used.", state)
        if states:
            raise MissingError(
                f"Every state in {self.state_folder} is damaged (its files do not match manifest.json).",
                hint="Start a new run.",
            )
        return None

    def _states(self) -> list[Path]:
        return sorted(path for path in self.state_folder.glob("round-*") if _STATE.fullmatch(path.name))


def create_run(root: Path, config: FedTuneConfig) -> RunDirectory:
    """Make a new run directory under `root`, named after the challenge and the time.

    Raises:
        MissingError: `root` cannot be written to.
    """
    root = expanded(root)
    stem = f"{config.challenge or 'run'}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    for name in (stem, *(f"{stem}-{number}" for number in range(2, 1000))):
        try:
            (root / name).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise MissingError(
                f"No run directory can be made in {root}: {error.strerror}.", hint="Choose another --out."
            ) from None
        return RunDirectory(root / name)
    raise UsageError(f"{root} already holds a thousand runs named {stem}.", hint="Choose another --out.")


def expanded(path: Path) -> Path:
    """Return a path with `~` replaced by the home folder; one of a user that does not exist stays as it is."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def all_runs(root: Path = RUNS) -> list[RunDirectory]:
    """Return the runs under `root`, the latest last."""
    root = expanded(root)
    folders = [path.parent for path in root.glob("*/config.json")] if root.is_dir() else []
    return [RunDirectory(path) for path in sorted(folders, key=lambda path: (path / "config.json").stat().st_mtime_ns)]


def find_flower_run(run_id: int, root: Path = RUNS) -> Path | None:
    """Return the run directory that a plain `flwr run` with this id has made under `root`, None where there is none."""
    for file in root.glob("*/state/flower.json"):
        with contextlib.suppress(OSError, ValueError):
            if json.loads(file.read_text(encoding="utf-8")) == {"run_id": run_id}:
                return file.parents[1]
    return None


def find_run(name: str | None, root: Path = RUNS) -> RunDirectory:
    """Return the run that `name` means: a path, a name under `root`, or the latest one when `name` is None.

    Raises:
        MissingError: there is no such run.
    """
    if name is None:
        if runs := all_runs(root):
            return runs[-1]
        raise MissingError(f"There is no run in {root}.", hint="Start one: fedtune train --challenge tiny")
    for path in (expanded(Path(name)), expanded(root) / name):
        if (path / "config.json").is_file():
            return RunDirectory(path)
    latest = ", ".join(run.path.name for run in all_runs(root)[-3:])
    raise MissingError(f"There is no run {name!r}.", hint=f"The latest in {root}: {latest}." if latest else "")


def find_adapter(name: str, root: Path = RUNS) -> Path:
    """Return the adapter folder that `name` means: a path or, failing that, an adapter of the latest run that has it.

    Raises:
        MissingError: there is no such adapter; those of the latest run are named.
    """
    if (path := expanded(Path(name))).joinpath("adapter_config.json").is_file():
        return path
    runs = all_runs(root)
    for run in reversed(runs):
        if (run.path / name / "adapter_config.json").is_file():
            return run.path / name
    there = [f"peft_{number}" for number in runs[-1].adapters()] if runs else []
    hint = f"The latest run, {runs[-1].path}, has {', '.join(there)}." if there else "Train one: fedtune train"
    if path.is_dir():
        raise MissingError(f"The folder {path} has no file adapter_config.json.", hint="Name the folder that holds it.")
    raise MissingError(f"There is no adapter {name!r}.", hint=hint)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(folder: Path) -> bool:
    """Whether every file that the folder's manifest names is there with its sha256."""
    try:
        digests = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return bool(digests) and all(file_sha256(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line to a file and hand it to the operating system at once; a torn last line is dropped first.

    Raises:
        OSError: it cannot be written; names the file.
    """
    drop_torn_line(path)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error


def cut_to(path: Path, size_bytes: int) -> None:
    """Cut a file back to the size it had when the last state was committed."""
    if path.exists() and path.stat().st_size > size_bytes:
        os.truncate(path, size_bytes)
