"""What commands show while they work: a live view on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from fedtune.cli.console import stderr, warn
from fedtune.config.schema import FedTuneConfig
from fedtune.federation.events import (
    AdapterSaved,
    ClientsAwaited,
    DataReady,
    Event,
    RoundDone,
    RoundStarted,
    RunOpened,
    StepDone,
)
from fedtune.units import format_seconds, to_mib

if TYPE_CHECKING:
    from fedtune.evaluation.progress import EvalProgress

_MOST_ROWS = 24
"""Rows of the partition table that fit a screen; more are summed up."""

_QUIET_S = 15.0
"""Where there is no terminal, an evaluation says how far it is at most so often."""


class TrainProgress:
    """Listens to a run and shows it."""

    def __init__(self, config: FedTuneConfig, *, quiet: bool = False) -> None:
        self.config = config
        self.quiet = quiet
        self.live = stderr.is_terminal and not quiet
        self.bar = Progress(
            TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[state]}"),
            console=stderr,
        )
        self.task = self.bar.add_task("rounds", total=config.federation.rounds, state="loading the base model …")
        self.run: Path | None = None
        self.done = 0
        self.loss = ""
        self.used = 0.0
        self.spent = ""
        self.client = ""
        self.recent: deque[tuple[int, float]] = deque(maxlen=20)
        self.round_seconds: deque[float] = deque(maxlen=10)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the live view inside the block, where there is a terminal."""
        if not self.live:
            yield
            return
        with Live(self.bar, console=stderr, refresh_per_second=8, transient=True):
            yield

    def __call__(self, event: Event) -> None:
        """Take one event."""
        match event:
            case RunOpened():
                self._opened(event)
            case DataReady():
                self._data(event)
            case ClientsAwaited():
                self.client = "waiting for clients"
                self._say(f"{event} …")
            case RoundStarted():
                self.client = f"{len(event.partitions)} clients"
            case StepDone():
                self.recent.append((event.tokens, event.seconds))
                self.client = f"client {event.partition}, step {event.step}/{event.steps}"
                self.loss = f"{event.loss:.4f}"
            case RoundDone():
                self._round(event)
            case AdapterSaved():
                self._say(f"saved {event.path}")
        if self.live:
            self.bar.update(self.task, completed=self.done, state=self._state())

    def _state(self) -> str:
        parts = [self.client]
        if self.loss:
            parts.append(f"loss {self.loss}")
        if seconds := sum(seconds for _, seconds in self.recent):
            parts.append(f"{sum(tokens for tokens, _ in self.recent) / seconds:,.0f} tokens/s")
        parts.append(f"{self.used:,.2f} of {self.config.communication.cap_mib:,.0f} MiB")
        if self.spent:
            parts.append(self.spent)
        if self.round_seconds:
            left = self.config.federation.rounds - self.done
            parts.append(f"{format_seconds(left * sum(self.round_seconds) / len(self.round_seconds))} left")
        return " · ".join(part for part in parts if part)

    def _say(self, text: str) -> None:
        if not self.quiet:
            stderr.print(text, highlight=False, markup=False, soft_wrap=True)

    def _opened(self, event: RunOpened) -> None:
        self.run = event.path
        self.done = event.resumed_after
        self._say(f"run {event.path}" + (f", going on after round {self.done}" if self.done else ""))

    def _data(self, event: DataReady) -> None:
        if self.quiet:
            return
        table = Table("client", "name", "rows", title="Partitions", title_justify="left")
        skewed = any(row.skew is not None for row in event.table)
        if skewed:
            table.add_column("skew")
            table.add_column("most frequent")
        for row in event.table[:_MOST_ROWS]:
            cells = [str(row.partition), row.name, f"{row.rows:,}"]
            if skewed and row.skew is not None:
                cells += [f"{row.skew:.2f}", f"{row.top_label} ({row.top_share:.0%})"]
            table.add_row(*cells)
        if len(event.table) > _MOST_ROWS:
            rest = event.table[_MOST_ROWS:]
            table.add_row("…", f"{len(rest)} more", f"{sum(row.rows for row in rest):,}")
        stderr.print(table)
        if event.skipped:
            warn(f"{event.skipped} of {event.total} rows have nothing to learn from and are left out")

    def _round(self, event: RoundDone) -> None:
        self.done = event.round
        self.used = to_mib(event.used_bytes)
        privacy = self.config.privacy
        if event.epsilon is not None:
            self.spent = f"epsilon {event.epsilon:.2f} of {privacy.epsilon:g} at delta {privacy.delta:g}"
        self.round_seconds.append(event.seconds)
        if not self.live:
            rate = event.tokens / event.seconds if event.seconds else 0.0
            self._say(
                f"{time.strftime('%H:%M:%S')} round {event.round}/{self.config.federation.rounds}: "
                f"{'' if event.loss is None else f'loss {event.loss:.4f}, '}{event.accepted} of {event.asked} clients, "
                f"{f'{rate:,.0f} tokens/s, ' if rate else ''}{self.used:,.2f} MiB{', ' if self.spent else ''}{self.spent}"
            )


class EvalDisplay:
    """Listens to an evaluation and shows how far it is and how well it goes."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.live = stderr.is_terminal and not quiet
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[state]}"),
            console=stderr,
        )
        self.tasks: dict[tuple[str, str], TaskID] = {}
        self.said = 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the live view inside the block, where there is a terminal."""
        if not self.live:
            yield
            return
        with self.bar:
            yield

    def __call__(self, event: EvalProgress) -> None:
        """Show one event."""
        rate = event.answered / event.seconds if event.seconds else 0.0
        left = format_seconds((event.total - event.done) / rate) if rate else "?"
        state = f"{event.right / event.done:.1%} right · {rate:,.1f} questions/s · {left} left"
        name = f"{event.subject} on {event.bench}"
        if self.live:
            key = (event.subject, event.bench)
            if key not in self.tasks:
                self.tasks[key] = self.bar.add_task(name, total=event.total, state="")
            self.bar.update(self.tasks[key], completed=event.done, state=state)
        elif not self.quiet and (event.done == event.total or time.monotonic() - self.said > _QUIET_S):
            self.said = time.monotonic()
            stderr.print(f"{name}: {event.done}/{event.total} · {state}", highlight=False, markup=False, soft_wrap=True)
