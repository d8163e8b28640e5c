"""Writes an adapter's tensors into the arrays of a message, and reads them.

float32 and fp16 travel as plain npy arrays, so that float32 messages have exactly the bytes that the leaderboard counts. bf16,
which numpy lacks, travels as 16-bit patterns under its own type name; a packed format is one array of bytes that holds all
tensors. A reader first compares everything, headers included, with the bytes that an honest sender writes: it never parses a
header.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedtune.config.strategies.base import Shapes
from fedtune.protocol.codecs import pack, plain_bytes, plain_values, unpack
from fedtune.protocol.messages import WireError
from fedtune.protocol.wire_format import (
    PACKED,
    PACKED_FORMATS,
    WIRE_FORMATS,
    WireFormat,
    array_bytes,
    npy_header,
    packed_shapes,
    packed_wire_format,
)

if TYPE_CHECKING:
    import torch
    from flwr.app import Array, ArrayRecord

    from fedtune.models.adapter import AdapterTensors


def encode(tensors: AdapterTensors, form: str) -> ArrayRecord:
    """Return `tensors` (names to float32 tensors) as an ArrayRecord in a wire dtype or packed format, in the tensors' order."""
    from flwr.app import Array, ArrayRecord

    if form not in PACKED_FORMATS:
        return ArrayRecord({name: _encode_array(tensor, form) for name, tensor in tensors.items()})
    data = pack(tensors, form)
    wire = packed_wire_format(form)
    shape = (len(data),)
    return ArrayRecord({PACKED: Array(wire.name, shape, wire.stype, npy_header(wire.npy, shape) + data)})


def decode(record: ArrayRecord, shapes: Shapes, form: str) -> AdapterTensors:
    """Return the tensors in `record` as float32, in the order of `shapes`.

    Raises:
        WireError: names, shapes, types or sizes are not those of `shapes` and `form`; said before anything is decoded.
    """
    if form not in PACKED_FORMATS:
        check_names(set(record), set(shapes))
        return {name: _decode_array(name, record[name], shape, form) for name, shape in shapes.items()}
    check_names(set(record), {PACKED})
    (shape,) = packed_shapes(shapes, form).values()
    return unpack(_checked_bytes(PACKED, record[PACKED], shape, packed_wire_format(form)), shapes, form)


def check_names(found: set[str], expected: set[str]) -> None:
    """Compare the names of arrays.

    Raises:
        WireError: some are missing or too many; up to three are named.
    """
    for what, names in (("misses", expected - found), ("has unknown", found - expected)):
        if names:
            some = ", ".join(repr(name[:80]) for name in sorted(names)[:3])
            raise WireError(f"the adapter {what} {len(names)} of {len(expected)} arrays: {some}")


def _encode_array(tensor: torch.Tensor, dtype: str) -> Array:
    from flwr.app import Array

    form = WIRE_FORMATS[dtype]
    values = plain_bytes(tensor.detach().cpu().float(), dtype)
    data = npy_header(form.npy, tuple(tensor.shape)) + values
    return Array(dtype=form.name, shape=tuple(tensor.shape), stype=form.stype, data=data)


def _decode_array(name: str, array: Array, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    return plain_values(_checked_bytes(name, array, shape, WIRE_FORMATS[dtype]), dtype).reshape(shape)


def _checked_bytes(name: str, array: Array, shape: tuple[int, ...], form: WireFormat) -> memoryview:
    """Return an array's elements as bytes, its npy header left out.

    Raises:
        WireError: it is no array of `shape` and `form`.
    """
    if (array.dtype, array.stype) != (form.name, form.stype):
        raise WireError(f"{name} is {array.dtype[:20]!r} ({array.stype[:20]!r}), not {form.name!r} ({form.stype!r})")
    if tuple(array.shape) != shape:
        raise WireError(f"{name} has shape {tuple(array.shape)[:6]}, not {shape}")
    header = npy_header(form.npy, shape)
    if len(array.data) != array_bytes(shape, form.npy) or not array.data.startswith(header):
        raise WireError(f"{name} holds {len(array.data)} bytes that are no {form.name} array of shape {shape}")
    return memoryview(array.data)[len(header) :]
