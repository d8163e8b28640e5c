"""How many bytes a message is: the leaderboard's count and everything that is serialised.

The leaderboard's count is Flower's `ArrayRecord.count_bytes()`: each array's serialised data, npy header included, plus
its key (protocol, section 3). The whole count adds Flower's object headers, the shapes and type names, the records of
metrics and settings, and the message's metadata. Both are functions of keys, shapes and wire dtype alone, so that a
forecast can use the same arithmetic as the ledger.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Message
    from flwr.app.metadata import Metadata

Shapes = Mapping[str, tuple[int, ...]]

_OBJECT_ID_LENGTH = 64
"""Flower names each serialised object by the sha256 of its content, in hex."""
_CHUNK_BYTES = int(os.getenv("FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", "5242880"))
"""Flower cuts arrays into objects of so many bytes. Stated here, as importing Flower costs half a second; a test compares."""


@dataclass(frozen=True)
class WireFormat:
    """How one wire dtype is written down."""

    name: str
    """`Array.dtype`."""
    stype: str
    """`Array.stype`."""
    npy: str
    """numpy's name of the elements behind the npy header."""


WIRE_FORMATS = {
    "float32": WireFormat("float32", "numpy.ndarray", "<f4"),
    "fp16": WireFormat("float16", "numpy.ndarray", "<f2"),
    "bf16": WireFormat("bfloat16", "fedtune.bfloat16", "<u2"),
}


@dataclass(frozen=True)
class PackedFormat:
    """How all tensors of a message are written into one string of bytes: plainly, or in blocks with a float32 scale each."""

    bits: int
    """Bits a value."""
    block: int = 0
    """Values that share a scale; 0 for none."""
    dtype: str = ""
    """The wire dtype of plain values."""

    def bytes_of(self, values: int) -> int:
        """Return the bytes of a tensor of so many values: its scales, then its values."""
        scales = 4 * -(-values // self.block) if self.block else 0
        return scales + -(-values * self.bits // 8)


CODECS = {
    "packed-bf16": PackedFormat(16, dtype="bf16"),
    "packed-int8": PackedFormat(8, 256),
    "packed-int4": PackedFormat(4, 64),
}
"""Formats whose replies are differences from what the client has received."""
PACKED_FORMATS = CODECS | {
    "joined-float32": PackedFormat(32, dtype="float32"),
    "joined-fp16": PackedFormat(16, dtype="fp16"),
    "joined-bf16": PackedFormat(16, dtype="bf16"),
}
PACKED = "packed"
"""Key of the one array that a packed message has."""
BYTE = "|u1"
"""numpy's name of its elements."""


def packed_wire_format(name: str) -> WireFormat:
    """Return how Flower sees the one array of a packed format."""
    return WireFormat("uint8", f"fedtune.{name}", BYTE)


def packed_shapes(shapes: Shapes, name: str) -> Shapes:
    """Return the one array, by name and shape, that holds an adapter of `shapes` in a packed format."""
    packed = PACKED_FORMATS[name]
    return {PACKED: (sum(packed.bytes_of(prod(shape)) for shape in shapes.values()),)}


def wire_bytes(shapes: Shapes, name: str) -> int:
    """Return the leaderboard's count of a message with tensors of `shapes`, in a wire dtype or packed format."""
    if name in PACKED_FORMATS:
        return adapter_bytes(packed_shapes(shapes, name), BYTE)
    return adapter_bytes(shapes, WIRE_FORMATS[name].npy)


@cache
def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the npy header that numpy writes in front of a C-contiguous array of `shape` and `dtype`."""
    from io import BytesIO

    import numpy as np

    buffer = BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


def array_bytes(shape: tuple[int, ...], npy_dtype: str) -> int:
    """Return the length of one array's serialised data: npy header and elements."""
    import numpy as np

    return len(npy_header(npy_dtype, shape)) + prod(shape) * np.dtype(npy_dtype).itemsize


def adapter_bytes(shapes: Shapes, npy_dtype: str = "float32") -> int:
    """Return the leaderboard's count of one message that carries an adapter of `shapes` (names to shapes)."""
    return sum(len(key) + array_bytes(shape, npy_dtype) for key, shape in shapes.items())


def serialised_bytes(message: Message) -> int:
    """Return the length of everything that Flower serialises for a message.

    It is the sum of the lengths of the message's deflated objects, an object that occurs twice counted twice, without
    the hashing that deflating costs.
    """
    from flwr.app import ArrayRecord

    if not message.has_content():
        return len(message.deflate())
    records = 0
    for record in message.content.values():
        records += _array_record_bytes(record) if isinstance(record, ArrayRecord) else len(record.deflate())
    return records + record_dict_bytes("RecordDict", list(message.content)) + _message_bytes(message.metadata)


def _message_bytes(metadata: Metadata) -> int:
    from flwr.common.serde_utils import metadata_to_proto
    from flwr.proto.message_pb2 import Message as ProtoMessage

    proto = metadata_to_proto(metadata)
    proto.message_id = ""  # as Message.deflate leaves it out
    return object_bytes("Message", 1, len(ProtoMessage(metadata=proto).SerializeToString(deterministic=True)))


def _array_record_bytes(record: ArrayRecord) -> int:
    sizes = [_flwr_array_bytes(len(one.data), one.dtype, one.shape, one.stype) for one in record.values()]
    return record_dict_bytes("ArrayRecord", list(record)) + sum(sizes)


def wire_record_bytes(shapes: Shapes, name: str) -> int:
    """Return the length of everything that Flower serialises for an ArrayRecord with tensors of `shapes`."""
    if name in PACKED_FORMATS:
        return adapter_record_bytes(packed_shapes(shapes, name), packed_wire_format(name))
    return adapter_record_bytes(shapes, WIRE_FORMATS[name])


def adapter_record_bytes(shapes: Shapes, form: WireFormat) -> int:
    """Return the length of everything that Flower serialises for an ArrayRecord with an adapter of `shapes`."""
    sizes = [_flwr_array_bytes(array_bytes(shape, form.npy), form.name, shape, form.stype) for shape in shapes.values()]
    return record_dict_bytes("ArrayRecord", list(shapes)) + sum(sizes)


def record_dict_bytes(kind: str, keys: Sequence[str]) -> int:
    """Return the length of the object of a `kind` that names its children, without them."""
    names = json.dumps(dict.fromkeys(keys, "0" * _OBJECT_ID_LENGTH))
    return object_bytes(kind, len(keys), len(names.encode()))


def _flwr_array_bytes(data_bytes: int, dtype: str, shape: Sequence[int], stype: str) -> int:
    sizes = [min(_CHUNK_BYTES, data_bytes - start) for start in range(0, data_bytes, _CHUNK_BYTES)]
    chunks = sum(object_bytes("ArrayChunk", 0, size) for size in sizes)
    body = json.dumps({"dtype": dtype, "shape": shape, "stype": stype, "arraychunk_ids": list(range(len(sizes)))})
    return chunks + object_bytes("Array", len(sizes), len(body.encode()))


def object_bytes(kind: str, children: int, body: int) -> int:
    """Return the length of a deflated object: "Kind ids length", a divider of one byte, and the body."""
    ids = max(0, children * (_OBJECT_ID_LENGTH + 1) - 1)
    return len(kind) + 1 + ids + 1 + len(str(body)) + 1 + body
