"""The bytes that Flower serialises for a message, for the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, Message

from fedtune.federation.flower.compat import message_pb2, metadata_to_proto
from fedtune.protocol.message_size import array_object_bytes, object_bytes, record_dict_bytes

if TYPE_CHECKING:
    from flwr.app.metadata import Metadata


def serialised_bytes(message: Message) -> int:
    """Return the length of everything that Flower serialises for a message.

    It is the sum of the lengths of the message's deflated objects, an object that occurs twice counted twice, without
    the hashing that deflating costs.
    """
    if not message.has_content():
        return len(message.deflate())
    records = 0
    for record in message.content.values():
        records += _array_record_bytes(record) if isinstance(record, ArrayRecord) else len(record.deflate())
    return records + record_dict_bytes("RecordDict", list(message.content)) + _message_bytes(message.metadata)


def _message_bytes(metadata: Metadata) -> int:
    proto = metadata_to_proto(metadata)
    proto.message_id = ""  # as Message.deflate leaves it out
    return object_bytes("Message", 1, len(message_pb2.Message(metadata=proto).SerializeToString(deterministic=True)))


def _array_record_bytes(record: ArrayRecord) -> int:
    sizes = [array_object_bytes(len(one.data), one.dtype, one.shape, one.stype) for one in record.values()]
    return record_dict_bytes("ArrayRecord", list(record)) + sum(sizes)
