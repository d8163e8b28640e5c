"""What a run did send, read from its ledger: by round, direction and client, beside the forecast, and why they differ.

The run may be finished, running, or dead in the middle of a round; nothing in it is changed.
"""

from __future__ import annotations

import fcntl
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedtune.budget.ledger import Direction, Entry, read_ledger
from fedtune.budget.plan import Plan, Sizes, plan, shapes_of
from fedtune.errors import FedTuneError, MissingError
from fedtune.runs.directory import RunDirectory

State = Literal["finished", "running", "stopped"]


@dataclass(frozen=True)
class Use:
    """Training messages of a round, a client or the whole run; bytes are the leaderboard's count."""

    number: int
    """The round (from 1), or the client's partition id (-1 for nodes that were not asked)."""
    down_bytes: int
    up_bytes: int
    serialised_bytes: int
    """Everything that Flower serialised, both ways."""
    forecast_bytes: int | None
    """What was forecast for the round, or for the rounds that the client was asked in; None without a forecast."""
    asked: int
    """Messages to clients, those of rounds that a crash undid not among them."""
    accepted: int
    refused: int
    """Replies that were screened out."""
    errors: int
    """Clients that reported a failure."""
    lost_bytes: int
    """Sent, and undone by a crash."""

    @property
    def bytes(self) -> int:
        """Both ways."""
        return self.down_bytes + self.up_bytes


@dataclass(frozen=True)
class Cause:
    """One reason why a run did not send what was forecast."""

    text: str
    messages: int
    bytes: int
    """What it adds to the forecast, or (below zero) takes from it."""


@dataclass(frozen=True)
class Audit:
    """A run's ledger, summed up."""

    run: Path
    state: State
    rounds_done: int
    """Rounds that are committed."""
    cap_mib: float
    """The run's own cap."""
    torn_line: bool
    """The ledger ends in the middle of a line, which is left out: the run is writing it, or died there."""
    total: Use
    rounds: tuple[Use, ...]
    clients: tuple[Use, ...]
    queries: int
    """Messages that are not training; the leaderboard does not count them."""
    query_bytes: int
    """Their serialised bytes."""
    forecast: Plan | None
    forecast_unknown_because: str
    causes: tuple[Cause, ...]
    """Their bytes add up to the difference between what was sent and what was forecast."""


def audit(run: RunDirectory) -> Audit:
    """Sum up the ledger of `run`, and compare it with the forecast for its config.

    Raises:
        UsageError, ConfigError: the config, or a line of the ledger, is damaged.
        MissingError: there is no config, or no ledger though rounds are committed.
    """
    config = run.read_config()
    done = run.committed_rounds()
    if done and not run.ledger_file.is_file():
        raise MissingError(f"{run.ledger_file} is missing, though {done} rounds of the run are committed.")
    entries = read_ledger(run.ledger_file)
    training = [entry for entry in entries if entry.kind == "train"]
    others = [entry for entry in entries if entry.kind != "train"]
    try:
        shapes = shapes_of(config)
        forecast, sizes, unknown = plan(config, shapes), Sizes(config, shapes), ""
    except FedTuneError as error:  # the totals are worth having without it
        forecast, sizes, unknown = None, None, str(error)
    state: State = "finished" if done >= config.federation.rounds else "running" if is_locked(run) else "stopped"
    return Audit(
        run=run.path,
        state=state,
        rounds_done=done,
        cap_mib=config.communication.cap_mib,
        torn_line=_is_torn(run.ledger_file),
        total=_use(0, training, forecast.total_bytes if forecast else None),
        rounds=tuple(
            _use(number, part, sizes.round(number) * (number <= config.federation.rounds) if sizes else None)
            for number, part in _by(training, "round")
        ),
        clients=tuple(
            _use(number, part, sum(sum(sizes.pair(*place)) for place in _asked(part)) if sizes else None)
            for number, part in _by(training, "node")
        ),
        queries=len(others),
        query_bytes=sum(entry.serialised_bytes for entry in others),
        forecast=forecast,
        forecast_unknown_because=unknown,
        causes=tuple(explain(training, sizes, done, state)) if sizes else (),
    )


def explain(training: Sequence[Entry], sizes: Sizes, done: int, state: State) -> list[Cause]:
    """Return why `training` messages and the forecast differ; the causes' bytes add up to the difference, whatever they are.

    Args:
        training: The ledger's training messages.
        sizes: What was forecast for every message.
        done: Committed rounds.
        state: Whether the run is finished, running, or stopped.
    """
    found: Counter[str] = Counter()
    counts: Counter[str] = Counter()

    def add(text: str, bytes_: int, messages: int = 1) -> None:
        if messages:
            found[text] += bytes_
            counts[text] += messages

    lost = [entry for entry in training if entry.status == "lost"]
    add("sent in rounds that a crash undid", sum(entry.bytes for entry in lost), len(lost))
    by_round = dict(_by([entry for entry in training if entry.status != "lost"], "round"))
    pending = "not sent yet" if state == "running" else "not sent: the run stopped"
    rounds = sizes.config.federation.rounds
    for number in sorted({*range(1, rounds + 1), *by_round}):
        entries = by_round.get(number, [])
        if number > rounds:
            add("of rounds beyond federation.rounds", sum(entry.bytes for entry in entries), len(entries))
            continue
        missing = "missing from the ledger, though the round is committed" if number <= done else pending
        down = [entry for entry in entries if entry.direction == "down"]
        asked = {entry.node for entry in down}
        pairs = sum(sum(sizes.pair(number, entry.node)) for entry in down)
        unsent = sizes.config.federation.clients_per_round - len(down)
        other = pairs - sizes.round(number)
        add(missing, other, 2 * unsent)
        if not unsent and other:
            add("to other clients, of other ranks, than the seed draws", other)
        replied: set[int] = set()
        for entry in entries:
            expected = sizes.pair(number, entry.node)[entry.direction == "up"]
            if entry.direction == "up" and (entry.node in replied or entry.node not in asked):
                add("replies that came twice or from a node that was not asked", entry.bytes)
            elif entry.status == "error":
                add("replies that are an error and carry no adapter", entry.bytes - expected)
            elif entry.status == "refused":
                add("replies that were refused: sent and counted, not averaged", entry.bytes - expected)
            elif entry.bytes != expected:
                add("of another size than forecast", entry.bytes - expected)
            if entry.direction == "up" and entry.node in asked:
                replied.add(entry.node)
        silent = Counter(entry.node for entry in down) - Counter(replied)
        unheard = sum(sizes.pair(number, node)[1] * count for node, count in silent.items())
        add("no reply from the client" if number <= done else pending, -unheard, silent.total())
    return [Cause(text, counts[text], found[text]) for text in found]


def is_locked(run: RunDirectory) -> bool:
    """Whether a process is working on the run."""
    try:
        with (run.state_folder / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _is_torn(ledger: Path) -> bool:
    data = ledger.read_bytes() if ledger.is_file() else b""
    return bool(data) and not data.endswith(b"\n")


def _by(entries: Iterable[Entry], key: Literal["round", "node"]) -> list[tuple[int, list[Entry]]]:
    parts: dict[int, list[Entry]] = {}
    for entry in entries:
        parts.setdefault(entry.round if key == "round" else entry.node, []).append(entry)
    return sorted(parts.items())


def _asked(entries: Iterable[Entry]) -> list[tuple[int, int]]:
    """Return round and client of every message to a client that no crash undid."""
    return [(each.round, each.node) for each in entries if each.direction == "down" and each.status != "lost"]


def _use(number: int, entries: Sequence[Entry], forecast: int | None) -> Use:
    def sent(direction: Direction) -> int:
        return sum(entry.bytes for entry in entries if entry.direction == direction)

    replies = Counter(entry.status for entry in entries if entry.direction == "up")
    return Use(
        number=number,
        down_bytes=sent("down"),
        up_bytes=sent("up"),
        serialised_bytes=sum(entry.serialised_bytes for entry in entries),
        forecast_bytes=forecast,
        asked=len(_asked(entries)),
        accepted=replies["ok"],
        refused=replies["refused"],
        errors=replies["error"],
        lost_bytes=sum(entry.bytes for entry in entries if entry.status == "lost"),
    )
