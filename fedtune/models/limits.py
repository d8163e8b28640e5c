"""What a base model can take of a row: token ids that have an embedding, and no more tokens than it has positions."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedtune.models.stored import POSITIONS

log = logging.getLogger(__name__)

_ELSEWHERE = ("vision", "visual", "image", "audio", "speech", "video")


@dataclass(frozen=True)
class Limits:
    """What rows a base model takes."""

    embeddings: int
    """Rows of the embedding: token ids are below."""
    positions: int | None
    """Tokens that the config says a row may have; None where it says nothing."""
    fixed: bool
    """Whether the model has a table of positions and fails behind its end; others compute on, without having learnt to."""


@dataclass(frozen=True)
class Excess:
    """A row that a base model cannot take."""

    place: int
    """The row's place in the sequence of rows."""
    token: int | None
    """The token id that has no embedding; None where the row is too long."""
    length: int
    """Tokens of the row."""


def limits_of(model: Any) -> Limits:
    """Return what rows `model` takes; a model on the meta device will do."""
    text_config = model.config.get_text_config(decoder=True)
    declared = next((n for name in POSITIONS if isinstance(n := getattr(text_config, name, None), int) and n > 0), None)
    table = _table_of_positions(model, declared) if declared else None
    # MPT's attention bias and Reformer's product of two tables end there as well.
    fixed = table is not None or getattr(text_config, "model_type", "") in ("mpt", "reformer")
    positions = min(declared, table) if declared and table else declared
    return Limits(int(model.get_input_embeddings().weight.shape[0]), positions, fixed)


def _table_of_positions(model: Any, declared: int) -> int | None:
    """Return the tokens that the model's table of positions holds, None where it computes positions instead."""
    for name, module in model.named_modules():
        if any(word in name for word in _ELSEWHERE):
            continue
        last = name.rpartition(".")[2]
        if isinstance(module, torch.nn.Embedding) and ("pos" in last or last == "wpe") and "rel" not in last:
            # OPT's table begins with two rows of its own, RoBERTa's behind the padding token.
            before = module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0)
            usable = int(module.num_embeddings) - int(before)
            if abs(usable - declared) <= 8:
                return usable
        for attribute in ("embed_positions", "pos_encoding"):  # GPT-J's and CTRL's sines
            held = getattr(module, attribute, None)
            if isinstance(held, torch.Tensor) and held.ndim == 2 and held.shape[0] == declared:
                return declared
    return None


def first_excess(rows: Iterable[Sequence[int] | npt.NDArray[np.int32]], limits: Limits) -> Excess | None:
    """Return the first row that holds a token without an embedding, or more tokens than fixed positions; None without one."""
    for place, ids in enumerate(rows):
        tokens = np.asarray(ids)
        beyond = tokens[tokens >= limits.embeddings]
        if len(beyond):
            return Excess(place, int(beyond[0]), len(ids))
        if limits.fixed and limits.positions is not None and len(ids) > limits.positions:
            return Excess(place, None, len(ids))
    return None


def warn_of_length(longest: int, limits: Limits, what: str, base: str) -> None:
    """Log a warning where `what` is longer than the base's config says that it has learnt."""
    if limits.positions is not None and not limits.fixed and longest > limits.positions:
        log.warning("%s has up to %d tokens, and %s was made for %d", what, longest, base, limits.positions)
