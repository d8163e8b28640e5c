"""Requests to a model, its replies, and the settings of greedy decoding that all backends share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fedtune.models.base import Base
from fedtune.models.check import ends_of_text

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """One prompt, ready for the model."""

    tokens: Tokens
    """Tokens of the wrapped prompt, with the tokenizer's special tokens."""
    new_tokens: int
    """Most tokens of the answer."""


@dataclass(frozen=True)
class Reply:
    """The model's greedy answer to one request."""

    index: int
    """The request's index in the list of requests."""
    text: str
    """The new tokens as text, without special tokens."""
    gap: float
    """Logit of the first new token minus the runner-up's: where it is small, other arithmetic may give another token."""
    tokens: Tokens = ()
    """The new tokens, up to and including one that ends the answer."""
    logits: torch.Tensor | None = field(default=None, repr=False, compare=False)
    """(new tokens, vocabulary), where the caller wants them."""


def tokenize(base: Base, prompts: Sequence[str]) -> list[Tokens]:
    """Return the tokens of wrapped prompts, special tokens included, as `tokenizer(prompt)` gives them."""
    return [tuple(ids) for ids in base.tokenizer(list(prompts))["input_ids"]] if prompts else []


def stop_tokens(base: Base) -> frozenset[int]:
    """Return the tokens that end an answer: the tokenizer's EOS, which training teaches, and the generation config's."""
    return frozenset(ends_of_text(base.model, base.tokenizer))


def greedy(base: Base) -> dict[str, Any]:
    """Return the arguments with which the model's `generate` decodes greedily up to a stop token."""
    return {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "eos_token_id": sorted(stop_tokens(base)) or None,
    }


def pad_token_of(base: Base) -> int:
    """Return the token that `generate` pads with; one prompt at a time needs no padding."""
    if base.tokenizer.pad_token_id is not None:
        return int(base.tokenizer.pad_token_id)
    return int(base.tokenizer.eos_token_id or 0)
