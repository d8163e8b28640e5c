"""How many bytes Flower serialises for a message: of one that is there, and of a run's messages beforehand.

A message is its adapter, a record of orders or metrics, and metadata. The adapter's part is exact. Of the numbers beside it,
some take more bytes when they are larger (a round, a count of tokens), and there is one loss a step: the forecast is a span,
some hundred bytes wide, that contains the ledger's figure.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.base import Shapes
from fedtune.protocol.messages import ARRAYS, CONFIG, METRICS, TrainOrder, TrainReply, Value
from fedtune.protocol.wire_format import (
    PACKED_FORMATS,
    WIRE_FORMATS,
    WireFormat,
    array_bytes,
    packed_shapes,
    packed_wire_format,
)

_OBJECT_ID_LENGTH = 64
"""Flower names each serialised object by the sha256 of its content, in hex."""
_CHUNK_BYTES = int(os.getenv("FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", "5242880"))
"""Flower cuts arrays into objects of so many bytes. Stated here, as importing Flower costs half a second; a test compares."""
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


def wire_record_bytes(shapes: Shapes, name: str) -> int:
    """Return the length of everything that Flower serialises for an ArrayRecord with tensors of `shapes`."""
    if name in PACKED_FORMATS:
        return adapter_record_bytes(packed_shapes(shapes, name), packed_wire_format(name))
    return adapter_record_bytes(shapes, WIRE_FORMATS[name])


def adapter_record_bytes(shapes: Shapes, form: WireFormat) -> int:
    """Return the length of everything that Flower serialises for an ArrayRecord with an adapter of `shapes`."""
    sizes = [
        array_object_bytes(array_bytes(shape, form.npy), form.name, shape, form.stype) for shape in shapes.values()
    ]
    return record_dict_bytes("ArrayRecord", list(shapes)) + sum(sizes)


def record_dict_bytes(kind: str, keys: Sequence[str]) -> int:
    """Return the length of the object of a `kind` that names its children, without them."""
    names = json.dumps(dict.fromkeys(keys, "0" * _OBJECT_ID_LENGTH))
    return object_bytes(kind, len(keys), len(names.encode()))


def array_object_bytes(data_bytes: int, dtype: str, shape: Sequence[int], stype: str) -> int:
    sizes = [min(_CHUNK_BYTES, data_bytes - start) for start in range(0, data_bytes, _CHUNK_BYTES)]
    chunks = sum(object_bytes("ArrayChunk", 0, size) for size in sizes)
    body = json.dumps({"dtype": dtype, "shape": shape, "stype": stype, "arraychunk_ids": list(range(len(sizes)))})
    return chunks + object_bytes("Array", len(sizes), len(body.encode()))


def object_bytes(kind: str, children: int, body: int) -> int:
    """Return the length of a deflated object: "Kind ids length", a divider of one byte, and the body."""
    ids = max(0, children * (_OBJECT_ID_LENGTH + 1) - 1)
    return len(kind) + 1 + ids + 1 + len(str(body)) + 1 + body


def message_span(config: FedTuneConfig, shapes: Shapes) -> Span:
    """Return the serialised bytes of one message to a client, with an adapter of `shapes`, in any round."""
    low, high = (_record_bytes("ConfigRecord", order.as_values()) for order in TrainOrder.bounds(config))
    fixed = wire_record_bytes(shapes, config.down_format) + record_dict_bytes("RecordDict", [ARRAYS, CONFIG])
    return Span(fixed + low, fixed + high) + _metadata(config, reply=False)


def reply_span(config: FedTuneConfig, shapes: Shapes) -> Span:
    """Return the serialised bytes of one client's reply, with an adapter of `shapes`, in any round."""
    low, high = (_record_bytes("MetricRecord", reply.as_values()) for reply in TrainReply.bounds(config))
    fixed = wire_record_bytes(shapes, config.up_format) + record_dict_bytes("RecordDict", [ARRAYS, METRICS])
    return Span(fixed + low, fixed + high) + _metadata(config, reply=True)


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


def _record_bytes(kind: str, values: Mapping[str, Value]) -> int:
    """Return the length of a record: protobuf items of a key and a value."""
    body = 0
    for key, value in values.items():
        size = (
            _doubles(len(value)) if isinstance(value, list) else _integer(value) if isinstance(value, int) else _DOUBLE
        )
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
