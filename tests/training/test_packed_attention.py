"""Rows of about one length are attended to in one call, others one by one: both equal plain attention, values and gradients."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fedtune.training import packing


@pytest.mark.parametrize("lengths", [(5, 5, 4), (3,), (1, 2, 40), (7, 1)])
@pytest.mark.parametrize("most_waste", [0.0, 1.5, 1e9])
def test_both_ways_equal_plain_attention(
    lengths: tuple[int, ...], most_waste: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_MOST_WASTE", most_waste)
    torch.manual_seed(0)
    tokens, heads, kv_heads, size = sum(lengths), 4, 2, 8
    query = torch.randn(1, heads, tokens, size, requires_grad=True)
    key, value = (torch.randn(1, kv_heads, tokens, size, requires_grad=True) for _ in range(2))
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    out, _ = packing._attend(
        torch.nn.Identity(), query, key, value, None, cu_seq_lens_q=starts, row_lengths=lengths, scaling=0.3
    )
    assert out.shape == (1, tokens, heads, size)
    # Plainly: one mask over all tokens.
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (row[:, None] == row[None]) & torch.ones(tokens, tokens).tril().bool()
    plain = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(plain)
    ours = torch.autograd.grad((out * weights).sum(), (query, key, value))
    theirs = torch.autograd.grad((plain * weights).sum(), (query, key, value))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
