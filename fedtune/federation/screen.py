"""Which replies may be aggregated, and why the others may not.

A client is not trusted: its reply may be late, doubled, of another round, of other shapes, huge, or not finite. Whatever is
wrong costs the client its place in the round, with a reason in the log, and never the run. Sizes are checked before
anything is decoded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from flwr.app import ArrayRecord, Message, MetricRecord

from fedtune.budget.count import serialised_bytes
from fedtune.federation.wire import Shapes, WireDtype, WireError, decode, message_bytes
from fedtune.models.adapter import AdapterTensors

ARRAYS, METRICS, CONFIG = "arrays", "metrics", "config"
"""Keys of the records in a message."""

Metric = int | float | list[int] | list[float]

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
    metrics: Mapping[str, Metric]
    status: Literal["ok"] = "ok"
    reason: str = ""


@dataclass(frozen=True)
class Refused:
    """A reply that may not be aggregated."""

    client: Client | None
    """None for a node that was not asked."""
    reason: str
    status: Literal["error", "refused"] = "refused"


class Screen:
    """The screen of one round."""

    def __init__(
        self, server_round: int, clients: Mapping[int, Client], shapes: Shapes, dtype: WireDtype, max_examples: int
    ) -> None:
        """Set up a screen.

        Args:
            server_round: The round, from 1.
            clients: The clients that were asked, by node id.
            shapes: Names and shapes of the adapter.
            dtype: Wire dtype that was agreed on.
            max_examples: The most examples that any client may claim.
        """
        self.server_round = server_round
        self.clients = clients
        self.shapes = shapes
        self.dtype: WireDtype = dtype
        self.max_examples = max_examples
        self.largest_bytes = message_bytes(shapes, dtype) + _ALLOWANCE_BYTES + 512 * len(shapes)
        self._seen: set[int] = set()

    def admit(self, reply: Message) -> Accepted | Refused:
        """Judge one reply; never raises on anything that a client can send."""
        client = self.clients.get(reply.metadata.src_node_id)
        if client is None:
            return Refused(None, "this node was not asked in this round")
        if reply.metadata.src_node_id in self._seen:
            return Refused(client, "this client has already replied in this round")
        self._seen.add(reply.metadata.src_node_id)
        if reply.has_error():
            return Refused(client, printable(reply.error.reason or "no reason given"), "error")
        try:
            return self._accept(client, reply)
        except WireError as error:
            return Refused(client, printable(str(error)))

    def _accept(self, client: Client, reply: Message) -> Accepted:
        size = serialised_bytes(reply)
        if size > self.largest_bytes:
            raise WireError(f"the reply is {size} bytes; at most {self.largest_bytes} were expected")
        arrays, metrics = reply.content.get(ARRAYS), reply.content.get(METRICS)
        if not isinstance(arrays, ArrayRecord) or not isinstance(metrics, MetricRecord):
            raise WireError(f"the reply lacks its {ARRAYS!r} or {METRICS!r} record")
        if metrics.get("server-round") != self.server_round:
            raise WireError(f"the reply is of round {metrics.get('server-round')!r}, not {self.server_round}")
        most = min(client.rows, self.max_examples)
        examples = metrics.get("num-examples")
        if not isinstance(examples, int | float) or not math.isfinite(examples) or not 0 < examples <= most:
            raise WireError(f"num-examples is {examples!r}, not a number above 0 and at most {most}")
        loss = metrics.get("train-loss")
        if not isinstance(loss, int | float) or not math.isfinite(loss):
            raise WireError(f"train-loss is {loss!r}, not a finite number")
        tensors = decode(arrays, self.shapes, self.dtype)
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise WireError(f"{name} holds values that are not finite")
        return Accepted(client, tensors, dict(metrics))


def printable(text: str, length: int = 300) -> str:
    """Return a client's text fit for a log: one line, no control characters, not long."""
    text = re.sub(r"\s+", " ", re.sub(r"[^\x20-\x7e\xa0-\U0010ffff]", " ", text)).strip()
    return text if len(text) <= length else text[:length] + " …"
