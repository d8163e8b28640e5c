"""The number formats of tensors in a message, and the leaderboard's count of their bytes.

The leaderboard counts as Flower's `ArrayRecord.count_bytes()` does: each array's serialised data, npy header included, plus
its key (protocol, section 3). The count depends on keys, shapes and format alone, so a forecast uses the same arithmetic as the
ledger.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod

from fedtune.config.strategies.base import Shapes


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
