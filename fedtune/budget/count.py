"""How many bytes a message is: the leaderboard's count and everything that is serialised.

The leaderboard's count is Flower's `ArrayRecord.count_bytes()`: each array's serialised data, npy header included, plus
its key (protocol, section 3). The whole count adds Flower's object headers, the shapes and type names, the records of
metrics and settings, and the message's metadata. Both are functions of keys, shapes and wire dtype alone, so that a
forecast can use the same arithmetic as the ledger.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flwr.app import Array, ArrayRecord, Message
    from flwr.app.metadata import Metadata

_OBJECT_ID_LENGTH = 64
"""Flower names each serialised object by the sha256 of its content, in hex."""


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


def adapter_bytes(shapes: Mapping[str, tuple[int, ...]], npy_dtype: str = "float32") -> int:
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
    names = json.dumps(dict.fromkeys(message.content, "0" * _OBJECT_ID_LENGTH))
    records += _object_bytes("RecordDict", len(message.content), len(names.encode()))
    return records + _message_bytes(message.metadata)


def _message_bytes(metadata: Metadata) -> int:
    from flwr.common.serde_utils import metadata_to_proto
    from flwr.proto.message_pb2 import Message as ProtoMessage

    proto = metadata_to_proto(metadata)
    proto.message_id = ""  # as Message.deflate leaves it out
    return _object_bytes("Message", 1, len(ProtoMessage(metadata=proto).SerializeToString(deterministic=True)))


def _array_record_bytes(record: ArrayRecord) -> int:
    names = json.dumps(dict.fromkeys(record, "0" * _OBJECT_ID_LENGTH))
    return _object_bytes("ArrayRecord", len(record), len(names.encode())) + sum(map(_flwr_array_bytes, record.values()))


def _flwr_array_bytes(array: Array) -> int:
    from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK

    sizes = [min(CHUNK, len(array.data) - start) for start in range(0, len(array.data), CHUNK)]
    chunks = sum(_object_bytes("ArrayChunk", 0, size) for size in sizes)
    body = json.dumps(
        {
            "dtype": array.dtype,
            "shape": array.shape,
            "stype": array.stype,
            "arraychunk_ids": list(range(len(sizes))),
        }
    )
    return chunks + _object_bytes("Array", len(sizes), len(body.encode()))


def _object_bytes(kind: str, children: int, body: int) -> int:
    """Length of a deflated object: "Kind", children's ids and body length divided by a sign, a divider, the body."""
    from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER

    ids = max(0, children * (_OBJECT_ID_LENGTH + 1) - 1)
    head = len(kind) + ids + len(str(body)) + 2 * len(HEAD_VALUE_DIVIDER.encode())
    return head + len(HEAD_BODY_DIVIDER) + body
