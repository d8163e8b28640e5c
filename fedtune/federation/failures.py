"""Which clients have failed, in which way and round, so that a run does not train on without them unnoticed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any


class FailureHistory:
    """The failures of the committed rounds; a client that gave no answer at all is absent and has not failed."""

    def __init__(self, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        """Read the history from the lines of a run's metrics.jsonl."""
        self._rounds: dict[tuple[int, str], int] = {}
        """First round in which a client failed in a way."""
        lines = list(lines)
        accepted = {(line["round"], line["partition"]) for line in lines if line["status"] == "ok"}
        for line in lines:
            number, partition = line["round"], line["partition"]
            known = partition >= 0 and (number, partition) not in accepted
            if known and line["status"] != "ok" and not line.get("absent"):
                self.add(number, partition, line.get("reason", ""))

    def add(self, server_round: int, partition: int, reason: str) -> None:
        """Remember that a client failed."""
        self._rounds.setdefault((partition, kind_of(reason)), server_round)

    def before(self, server_round: int, partition: int, reason: str) -> int | None:
        """Return the round before `server_round` in which the client first failed in the same way, None where there is none."""
        earlier = self._rounds.get((partition, kind_of(reason)))
        return earlier if earlier is not None and earlier < server_round else None


def kind_of(reason: str) -> str:
    """Return a reason without its numbers: sizes, rounds and layers differ where the failure is the same."""
    return re.sub(r"[0-9]+", "#", reason)
