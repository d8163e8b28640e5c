"""The wire: what is sent arrives, in Flower's own bytes; what is not an adapter is refused before it is decoded."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st

from fedtune.protocol.arrays import decode, encode
from fedtune.protocol.messages import WireError
from fedtune.protocol.wire_format import wire_bytes

SHAPES = st.dictionaries(
    st.text(min_size=1, max_size=30),
    st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    min_size=1,
    max_size=5,
)
DTYPES = ["float32", "bf16", "fp16"]


def adapter(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@given(SHAPES, st.sampled_from(DTYPES))
def test_round_trip(shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    """float32 comes back bit for bit, the others as torch rounds them; sizes are the forecast's."""
    tensors = adapter(shapes)
    record = encode(tensors, dtype)  # type: ignore[arg-type]
    back = decode(record, shapes, dtype)  # type: ignore[arg-type]
    rounded = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert list(back) == list(shapes)
    for name, tensor in tensors.items():
        assert back[name].dtype == torch.float32
        assert torch.equal(back[name], tensor.to(rounded).to(torch.float32))
    assert record.count_bytes() == wire_bytes(shapes, dtype)


def test_float32_has_flowers_own_bytes() -> None:
    """The leaderboard counts Flower's serialisation, so ours must be the same to the byte."""
    tensors = adapter({"a": (3, 4), "b": (5,)})
    theirs = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in tensors.items()})
    ours = encode(tensors, "float32")
    for name in tensors:
        assert vars(ours[name])["data"] == vars(theirs[name])["data"]
        assert (ours[name].dtype, ours[name].shape, ours[name].stype) == (
            theirs[name].dtype,
            theirs[name].shape,
            theirs[name].stype,
        )


def test_a_header_that_claims_373_gib_is_refused() -> None:
    """numpy would try to allocate what the header claims; we compare headers and never parse them."""
    from io import BytesIO

    buffer = BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (10**11,)})
    record = ArrayRecord({"a": Array("float32", (2,), "numpy.ndarray", buffer.getvalue())})
    with pytest.raises(WireError, match="holds 128 bytes"):
        decode(record, {"a": (2,)}, "float32")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (Array(np.zeros((2, 3), "float32")), "has shape"),
        (Array(np.zeros((1, 2), "float32")), "has shape"),  # would merely broadcast
        (Array(np.zeros((2, 2), "float64")), "is 'float64'"),
        (Array(np.zeros((2, 2), "float16")), "is 'float16'"),
        (Array("float32", (2, 2), "numpy.ndarray", Array(np.zeros((2, 2), ">f4")).data), "no float32 array"),
        (Array("float32", (2, 2), "numpy.ndarray", Array(np.zeros((4,), "float32")).data), "no float32 array"),
        (Array("float32", (2, 2), "numpy.ndarray", b""), "holds 0 bytes"),
        (Array("float32", (2, 2), "pickle", b"\x80\x04"), "pickle"),
    ],
)
def test_arrays_that_are_not_what_was_agreed_on(array: Array, words: str) -> None:
    with pytest.raises(WireError, match=words):
        decode(ArrayRecord({"a": array}), {"a": (2, 2)}, "float32")


def test_names_are_compared() -> None:
    record = encode(adapter({"a": (1,), "x": (1,)}), "float32")
    with pytest.raises(WireError, match=r"misses 1 of 2 arrays: 'b'"):
        decode(record, {"a": (1,), "b": (1,)}, "float32")
    with pytest.raises(WireError, match=r"unknown 1 of 1 arrays: 'x'"):
        decode(record, {"a": (1,)}, "float32")


@given(st.binary(max_size=300), st.lists(st.integers(0, 9), max_size=3).map(tuple), st.text(), st.text())
def test_garbage_never_crashes(data: bytes, shape: tuple[int, ...], dtype: str, stype: str) -> None:
    for kind in (dtype, "float32"):
        with pytest.raises(WireError):
            decode(ArrayRecord({"a": Array(kind, shape, stype, data)}), {"a": (2, 2)}, "float32")
