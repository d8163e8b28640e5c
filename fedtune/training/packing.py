"""Runs rows of uneven length through the model in one pass without padding, each as if it were alone.

Rows are laid end to end as one long row. Positions start again at 0 in each, and attention is confined to each:

    rows       [7 3 9 4] [5 2]          prompt lengths 2 and 1
    input_ids   7 3 9 4   5 2
    positions   0 1 2 3   0 1
    kept          1 2     4             the position before each response token: logits are computed here only
    targets       9 4     2

A model that does not take attention from transformers' interface, or mixes tokens in another way, gets another layout
(layout.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from fedtune.models.compat import set_attention

ATTENTION = "fedtune_packed"
"""Name of our attention in transformers' interface."""

Tokens = npt.NDArray[np.int32]

_MOST_WASTE = 1.5
"""Rows are attended to in one call as long as padding makes that so many times the work at most."""


_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Whether the kernel takes fewer heads of keys than of queries; torch before 2.12 has no such option."""

_OWN_TERMS = ("softcap", "s_aux", "position_bias")
"""What models add to attention and ours does not."""


class OwnAttentionTermsError(NotImplementedError):
    """The model's attention computes something that packed attention does not."""


@dataclass(frozen=True)
class Batch:
    """Rows laid end to end, on the model's device."""

    input_ids: torch.Tensor
    """(1, tokens)"""
    positions: torch.Tensor
    """(1, tokens), from 0 in each row."""
    kept: torch.Tensor
    """(responses,): where the next token is one to learn."""
    targets: torch.Tensor
    """(responses,): those next tokens."""
    starts: torch.Tensor
    """(rows + 1,) int32: where each row starts, and where the last one ends."""
    lengths: tuple[int, ...]
    """Tokens of each row."""


def pack(ids: Sequence[Tokens], prompt_lengths: Sequence[int], device: torch.device) -> Batch:
    """Lay rows end to end; of each, the tokens behind its prompt are learnt (a very first token never is)."""
    lengths = tuple(len(row) for row in ids)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    kept = np.concatenate(
        [
            np.arange(start + max(1, prompt) - 1, start + length - 1)
            for start, prompt, length in zip(starts[:-1], prompt_lengths, lengths, strict=True)
        ]
    )
    tokens = np.concatenate(ids)

    def to_device(array: npt.NDArray[Any], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        # From pinned memory the copy does not wait for the GPU.
        tensor = torch.from_numpy(array).to(dtype)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    return Batch(
        input_ids=to_device(tokens)[None],
        positions=to_device(np.concatenate([np.arange(n) for n in lengths]))[None],
        kept=to_device(kept),
        targets=to_device(tokens[kept + 1]),
        starts=to_device(starts, torch.int32),
        lengths=lengths,
    )


def packed_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Return (responses, vocabulary) logits in one pass without padding; needs `packed_attention` around it."""
    logits: torch.Tensor = model(
        input_ids=batch.input_ids,
        position_ids=batch.positions,
        logits_to_keep=batch.kept,
        use_cache=False,
        cu_seq_lens_q=batch.starts,
        row_lengths=batch.lengths,
    ).logits
    return logits[0]


def padded_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Return the same logits the plain way: one row of the batch per row, padded on the right."""
    longest = max(batch.lengths)
    # (rows, longest), true where there is a token
    mask = torch.arange(longest)[None] < torch.tensor(batch.lengths)[:, None]
    mask = mask.to(batch.input_ids.device)
    ids = torch.zeros_like(mask, dtype=torch.int64)
    ids[mask] = batch.input_ids[0]
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    return logits[mask][batch.kept]


def summed_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the sum of the cross entropies of the response tokens, in float32."""
    return cross_entropy(logits.float(), batch.targets, reduction="sum")


@contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """Switch the transformers model `model` to our attention inside this context, and back to its own."""
    # The parts of a model may have configs, and attention, of their own.
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    own = [(config, config._attn_implementation) for config in configs.values()]
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        for config, implementation in own:
            set_attention(config, implementation)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    cu_seq_lens_q: torch.Tensor | None = None,
    row_lengths: tuple[int, ...] = (),
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each row to itself.

    Args:
        query: (1, heads, tokens, head_dim); key and value: (1, kv_heads, tokens, head_dim).
        cu_seq_lens_q: where the rows start, on the device.
        row_lengths: their lengths, on the host.

    Returns:
        (1, tokens, heads, head_dim), and no attention weights.
    """
    if terms := [name for name in _OWN_TERMS if others.get(name) is not None]:
        raise OwnAttentionTermsError(f"its attention has terms of its own: {', '.join(terms)}")
    if cu_seq_lens_q is None:
        raise OwnAttentionTermsError("it does not tell its attention where rows start")
    if attention_mask is not None:  # transformers builds none for us (_no_mask): this one is the model's own
        raise OwnAttentionTermsError("it builds attention masks of its own")
    if not getattr(module, "is_causal", True):
        raise OwnAttentionTermsError("its attention looks at later tokens")
    window = others.get("sliding_window")
    if window is not None and max(row_lengths) > window:
        raise OwnAttentionTermsError(f"its attention looks back {window} tokens at most")
    gqa = query.shape[1] != key.shape[1]
    if not dropout and _has_kernel(query, value):
        longest = max(row_lengths)
        # (tokens, heads, head_dim); a window of (-1, 0) is causal attention
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        borders = (cu_seq_lens_q, cu_seq_lens_q, longest, longest)
        groups: dict[str, Any] = {"enable_gqa": gqa} if _TAKES_GROUPS else {}
        if gqa and not _TAKES_GROUPS:
            k, v = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (k, v))
        out = varlen_attn(q, k, v, *borders, scale=scaling, window_size=(-1, 0), **groups)
        return out[None], None  # type: ignore[call-overload]
    options: dict[str, Any] = {"dropout_p": dropout, "is_causal": True, "scale": scaling, "enable_gqa": gqa}
    if len(row_lengths) * max(row_lengths) ** 2 <= _MOST_WASTE * sum(length**2 for length in row_lengths):
        # Rows of about one length: one call on all of them. Padding stands behind each row, where a causal row never looks.
        slots = _slots(row_lengths, query.device)
        q, k, v = (_spread(tensor, slots, row_lengths) for tensor in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)  # (rows, longest, heads, head_dim)
        return out.flatten(0, 1).index_select(0, slots)[None], None
    segments = (torch.split(tensor, list(row_lengths), dim=2) for tensor in (query, key, value))
    rows = [scaled_dot_product_attention(q, k, v, **options) for q, k, v in zip(*segments, strict=True)]
    return torch.cat(rows, dim=2).transpose(1, 2).contiguous(), None


@lru_cache(maxsize=8)
def _slots(row_lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return where each token lies in a (rows, longest) grid of tokens, flattened: (tokens,)."""
    longest = max(row_lengths)
    places = [np.arange(row * longest, row * longest + length) for row, length in enumerate(row_lengths)]
    return torch.from_numpy(np.concatenate(places)).to(device)


def _spread(tensor: torch.Tensor, slots: torch.Tensor, row_lengths: tuple[int, ...]) -> torch.Tensor:
    """Return (1, heads, tokens, head_dim) as (rows, heads, longest, head_dim), zero where a row has ended."""
    shape = (len(row_lengths), max(row_lengths), tensor.shape[1], tensor.shape[3])
    grid = tensor.new_zeros(shape[0] * shape[1], *shape[2:])
    return grid.index_copy(0, slots, tensor[0].transpose(0, 1)).view(shape).transpose(1, 2)


def _has_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's attention for rows of varying length takes these: 16-bit numbers on a GPU, equal heads."""
    size = query.shape[-1]
    fits = size % 8 == 0 and size <= 256 and size == value.shape[-1]
    return fits and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


def _no_mask(*_args: Any, **_options: Any) -> None:
    """Build no mask: our attention knows the rows' borders."""


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, _no_mask)
