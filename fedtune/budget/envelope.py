"""How many bytes Flower serialises for a training message and its reply, from shapes and settings alone.

A message is its adapter, a record of settings or metrics, and metadata. The adapter's part is exact. Of the numbers beside it,
some are written in more bytes when they are larger (a round, a count of tokens), and there is one loss a step: what is not known
before the data is gives a span, some hundred bytes wide, that the ledger's figure lies in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedtune.budget.count import Shapes, object_bytes, record_dict_bytes, wire_record_bytes
from fedtune.budget.traffic import OFFSET_STRATEGIES
from fedtune.config.schema import FedTuneConfig

_DOUBLE = 9
"""A tag and eight bytes."""
_ID_HIGH = 10
"""The longest varint."""


@dataclass(frozen=True)
class Span:
    """A number of bytes that is known to lie between two bounds, both included."""

    low: int
    high: int

    def __add__(self, other: Span) -> Span:
        return Span(self.low + other.low, self.high + other.high)

    def times(self, count: int) -> Span:
        """Return the span of the sum of `count` such numbers."""
        return Span(self.low * count, self.high * count)


def message_span(config: FedTuneConfig, shapes: Shapes) -> Span:
    """Return the serialised bytes of one message to a client, with an adapter of `shapes`, in any round."""
    rounds = (1, config.federation.rounds)
    orders = [{"learning-rate": _DOUBLE, "server-round": _integer(number)} for number in rounds]
    if config.strategy.name == "fedprox":
        orders = [{"proximal-mu": _DOUBLE, **order} for order in orders]
    if config.strategy.name in OFFSET_STRATEGIES:
        a_round = config.federation.clients_per_round * config.adapter.rank
        orders = [
            {"offset-rank": _integer((number - 1) * a_round), **order}
            for number, order in zip(rounds, orders, strict=True)
        ]
    return _span(config, shapes, "config", "ConfigRecord", orders, reply=False)


def reply_span(config: FedTuneConfig, shapes: Shapes) -> Span:
    """Return the serialised bytes of one client's reply, with an adapter of `shapes`, in any round."""
    training = config.training
    if config.privacy.mode == "local":  # what everybody knows beforehand
        known = [
            {"server-round": _integer(number), "num-examples": _integer(1)} for number in (1, config.federation.rounds)
        ]
        return _span(config, shapes, "metrics", "MetricRecord", known, reply=True)
    rows = training.max_steps * training.rows_per_step
    tokens = rows * training.sequence_length
    numbers = [
        {
            "server-round": _integer(server_round),
            "num-examples": _integer(examples),
            "train-loss": _DOUBLE,
            "losses": _doubles(steps),
            "rows": _integer(rows),
            "tokens": _integer(tokens),
            "response-tokens": _integer(tokens),
            "seconds": _DOUBLE,
        }
        for server_round, examples, steps, rows, tokens in (
            (1, 1, 1, 1, 1),
            (config.federation.rounds, config.federation.max_examples, training.max_steps, rows, tokens),
        )
    ]
    return _span(config, shapes, "metrics", "MetricRecord", numbers, reply=True)


def _span(
    config: FedTuneConfig, shapes: Shapes, key: str, kind: str, records: list[dict[str, int]], *, reply: bool
) -> Span:
    arrays = wire_record_bytes(shapes, config.up_format if reply else config.down_format)
    fixed = arrays + record_dict_bytes("RecordDict", ["arrays", key])
    low, high = (_record_bytes(kind, record) for record in records)
    return Span(fixed + low, fixed + high) + _metadata(config, reply=reply)


def _metadata(config: FedTuneConfig, *, reply: bool) -> Span:
    """Return the length of the Message object: run, nodes, time, type, and what it replies to."""
    if config.federation.engine != "superlink":
        # Run 1, server node 1, task 0, clients' nodes from 2 on; an id is a UUID in hex.
        low, high, reply_id = 3 + _varint(2), 3 + _varint(config.federation.clients + 1), 32
    else:
        low, high, reply_id = 2, 5 * _ID_HIGH + 1, 64
    # Tags of run, two nodes and a task; two times; the type "train"; the id that a reply names.
    fixed = 4 + 2 * _DOUBLE + _text("train") + (2 + reply_id if reply else 0)
    return Span(*(object_bytes("Message", 1, 1 + _varint(size) + size) for size in (fixed + low, fixed + high)))


def _record_bytes(kind: str, values: Mapping[str, int]) -> int:
    """Length of a record whose values take `values` bytes each: protobuf items of a key and a value."""
    body = 0
    for key, size in values.items():
        item = _text(key) + 1 + _varint(size) + size
        body += 1 + _varint(item) + item
    return object_bytes(kind, 0, body)


def _varint(value: int) -> int:
    return max(1, (value.bit_length() + 6) // 7)


def _integer(value: int) -> int:
    """A tag and a zigzag varint."""
    return 1 + _varint(2 * value)


def _doubles(count: int) -> int:
    """A tag of two bytes and a length, in it a tag, a length and eight bytes each."""
    packed = 1 + _varint(8 * count) + 8 * count
    return 2 + _varint(packed) + packed


def _text(text: str) -> int:
    return 1 + _varint(len(text)) + len(text)
