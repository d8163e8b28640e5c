"""Packed passes against padded ones, and the models that cannot be packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, LlamaForCausalLM

from fedtune.data.tokenize import TokenizedRows
from fedtune.models.adapter import AdaptedModel
from fedtune.training import packing
from fedtune.training.packing import (
    can_pack,
    fits_window,
    pack,
    packed_attention,
    packed_logits,
    padded_logits,
    summed_loss,
)

CPU = torch.device("cpu")
Make = Callable[..., AdaptedModel]


def test_layout_by_hand() -> None:
    batch = pack([np.array([7, 3, 9, 4]), np.array([5, 2]), np.array([8, 6])], [2, 1, 0], CPU)
    assert batch.input_ids.tolist() == [[7, 3, 9, 4, 5, 2, 8, 6]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1]]
    assert batch.kept.tolist() == [1, 2, 4, 6]  # without a prompt the first token is still predicted by nothing
    assert batch.targets.tolist() == [9, 4, 2, 6]
    assert batch.starts.tolist() == [0, 4, 6, 8]
    assert batch.starts.dtype == torch.int32
    assert batch.lengths == (4, 2, 2)


def gradients(adapted: AdaptedModel, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, adapted.parameters()))


def test_packed_padded_and_one_by_one_agree(make: Make, rows: TokenizedRows) -> None:
    adapted = make(dora=True)
    chosen = range(9)
    ids, prompts = [rows.input_ids[i] for i in chosen], rows.prompt_lengths[:9].tolist()
    batch = pack(ids, prompts, CPU)
    padded = summed_loss(padded_logits(adapted.model, batch), batch)
    # transformers' own loss on each row alone
    alone = torch.zeros(())
    for row, prompt in zip(ids, prompts, strict=True):
        tokens = torch.tensor(row)[None].long()
        labels = tokens.clone()
        labels[:, :prompt] = -100
        alone = alone + adapted.model(tokens, labels=labels).loss * (len(row) - prompt)
    with packed_attention(adapted.base.model):
        logits = packed_logits(adapted.model, batch)
        assert logits.shape == (sum(map(len, ids)) - sum(prompts), 64)
        packed = summed_loss(logits, batch)
        found = gradients(adapted, packed)
    torch.testing.assert_close(packed, alone)
    torch.testing.assert_close(padded, alone)
    for one, two, three in zip(found, gradients(adapted, padded), gradients(adapted, alone), strict=True):
        assert three.abs().max() > 0
        torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(two, three, rtol=1e-4, atol=1e-5)


def test_attention_is_switched_back(make: Make) -> None:
    model = make().base.model
    with packed_attention(model):
        assert model.config._attn_implementation == packing.ATTENTION
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ZeroDivisionError), packed_attention(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"


def test_a_plain_llama_can_be_packed(make: Make) -> None:
    adapted = make()
    assert can_pack(adapted.base.model, adapted.parameters())
    assert all(p.grad is None for p in adapted.parameters())
    half = make(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert can_pack(half.base.model, half.parameters())


class NoLogitsToKeep(LlamaForCausalLM):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, **others: Any) -> Any:  # type: ignore[override]
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **others)


class LooksBack(LlamaForCausalLM):
    """Mixes each token with the one before it, whoever's that is, as a convolution over the tokens would."""

    def forward(self, input_ids: Any = None, logits_to_keep: Any = 0, **others: Any) -> Any:  # type: ignore[override]
        embedded = self.get_input_embeddings()(input_ids)
        return super().forward(inputs_embeds=embedded + embedded.roll(1, 1), logits_to_keep=logits_to_keep, **others)


@pytest.mark.parametrize("kind", [NoLogitsToKeep, LooksBack])
def test_models_that_cannot_be_packed_are_found(make: Make, kind: type) -> None:
    adapted = make(kind=kind)
    assert not can_pack(adapted.base.model, adapted.parameters())
    assert adapted.base.model.config._attn_implementation == "sdpa"


def test_a_leak_between_rows_is_found(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make()
    monkeypatch.setitem(
        AttentionInterface._global_mapping, packing.ATTENTION, AttentionInterface._global_mapping["sdpa"]
    )
    assert not can_pack(adapted.base.model, adapted.parameters())


def test_attention_with_terms_of_its_own_is_refused() -> None:
    q = torch.zeros(1, 2, 3, 8)
    starts = torch.tensor([0, 3])
    with pytest.raises(NotImplementedError):
        packing._attend(torch.nn.Identity(), q, q, q, None, cu_seq_lens_q=starts, row_lengths=(3,), softcap=30.0)


def test_rows_must_fit_the_models_window(make: Make) -> None:
    model = make().base.model
    assert fits_window(model, 10**6)
    model.config.sliding_window = 16
    assert fits_window(model, 16)
    assert not fits_window(model, 17)


@pytest.mark.gpu
def test_packed_kernel_on_a_gpu_agrees_with_padded(make: Make, rows: TokenizedRows) -> None:
    adapted = make(torch.bfloat16)
    adapted.model.to("cuda")
    ids, prompts = list(rows.input_ids[:9]), rows.prompt_lengths[:9].tolist()
    batch = pack(ids, prompts, torch.device("cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        assert can_pack(adapted.base.model, adapted.parameters())
        padded = summed_loss(padded_logits(adapted.model, batch), batch)
        with packed_attention(adapted.base.model):
            packed = summed_loss(packed_logits(adapted.model, batch), batch)
    torch.testing.assert_close(packed, padded, rtol=0.01, atol=0)
    one, two = (torch.cat([g.flatten() for g in gradients(adapted, loss)]) for loss in (packed, padded))
    assert torch.nn.functional.cosine_similarity(one, two, dim=0) > 0.99
