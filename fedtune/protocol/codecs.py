"""Packed formats: all tensors of a message in one string of bytes, as they are or quantized in blocks that share a scale.

int8, blocks of 256: a block's scale is its largest magnitude / 127, its values are round(value / scale). A block of 1.0, -0.5
becomes scale 1/127 and the bytes 127, -64 (-63.5 rounds to even). int4, blocks of 64: / 7, two values a byte, the first in the
low half, each plus 8. Scales are float32. bf16 is PyTorch's own rounding, without scales.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedtune.config.strategies.base import Shapes
from fedtune.protocol.wire_format import PACKED_FORMATS, WIRE_FORMATS, PackedFormat

if TYPE_CHECKING:
    import torch

    from fedtune.models.adapter import AdapterTensors

_LEVELS = {8: 127, 4: 7}


def pack(tensors: AdapterTensors, name: str) -> bytes:
    """Return `tensors` (float32) in the packed format `name`, in their order: each tensor's scales, then its values."""
    form = PACKED_FORMATS[name]
    return b"".join(_pack_tensor(tensor.detach().cpu().float(), form) for tensor in tensors.values())


def unpack(data: bytes | memoryview, shapes: Shapes, name: str) -> AdapterTensors:
    """Return float32 tensors of `shapes` from what `pack` wrote; `data` has the length that `shapes` give."""
    form = PACKED_FORMATS[name]
    tensors, start = {}, 0
    for key, shape in shapes.items():
        end = start + form.bytes_of(prod(shape))
        tensors[key] = _unpack_tensor(data[start:end], prod(shape), form).reshape(shape)
        start = end
    return tensors


def plain_bytes(tensor: torch.Tensor, dtype: str) -> bytes:
    """Return a float32 CPU tensor's values in a wire dtype, one after another."""
    import torch

    values = tensor.to(torch.bfloat16).contiguous().view(torch.uint16) if dtype == "bf16" else tensor.contiguous()
    with np.errstate(over="ignore"):  # what does not fit fp16 becomes infinite, which the validator refuses
        return bytes(values.numpy().astype(WIRE_FORMATS[dtype].npy, copy=False).tobytes())


def plain_values(data: bytes | memoryview, dtype: str) -> torch.Tensor:
    """Return what `plain_bytes` has written, flat and as float32."""
    import torch

    values = np.frombuffer(data, WIRE_FORMATS[dtype].npy)
    if dtype == "bf16":
        return torch.from_numpy(values.copy()).view(torch.bfloat16).to(torch.float32)
    return torch.from_numpy(values.astype(np.float32))


def _pack_tensor(tensor: torch.Tensor, form: PackedFormat) -> bytes:
    if form.dtype:
        return plain_bytes(tensor, form.dtype)
    values = tensor.contiguous().numpy().ravel()
    levels = _LEVELS[form.bits]
    blocks = np.zeros((-(-len(values) // form.block), form.block), np.float32)
    blocks.ravel()[: len(values)] = values
    scales = (np.abs(blocks).max(axis=1) / np.float32(levels)).astype("<f4")
    # A scale that underflows to 0 stands for a block of zeros; one that is not finite goes through, which the validator refuses.
    with np.errstate(invalid="ignore"):
        steps = np.divide(blocks, scales[:, None], out=np.zeros_like(blocks), where=scales[:, None] > 0)
    rounded = np.nan_to_num(np.rint(steps), nan=0.0).clip(-levels, levels).astype(np.int8).ravel()[: len(values)]
    return bytes(scales.tobytes() + (rounded if form.bits == 8 else _two_a_byte(rounded)).tobytes())


def _unpack_tensor(data: bytes | memoryview, count: int, form: PackedFormat) -> torch.Tensor:
    import torch

    if form.dtype:
        return plain_values(data, form.dtype)
    blocks = -(-count // form.block)
    scales = np.frombuffer(data, "<f4", count=blocks)
    stored = np.frombuffer(data, np.uint8, offset=4 * blocks)
    steps = stored.view(np.int8) if form.bits == 8 else _one_a_byte(stored)[:count]
    with np.errstate(invalid="ignore", over="ignore"):
        values = steps.astype(np.float32) * np.repeat(scales.astype(np.float32), form.block)[:count]
    return torch.from_numpy(values)


def _two_a_byte(steps: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    halves = (np.append(steps, np.int8(0)) if len(steps) % 2 else steps).astype(np.int16) + 8
    return (halves[::2] | halves[1::2] << 4).astype(np.uint8)


def _one_a_byte(stored: npt.NDArray[np.uint8]) -> npt.NDArray[np.int16]:
    return np.stack([stored & 15, stored >> 4], axis=1).ravel().astype(np.int16) - 8
