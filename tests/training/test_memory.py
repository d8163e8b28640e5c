"""How steps are cut into passes, and what happens when memory runs out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.families import FAMILIES, build
from transformers import AutoModelForCausalLM

from fedtune.models.base import is_out_of_memory
from fedtune.training import memory
from fedtune.training.memory import WORTHWHILE_TOKENS, Limits, cut

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4000000000000 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("The size of tensor a (8) must match the size of tensor b (16)"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_memory_that_ran_out_is_told_from_what_a_model_cannot_do(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_allocator_of_this_machine_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "gemma3n_text" else pytest.mark.slow) for n in FAMILIES]
)
def test_memory_is_counted_for_every_family(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(build(name, tmp_path))
    monkeypatch.setattr(memory, "free_memory_bytes", lambda _: 1)
    assert memory.suggests_checkpointing(model, torch.device("cuda"))


def test_cut_by_hand() -> None:
    assert list(cut([3, 4, 5, 9], 8, padded=False)) == [slice(0, 2), slice(2, 3), slice(3, 4)]
    assert list(cut([1, 1, 6], 0, padded=True)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert list(cut([3, 4, 5, 9], 8, padded=True)) == [slice(0, 2), slice(2, 3), slice(3, 4)]
    assert list(cut([1, 1, 6, 1], 9, padded=False)) == [slice(0, 4)]
    assert list(cut([1, 1, 6, 1], 9, padded=True)) == [slice(0, 2), slice(2, 3), slice(3, 4)]


@given(LENGTHS, st.integers(1, 120), st.booleans())
def test_every_row_is_in_one_pass_within_the_limit(lengths: list[int], limit: int, padded: bool) -> None:
    runs = list(cut(lengths, limit, padded=padded))
    assert [i for run in runs for i in range(len(lengths))[run]] == list(range(len(lengths)))
    for run in runs:
        sizes = lengths[run]
        assert sizes
        assert len(sizes) == 1 or (max(sizes) * len(sizes) if padded else sum(sizes)) <= limit


@given(LENGTHS, st.booleans())
def test_retreat_ends(lengths: list[int], may_checkpoint: bool) -> None:
    limits = Limits(tokens=2**31, checkpointing=False)
    tries = 0
    while limits.retreat(lengths, may_checkpoint=may_checkpoint):
        tries += 1
        assert tries < 20
    assert limits.checkpointing is may_checkpoint
    assert all(run.stop - run.start == 1 for run in cut(lengths, limits.tokens, padded=False))


def test_passes_shrink_first_and_recompute_once_they_are_small() -> None:
    limits = Limits(tokens=2**31, checkpointing=False)
    lengths = [512] * 16
    seen = []
    for _ in range(5):
        assert limits.retreat(lengths, may_checkpoint=True)
        seen.append((limits.tokens, limits.checkpointing))
    assert WORTHWHILE_TOKENS == 2048
    assert seen == [(4096, False), (2048, False), (2048, True), (1024, True), (512, True)]
