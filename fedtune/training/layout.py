"""Finds out on the loaded model which rows may share a forward pass, so that each gives what it gives alone.

    packed       rows laid end to end in one long row, no padding (packing.py)
    padded       a batch with one row each, padded on the right
    row by row   one pass for each row: what plain transformers computes, and right for every causal model

A faster layout is used only if it passes the probe: no gradient flows from one row's logits to another row's tokens, another
row's tokens change nothing, and logits and gradients equal those of the rows alone. Weights that are still random make a leak
small, but not zero, and zero is what the first of these checks asks for.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from fedtune.errors import ClientError
from fedtune.models.base import is_out_of_memory
from fedtune.training.packing import (
    Batch,
    OwnAttentionTermsError,
    Tokens,
    pack,
    packed_attention,
    packed_logits,
    padded_logits,
    summed_loss,
)

LayoutKind = Literal["packed", "padded", "row by row"]

_SHORT_ROWS = (7, 6, 5)
"""Tokens of the rows that show a leak."""
_COMPARED = 8
"""Logits of so many last tokens of each row are compared."""
_WINDOWS = (
    "attention_chunk_size",
    "attention_window_size",
    "keep_window_size",
    "local_attention",
    "local_attn_chunk_length",
    "lsh_attn_chunk_length",
    "sliding_window",
    "sliding_window_size",
    "window_size",
)
"""Config attributes of transformers' models that limit how far attention looks back; our packed attention knows none."""
_SELECTIONS = ("index_topk",)
"""Config attributes that limit how many tokens attention selects; with padding the selection is another one."""
_GROWING_ROPE = ("dynamic", "longrope")
"""Position encodings whose frequencies depend on the longest row of the pass."""


@dataclass(frozen=True)
class Layout:
    """How rows share a pass, and why not in a faster way."""

    kind: LayoutKind
    reason: str = ""
    """Why no faster layout is used; empty if packed."""
    unexpected: bool = False
    """Whether the reason is an error that no known limitation of a model explains."""


@dataclass(frozen=True)
class RowLimit:
    """The longest rows that may share a pass, by the model's config."""

    name: str
    """Of the config's attribute."""
    tokens: int
    pads: bool
    """Whether longer rows can still be padded to one batch."""


def row_limits(model: Any) -> tuple[RowLimit, ...]:
    """Return the limits that the config of `model` sets, the shortest first."""
    config = model.config.get_text_config()
    values = config.to_dict()
    limits = [
        RowLimit(name, values[name], name in _WINDOWS)
        for name in (*_WINDOWS, *_SELECTIONS)
        if type(values.get(name)) is int and values[name] > 0
    ]
    if values.get("index_topk_blocks") and values.get("index_block_size"):
        limits.append(
            RowLimit("index_topk_blocks", values["index_topk_blocks"] * values["index_block_size"], pads=False)
        )
    rope = values.get("rope_parameters") or {}
    for parameters in (rope, *rope.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") in _GROWING_ROPE:
            positions = (
                parameters.get("original_max_position_embeddings")
                or values.get("original_max_position_embeddings")
                or values.get("max_position_embeddings")
            )
            if positions:
                limits.append(RowLimit(f"rope_type {parameters['rope_type']}", positions, pads=False))
    return tuple(sorted(limits, key=lambda limit: limit.tokens))


def choose_layout(model: Any, parameters: Sequence[torch.Tensor], longest: int) -> Layout:
    """Return the fastest layout in which `model` gives for rows of up to `longest` tokens what it gives for each alone.

    Args:
        model: a transformers model in evaluation mode; modules of it may be adapted.
        parameters: what is trained; the backward pass is tried as well.
        longest: tokens of the longest row that will be trained.

    Raises:
        ClientError: no parameter receives a gradient.
        torch.OutOfMemoryError: the device's memory does not hold such a row. Other kinds of running out of memory pass as
            they are (`is_out_of_memory`).
    """
    limits = [limit for limit in row_limits(model) if longest > limit.tokens]
    probe = _Probe(model, parameters, longest)
    reasons: list[_Refusal] = []
    for kind, allowed in (("packed", not limits), ("padded", all(limit.pads for limit in limits))):
        if allowed:
            refusal = probe.refusal(kind)  # type: ignore[arg-type]
        else:
            first = limits[0] if kind == "packed" else next(limit for limit in limits if not limit.pads)
            refusal = _Refusal(f"rows of {longest} tokens are longer than the model's {first.name} of {first.tokens}")
        if refusal is None:
            reason = "; ".join(f"not packed: {each.text}" for each in reasons)
            return Layout(kind, reason, any(each.unexpected for each in reasons))  # type: ignore[arg-type]
        reasons.append(refusal)
    text = f"not packed: {reasons[0].text}; not padded: {reasons[1].text}"
    return Layout("row by row", text, any(each.unexpected for each in reasons))


@dataclass(frozen=True)
class _Refusal:
    text: str
    unexpected: bool = False


@dataclass(frozen=True)
class _Outcome:
    logits: torch.Tensor
    """(compared tokens, vocabulary), float32."""
    gradients: list[torch.Tensor | None]


class _Probe:
    """Short runs of one model, in one layout after another."""

    def __init__(self, model: Any, parameters: Sequence[torch.Tensor], longest: int) -> None:
        self.model, self.parameters = model, list(parameters)
        # int8 layers round to 16 bits inside.
        self.exact = model.dtype == torch.float32 and not getattr(model, "is_loaded_in_8bit", False)
        short = [min(length, longest) for length in _SHORT_ROWS]
        self.short = [self._row(length, offset) for offset, length in enumerate(short)]
        self.long = [self.short[0], self._row(longest, 3), self.short[2]]
        self.alone: _Outcome | None = None

    def refusal(self, kind: LayoutKind) -> _Refusal | None:
        """Return why rows cannot share a pass in this layout, or None if they can."""
        if kind == "packed" and (missing := _unpackable(self.model)):
            return _Refusal(missing)
        if self.alone is None:
            self.alone = self._rows_alone()
        try:
            with packed_attention(self.model) if kind == "packed" else nullcontext():
                return self._leak(kind) or self._difference(kind, self.alone)
        except OwnAttentionTermsError as error:
            return _Refusal(str(error))
        except Exception as error:
            # A model that does not take a layout may fail in any way; memory that runs out says nothing about the model.
            if is_out_of_memory(error):
                raise
            lines = str(error).strip().splitlines() or [""]
            return _Refusal(f"the model raised {type(error).__name__}: {lines[0]}", unexpected=True)

    def _row(self, length: int, offset: int) -> Tokens:
        """Return `length` tokens from the middle of the vocabulary, where no tokenizer keeps its special ones."""
        quarter = max(1, self.model.config.get_text_config().vocab_size // 4)
        return np.array([quarter + (i * 7 + offset * 11) % quarter for i in range(length)], np.int32)

    def _batch(self, rows: Sequence[Tokens]) -> Batch:
        return pack(rows, [max(1, len(row) - _COMPARED) for row in rows], self.model.device)

    def _logits(self, kind: LayoutKind, batch: Batch) -> torch.Tensor:
        return packed_logits(self.model, batch) if kind == "packed" else padded_logits(self.model, batch)

    def _outcome(self, kind: LayoutKind, rows: Sequence[Tokens]) -> _Outcome:
        batch = self._batch(rows)
        logits = self._logits(kind, batch)
        loss = summed_loss(logits, batch)
        if not loss.requires_grad:
            raise ClientError(
                "No tensor of the adapter receives a gradient in this model: choose other adapter.targets."
            )
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return _Outcome(logits.detach().float(), list(gradients))

    def _rows_alone(self) -> _Outcome:
        outcomes = [self._outcome("row by row", [row]) for row in self.long]
        gradients = [_sum([outcome.gradients[i] for outcome in outcomes]) for i in range(len(self.parameters))]
        return _Outcome(torch.cat([outcome.logits for outcome in outcomes]), gradients)

    def _difference(self, kind: LayoutKind, alone: _Outcome) -> _Refusal | None:
        """Compare logits and gradients with those of the rows alone."""
        found = self._outcome(kind, self.long)
        tolerance = 1e-4 if self.exact else 0.1
        for what, one, two in (
            ("logits", [found.logits], [alone.logits]),
            ("gradients", found.gradients, alone.gradients),
        ):
            difference, size = _distance(one, two), _distance(two, [None] * len(two))
            if not difference <= tolerance * size:  # also where it is not a number
                share = difference / size if size else math.inf
                return _Refusal(f"its {what} differ from those of the rows alone by {share:.1e} of their size")
        return None

    def _leak(self, kind: LayoutKind) -> _Refusal | None:
        """Look whether the middle one of three short rows sees the others."""
        refusal = _Refusal("a row's logits depend on the other rows of its pass")
        batch = self._batch(self.short)
        with _embeddings(self.model) as embedded:
            logits = self._middle(self._logits(kind, batch), batch)
            # Weights that differ, so that nothing cancels out.
            weights = torch.linspace(0.5, 1.5, logits.numel(), device=logits.device).reshape(logits.shape)
            gradients = torch.autograd.grad((logits.float() * weights).sum(), embedded, allow_unused=True)
        own = _own_tokens(kind, batch.lengths)
        for gradient in gradients:
            if gradient is None or math.prod(gradient.shape[:-1]) != len(own):
                continue  # not one vector for each token, such as a table of relative positions
            others = gradient.reshape(len(own), -1)[~own.to(gradient.device)]
            if bool(others.nan_to_num().any()):  # padding may give what is not a number, which goes nowhere
                return refusal
        reversed_others = [row[::-1].copy() if i != 1 else row for i, row in enumerate(self.short)]
        with torch.no_grad():
            changed = self._batch(reversed_others)
            after = self._middle(self._logits(kind, changed), changed).float()
        moved = (after - logits.detach().float()).abs().max()
        return None if bool(moved <= (1e-5 if self.exact else 0.05) * after.abs().max()) else refusal

    @staticmethod
    def _middle(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        first = min(_COMPARED, batch.lengths[0] - 1)
        return logits[first : first + min(_COMPARED, batch.lengths[1] - 1)]


def _unpackable(model: Any) -> str:
    """Return what a model lacks for packed passes, if anything."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return "its forward pass has no logits_to_keep"
    settable: Callable[[], bool] | None = getattr(model, "_can_set_attn_implementation", None)
    if settable is None or not settable():
        return "its attention is not taken from transformers' interface"
    return ""


@contextmanager
def _embeddings(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the outputs of all embeddings inside, each cut off from what lies before it."""
    found: list[torch.Tensor] = []

    def cut(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1].clone()  # some models change it in place

    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    handles = [table.register_forward_hook(cut) for table in tables]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _own_tokens(kind: LayoutKind, lengths: Sequence[int]) -> torch.Tensor:
    """Return (tokens of the pass,) bool: those of the middle row."""
    longest = max(lengths)
    grid = torch.zeros(len(lengths), longest, dtype=torch.bool)
    grid[1, : lengths[1]] = True
    if kind == "padded":
        return grid.flatten()
    return torch.cat([grid[row, :length] for row, length in enumerate(lengths)])


def _sum(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present).sum(0) if present else None


def _distance(one: Sequence[torch.Tensor | None], two: Sequence[torch.Tensor | None]) -> float:
    """Return the Euclidean norm of the difference; None is zero."""
    total = 0.0
    for left, right in zip(one, two, strict=True):
        difference = right if left is None else left if right is None else left - right
        if difference is not None:
            total = math.hypot(total, float(torch.linalg.vector_norm(difference.float())))
    return total
