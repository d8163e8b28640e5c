"""Packed passes against padded ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.data.tokenize import TokenizedRows
from fedtune.models.adapter import AdaptedModel
from fedtune.training import packing
from fedtune.training.layout import choose_layout
from fedtune.training.packing import (
    OwnAttentionTermsError,
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


def test_attention_with_terms_of_its_own_is_refused() -> None:
    q = torch.zeros(1, 2, 3, 8)
    starts = torch.tensor([0, 3])
    own: dict[str, Any] = {"cu_seq_lens_q": starts, "row_lengths": (3,)}
    with pytest.raises(OwnAttentionTermsError, match="softcap"):
        packing._attend(torch.nn.Identity(), q, q, q, None, softcap=30.0, **own)
    with pytest.raises(OwnAttentionTermsError, match="masks of its own"):
        packing._attend(torch.nn.Identity(), q, q, q, torch.zeros(1, 1, 3, 3), **own)
    with pytest.raises(OwnAttentionTermsError, match="looks back 2 tokens"):
        packing._attend(torch.nn.Identity(), q, q, q, None, sliding_window=2, **own)
    with pytest.raises(OwnAttentionTermsError, match="where rows start"):
        packing._attend(torch.nn.Identity(), q, q, q, None)
    both_ways = torch.nn.Identity()
    both_ways.is_causal = False
    with pytest.raises(OwnAttentionTermsError, match="later tokens"):
        packing._attend(both_ways, q, q, q, None, **own)
    packing._attend(torch.nn.Identity(), q, q, q, None, sliding_window=3, **own)


@pytest.mark.gpu
def test_packed_kernel_on_a_gpu_agrees_with_padded(make: Make, rows: TokenizedRows) -> None:
    adapted = make(torch.bfloat16)
    adapted.model.to("cuda")
    ids, prompts = list(rows.input_ids[:9]), rows.prompt_lengths[:9].tolist()
    batch = pack(ids, prompts, torch.device("cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        assert choose_layout(adapted.base.model, adapted.parameters(), 40).kind == "packed"
        padded = summed_loss(padded_logits(adapted.model, batch), batch)
        with packed_attention(adapted.base.model):
            packed = summed_loss(packed_logits(adapted.model, batch), batch)
    torch.testing.assert_close(packed, padded, rtol=0.01, atol=0)
    one, two = (torch.cat([g.flatten() for g in gradients(adapted, loss)]) for loss in (packed, padded))
    assert torch.nn.functional.cosine_similarity(one, two, dim=0) > 0.99
