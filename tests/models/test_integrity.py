"""The checksum of a base: every bit, every place, every kind of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config.schema import AdapterConfig, ModelConfig
from fedtune.errors import FedTuneError
from fedtune.models import integrity
from fedtune.models.adapter import attach
from fedtune.models.base import Base, load_base

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.int8]


def large(dtype: torch.dtype, length: int = 70_001) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 100, (length,), generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_bit_counts(dtype: torch.dtype, data: st.DataObject) -> None:
    tensor = large(dtype)
    before = integrity._sums([tensor])
    as_bytes = tensor.view(torch.uint8)
    place = data.draw(st.integers(0, len(as_bytes) - 1) | st.integers(len(as_bytes) - 9, len(as_bytes) - 1))
    as_bytes[place] ^= 1 << data.draw(st.integers(0, 7))
    assert integrity._sums([tensor]) != before


@settings(max_examples=30, deadline=None)
@given(first=st.integers(0, 70_000), second=st.integers(0, 70_000))
def test_every_place_counts(first: int, second: int) -> None:
    tensor = large(torch.float32)
    before = integrity._sums([tensor])
    tensor[[first, second]] = tensor[[second, first]]
    assert (integrity._sums([tensor]) == before) == (tensor[first] == tensor[second])


def test_a_gpus_product_is_the_cpus() -> None:
    rows = torch.randint(-(2**63), 2**63 - 1, (70_000, 4), dtype=torch.int64)
    factors = torch.arange(1, 140_000, 2) * integrity._SPREAD
    assert torch.equal(integrity._product(factors, rows), factors @ rows)
    assert integrity._product(factors[:0], rows[:0]).tolist() == [0, 0, 0, 0]


def test_sums_by_hand() -> None:
    tensor = torch.zeros(integrity._SMALL // 8 + integrity._COLUMNS, dtype=torch.int64)
    tensor[0], tensor[1], tensor[1024] = 1, 10, 100
    expected = integrity._SPREAD * (1 * 1 + 10 * 3 + 100 * 3)  # rows' and columns' odd numbers: 1, 3, …
    assert (int(integrity._sums([tensor])[0]) - expected) % 2**64 == 0


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_use_changes_nothing_and_a_change_is_named(llama_folder: Path, ids: torch.Tensor, quantization: str) -> None:
    base = load_base(ModelConfig.model_validate({"base": str(llama_folder), "quantization": quantization}))
    adapted = attach(base, AdapterConfig(rank=2, targets="all-linear"))
    adapted.model(ids).logits.sum().backward()
    adapted.check_base("after use")
    weight = base.model.model.layers[1].mlp.up_proj.base_layer.weight
    weight.data.view(torch.uint8).flatten()[5] ^= 1
    with pytest.raises(FedTuneError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not what was loaded, at noon"):
        adapted.check_base("at noon")
    adapted.detach()
    with pytest.raises(FedTuneError, match=r"up_proj\.weight"):
        integrity.check(base.model, "later")


def test_a_replaced_weight_is_found(base: Base) -> None:
    integrity.watch(base.model)
    integrity.check(base.model, "at once")
    base.model.lm_head.weight = torch.nn.Parameter(base.model.lm_head.weight.detach().clone())
    with pytest.raises(FedTuneError, match=r"lm_head\.weight"):
        integrity.check(base.model, "later")


def test_a_gpu_sums_tensors_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU small tensors take the same way as large ones: there may be no whole row of words."""
    monkeypatch.setattr(integrity, "_SMALL", -1)
    for length in (0, 1, 7, 8, 9, 4095, 4097):
        tensor = large(torch.uint8, length)
        before = integrity._sums([tensor])
        if length:
            tensor[-1] ^= 1
            assert integrity._sums([tensor]) != before
