"""Decides which replies may be aggregated, and why the others may not.

A client is not trusted: its reply may be late, doubled, of another round, of other shapes, huge, or not finite. Such a reply is
rejected with a reason in the log; it never ends the run. Sizes are checked before anything is decoded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from flwr.app import ArrayRecord, Message

from fedtune.config.strategies.base import Shapes
from fedtune.federation.flower.compat import ErrorCode
from fedtune.federation.flower.size import serialised_bytes
from fedtune.models.adapter import AdapterTensors
from fedtune.protocol.arrays import decode
from fedtune.protocol.messages import TrainReply, WireError
from fedtune.protocol.wire_format import CODECS, wire_bytes

ARRAYS, METRICS, CONFIG = "arrays", "metrics", "config"
"""Keys of the records in a message."""

NO_ANSWER = frozenset(
    (
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    )
)
"""Codes of error replies that Flower gives in place of a client that is gone."""

_ALLOWANCE_BYTES = 2**20
"""What a reply may hold beyond its arrays' counted bytes: headers, shapes, metrics, per-step losses."""


@dataclass(frozen=True)
class Client:
    """One client, as the server knows it."""

    node: int
    """Flower's node id."""
    partition: int
    """The client's place in the federation, from 0."""
    rows: int
    """Rows that it announced before the first round, the most examples that it may claim."""


@dataclass(frozen=True)
class Accepted:
    """A reply that may be aggregated."""

    client: Client
    tensors: AdapterTensors
    report: TrainReply
    status: Literal["ok"] = "ok"
    reason: str = ""


@dataclass(frozen=True)
class Refused:
    """A reply that may not be aggregated."""

    client: Client | None
    """None for a node that was not asked."""
    reason: str
    status: Literal["error", "refused"] = "refused"
    absent: bool = False
    """Whether the client gave no answer at all: its node is gone, or its time is over."""


@dataclass(frozen=True)
class Expected:
    """What one client's reply must hold."""

    client: Client
    shapes: Shapes
    """Names and shapes of its tensors."""
    reference: AdapterTensors
    """What packed tensors are differences from; those that are not in it come whole."""


class ReplyValidator:
    """Validates the replies of one round."""

    def __init__(
        self, server_round: int, expected: Sequence[Expected], form: str, max_examples: int, *, with_loss: bool = True
    ) -> None:
        """Set up the validator.

        Args:
            server_round: The round, from 1.
            expected: What each client that was asked is to reply.
            form: Wire dtype or packed format that was agreed on.
            max_examples: The most examples that any client may claim.
            with_loss: Whether a reply must tell its training loss.
        """
        self.server_round = server_round
        self.with_loss = with_loss
        self.expected = {each.client.node: each for each in expected}
        self.form = form
        self.max_examples = max_examples
        self._seen: set[int] = set()

    def validate(self, reply: Message) -> Accepted | Refused:
        """Return the verdict on one reply; never raises on anything that a client can send."""
        expected = self.expected.get(reply.metadata.src_node_id)
        if expected is None:
            return Refused(None, "this node was not asked in this round")
        client = expected.client
        if reply.metadata.src_node_id in self._seen:
            return Refused(client, "this client has already replied in this round")
        self._seen.add(reply.metadata.src_node_id)
        if reply.has_error():
            reason = printable(reply.error.reason or "no reason given")
            return Refused(client, reason, "error", absent=reply.error.code in NO_ANSWER)
        try:
            return self._accept(expected, reply)
        except WireError as error:
            return Refused(client, printable(str(error)))

    def _accept(self, expected: Expected, reply: Message) -> Accepted:
        client, size = expected.client, serialised_bytes(reply)
        largest = wire_bytes(expected.shapes, self.form) + _ALLOWANCE_BYTES + 512 * len(expected.shapes)
        if size > largest:
            raise WireError(f"the reply is {size} bytes; at most {largest} were expected")
        arrays = reply.content.get(ARRAYS)
        if not isinstance(arrays, ArrayRecord):
            raise WireError(f"the reply lacks its {ARRAYS!r} record")
        most = min(client.rows, self.max_examples)
        report = TrainReply.from_record(reply.content.get(METRICS), self.server_round, most, with_loss=self.with_loss)
        tensors = decode(arrays, expected.shapes, self.form)
        if self.form in CODECS:
            tensors = added(tensors, expected.reference)
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise WireError(f"{name} holds values that are not finite")
        return Accepted(client, tensors, report)


def added(differences: AdapterTensors, reference: AdapterTensors) -> AdapterTensors:
    """Return `differences` on top of `reference`; tensors that it lacks are whole as they are."""
    return {name: tensor + reference[name] if name in reference else tensor for name, tensor in differences.items()}


def printable(text: str, length: int = 300) -> str:
    """Return a client's text fit for a log: one line, no control characters, not long."""
    text = re.sub(r"\s+", " ", re.sub(r"[^\x20-\x7e\xa0-\U0010ffff]", " ", text)).strip()
    return text if len(text) <= length else text[:length] + " …"
