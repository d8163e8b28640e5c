"""Adapter <-> ArrayRecord: names, shapes and wire dtypes.

float32 and fp16 travel as plain npy arrays, so that float32 messages have the very bytes that the leaderboard counts.
bf16, which numpy lacks, travels as its 16-bit patterns under a type name of its own. Whatever arrives is compared, header
included, with the bytes that an honest sender writes, before anything is decoded: a header is never parsed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from fedtune.budget.count import WIRE_FORMATS, adapter_bytes, array_bytes, npy_header
from fedtune.models.adapter import AdapterTensors

WireDtype = Literal["float32", "bf16", "fp16"]
Shapes = Mapping[str, tuple[int, ...]]


class WireError(ValueError):
    """An array that arrived is not what was agreed on; the text is safe to log."""


def encode(tensors: AdapterTensors, dtype: WireDtype) -> ArrayRecord:
    """Return `tensors` (names to float32 tensors) as an ArrayRecord in `dtype`, in the tensors' order."""
    return ArrayRecord({name: _encode_array(tensor, dtype) for name, tensor in tensors.items()})


def decode(record: ArrayRecord, shapes: Shapes, dtype: WireDtype) -> AdapterTensors:
    """Return the adapter in `record` as float32 tensors, in the order of `shapes`.

    Raises:
        WireError: names, shapes, dtype or sizes are not those of `shapes` and `dtype`; said before anything is decoded.
    """
    check_names(set(record), set(shapes))
    return {name: _decode_array(name, record[name], shape, dtype) for name, shape in shapes.items()}


def message_bytes(shapes: Shapes, dtype: WireDtype) -> int:
    """Return the leaderboard's count of one message with an adapter of `shapes` in `dtype`."""
    return adapter_bytes(shapes, WIRE_FORMATS[dtype].npy)


def check_names(found: set[str], expected: set[str]) -> None:
    """Compare the names of arrays.

    Raises:
        WireError: some are missing or too many; up to three are named.
    """
    for what, names in (("misses", expected - found), ("has unknown", found - expected)):
        if names:
            some = ", ".join(repr(name[:80]) for name in sorted(names)[:3])
            raise WireError(f"the adapter {what} {len(names)} of {len(expected)} arrays: {some}")


def _encode_array(tensor: torch.Tensor, dtype: WireDtype) -> Array:
    form = WIRE_FORMATS[dtype]
    tensor = tensor.detach().to("cpu", torch.float32)
    if dtype == "bf16":
        values = tensor.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
    else:
        values = tensor.contiguous().numpy().astype(form.npy, copy=False)
    data = npy_header(form.npy, tuple(tensor.shape)) + values.tobytes()
    return Array(dtype=form.name, shape=tuple(tensor.shape), stype=form.stype, data=data)


def _decode_array(name: str, array: Array, shape: tuple[int, ...], dtype: WireDtype) -> torch.Tensor:
    form = WIRE_FORMATS[dtype]
    if (array.dtype, array.stype) != (form.name, form.stype):
        raise WireError(f"{name} is {array.dtype[:20]!r} ({array.stype[:20]!r}), not {form.name!r} ({form.stype!r})")
    if tuple(array.shape) != shape:
        raise WireError(f"{name} has shape {tuple(array.shape)[:6]}, not {shape}")
    header = npy_header(form.npy, shape)
    if len(array.data) != array_bytes(shape, form.npy) or not array.data.startswith(header):
        raise WireError(f"{name} holds {len(array.data)} bytes that are no {form.name} array of shape {shape}")
    values = np.frombuffer(array.data, dtype=form.npy, offset=len(header)).reshape(shape)
    if dtype == "bf16":
        return torch.from_numpy(values.copy()).view(torch.bfloat16).to(torch.float32)
    return torch.from_numpy(values.astype(np.float32))
