"""What was sent: one line per message, written as the message passes, never rewritten except to mark what a crash lost.

Bytes are counted twice: `bytes` is the leaderboard's count (arrays and keys of training messages, protocol section 3),
`serialised_bytes` is everything that Flower serialises. A message of a round that a crash undid was sent all the same:
it stays in the ledger, marked `lost`, and in every total.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from fedtune.config.facts import LEADERBOARD_CAP_MIB
from fedtune.errors import CapError, UsageError
from fedtune.runs.atomic import drop_torn_line, read_json_lines, write_text
from fedtune.runs.directory import append_line
from fedtune.units import to_mib

Direction = Literal["down", "up"]


@dataclass(frozen=True)
class Entry:
    """One message."""

    round: int
    """Round that the message belongs to, from 1; 0 before the first."""
    node: int
    """Partition id of the client."""
    direction: Direction
    """`down` to the client, `up` to the server."""
    kind: str
    """Flower's message type: `train`, or `query` for what a client says of itself."""
    bytes: int
    """The leaderboard's count: `ArrayRecord.count_bytes()`, both ways; 0 for messages without arrays."""
    serialised_bytes: int
    """Length of everything that is serialised."""
    status: Literal["ok", "error", "refused", "lost"] = "ok"
    """`error`: the client failed; `refused`: its reply was screened out; `lost`: a crash undid the round."""


class Ledger:
    """The ledger of a run: appends entries, keeps the total, and stops the run before the cap is passed."""

    def __init__(self, path: Path, cap_mib: float) -> None:
        """Open the ledger at `path`, with what is already in it, under a cap in MiB of the leaderboard's count."""
        self.path = path
        self.cap_mib = cap_mib
        drop_torn_line(path)
        self.entries = read_ledger(path)
        self.used_bytes = sum(entry.bytes for entry in self.entries)

    def reserve(self, planned_bytes: int) -> None:
        """Make sure that `planned_bytes` more stay under the cap.

        Raises:
            CapError: they would pass it; nothing was sent.
        """
        if to_mib(self.used_bytes + planned_bytes) > self.cap_mib:
            raise CapError(
                f"The next messages ({to_mib(planned_bytes):,.2f} MiB) would pass communication.cap_mib = "
                f"{self.cap_mib:g}: {to_mib(self.used_bytes):,.2f} MiB are used.",
            )

    def add(self, entry: Entry) -> None:
        """Append one message."""
        self.entries.append(entry)
        self.used_bytes += entry.bytes
        append_line(self.path, asdict(entry))

    def mark_lost(self, count: int) -> None:
        """Mark the entries behind the first `count` as lost: they were sent, and a crash undid their round."""
        self.entries[count:] = [replace(entry, status="lost") for entry in self.entries[count:]]
        write_text(self.path, "".join(json.dumps(asdict(entry)) + "\n" for entry in self.entries))


def read_ledger(path: Path) -> list[Entry]:
    """Read a ledger; a torn last line (a crash in the middle of writing it) is left out.

    Raises:
        UsageError: another line is damaged; it is named.
    """
    try:
        return [_entry(record, f"line {number} of {path}") for number, record in enumerate(read_json_lines(path), 1)]
    except ValueError as error:
        raise UsageError(f"The ledger is damaged: {error}.") from None


def _entry(record: Mapping[str, object], where: str) -> Entry:
    """Make an entry of one line's record; every value is checked, since what is wrong here is wrong in every total."""
    try:
        entry = Entry(**record)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{where} lacks a key or has one too many") from None
    for name, lowest in (("round", 0), ("node", -1), ("bytes", 0), ("serialised_bytes", 0)):
        value = getattr(entry, name)
        if type(value) is not int or value < lowest:
            raise ValueError(f"{name} is {value!r} in {where}")
    for name, words in (("direction", ("down", "up")), ("status", ("ok", "error", "refused", "lost"))):
        if getattr(entry, name) not in words:
            raise ValueError(f"{name} is {getattr(entry, name)!r} in {where}")
    return entry


def comm_cost_lines(entries: Iterable[Entry]) -> list[str]:
    """Return the ledger's training messages in the leaderboard's form, one line a direction and round.

    "MB" stands for 2**20 bytes there (protocol, section 3).
    """
    totals: dict[tuple[int, Direction], int] = {}
    for entry in entries:
        if entry.kind == "train":
            key = (entry.round, entry.direction)
            totals[key] = totals.get(key, 0) + entry.bytes
    lines, used = [], 0
    for _, count_bytes in sorted(totals.items(), key=lambda item: (item[0][0], item[0][1] == "up")):
        used += count_bytes
        lines.append(
            f"Communication budget: used {to_mib(used):.2f} MB (+{to_mib(count_bytes):.2f} MB this round)"
            f" / {LEADERBOARD_CAP_MIB:,} MB"
        )
    return lines
