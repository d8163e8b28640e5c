"""What happens in a run, told to whoever listens: the progress display, a test, a notebook.

The listener is a context variable, because the ServerApp and ClientApp are called by Flower with (grid, context) and
nothing else. In other processes (Ray actors, SuperNodes) nobody listens and telling costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from fedtune.data.partition import PartitionSummary
from fedtune.runs.log import Logged

_MOST_NAMED = 10
"""So many missing clients are named."""


@dataclass(frozen=True)
class RunOpened:
    """The run directory is there and the base model is about to be loaded."""

    path: Path
    resumed_after: int
    """Last committed round of a resumed run, 0 for a new one."""


@dataclass(frozen=True)
class DataReady:
    """Partitions are made and tokenised."""

    table: Sequence[PartitionSummary]
    skipped: int
    """Rows with nothing to learn from."""
    total: int


@dataclass(frozen=True)
class ClientsAwaited:
    """Some clients are not there yet."""

    absent: Sequence[int]
    clients: int
    """How many there are to be."""
    remark: str = ""
    """What else is wrong with who is there."""

    def __str__(self) -> str:
        """Return it in words, for a line of a log."""
        some = ", ".join(map(str, self.absent[:_MOST_NAMED])) + (", …" if len(self.absent) > _MOST_NAMED else "")
        here = f"{self.clients - len(self.absent)} of {self.clients} clients are there, missing {some}"
        return f"{here} ({self.remark})" if self.remark else here


@dataclass(frozen=True)
class ClientsMet:
    """Every client is there and has said how many rows it has; in partition order."""

    nodes: Sequence[int]
    """Flower's id of each client's node."""
    rows: Sequence[int]


@dataclass(frozen=True)
class RoundStarted:
    """The adapter is on its way to this round's clients."""

    round: int
    partitions: Sequence[int]
    learning_rate: float


@dataclass(frozen=True)
class StepDone:
    """One optimiser step of the client that is training."""

    partition: int
    step: int
    steps: int
    loss: float
    tokens: int
    """Tokens of this step."""
    seconds: float


@dataclass(frozen=True)
class ReplyArrived:
    """A client's reply was accepted, or its reason for being left out is known."""

    round: int
    partition: int
    status: str
    reason: str
    loss: float | None
    tokens: int
    seconds: float


@dataclass(frozen=True)
class RoundDone:
    """The round is aggregated and committed."""

    round: int
    loss: float | None
    """Mean training loss of the round's clients; None where they do not tell it."""
    learning_rate: float
    accepted: int
    asked: int
    used_bytes: int
    tokens: int
    seconds: float
    epsilon: float | None = None
    """What of the privacy budget is spent, if there is one."""


@dataclass(frozen=True)
class AdapterSaved:
    """`peft_<round>` is complete."""

    round: int
    path: Path


# `Logged` is a record of an engine's other processes; the engine logs it here, and no listener hears of it.
Event = (
    RunOpened
    | DataReady
    | ClientsAwaited
    | ClientsMet
    | RoundStarted
    | StepDone
    | ReplyArrived
    | RoundDone
    | AdapterSaved
    | Logged
)
Listener = Callable[[Event], None]

_listener: ContextVar[Listener | None] = ContextVar("fedtune-listener", default=None)


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Hand every event that is told inside the block to `listener`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(event: Event) -> None:
    """Hand `event` to the listener, if there is one."""
    if (listener := _listener.get()) is not None:
        listener(event)
