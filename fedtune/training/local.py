"""What one client does in one round: a few optimiser steps on its own rows, starting from the adapter that is loaded.

One step: the rows' losses, summed over all response tokens and divided by their number (as transformers.Trainer counts
over accumulated batches); FedProx's pull towards the start; clipping; AdamW, which starts afresh in every round.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from fedtune.config.schema import Switch, TrainingConfig
from fedtune.errors import ClientError, ConfigError, Problem
from fedtune.models.adapter import AdaptedModel
from fedtune.models.base import is_out_of_memory
from fedtune.models.check import first_line
from fedtune.training import memory
from fedtune.training.layout import Layout, LayoutKind, choose_layout, row_limits
from fedtune.training.packing import Batch, pack, packed_attention, packed_logits, padded_logits, summed_loss

if TYPE_CHECKING:
    from fedtune.data.tokenize import TokenizedRows

log = logging.getLogger(__name__)

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StepReport:
    """One optimiser step."""

    step: int
    """Counted from 1."""
    steps: int
    """Of the round."""
    loss: float
    """Mean loss per response token, before the step."""
    gradient_norm: float
    """Before clipping."""
    rows: int
    tokens: int
    """Of this step's rows, prompts included."""
    seconds: float
    """That this step took."""


@dataclass(frozen=True)
class LocalResult:
    """One client's round; the trained adapter is in the model."""

    losses: tuple[float, ...]
    """Mean loss per response token of each step."""
    steps: int
    rows: int
    """Rows processed; a row of several epochs counts as often."""
    tokens: int
    """Tokens of those rows, prompts included."""
    response_tokens: int
    """Tokens that the loss was computed on."""
    seconds: float
    learning_rate: float
    layout: Layout
    """How rows shared a forward pass in the step with the longest row."""


def train_locally(
    adapted: AdaptedModel,
    rows: TokenizedRows,
    steps: Sequence[Indices],
    training: TrainingConfig,
    *,
    learning_rate: float,
    seed: Sequence[int],
    proximal_mu: float = 0.0,
    trained: Collection[str] | None = None,
    adjust: Callable[[Mapping[str, torch.nn.Parameter]], None] | None = None,
    gradient_checkpointing: Switch = "auto",
    on_step: Callable[[StepReport], None] | None = None,
    timeout_s: float | None = None,
) -> LocalResult:
    """Train the adapter in `adapted`, in place, on the rows of each step; the base model does not change.

    Args:
        adapted: holds the adapter to start from, and afterwards the trained one.
        rows: the client's tokenised rows.
        steps: indices into `rows` for each optimiser step, (rows_in_step,) each.
        training: optimiser, weight decay and clipping.
        learning_rate: of the whole round.
        seed: of the dropout; torch's own generators are left as they were.
        proximal_mu: FedProx's weight of mu/2 · ||w - w_start||² (https://arxiv.org/abs/1812.06127).
        trained: names of the adapter's tensors that are trained; the others stay as they are. None trains all.
        adjust: is given the trained parameters after every step's gradient is computed, and may change the gradient.
        gradient_checkpointing: `auto` turns it on when memory is short.
        on_step: is called after every step.
        timeout_s: longest duration; looked at between steps.

    Raises:
        ClientError: nothing to train on, loss or gradient not finite, out of memory, or out of time. The adapter in
            `adapted` is then of no use.
    """
    if not steps:
        raise ClientError("This client has no rows to train on.")
    started = time.monotonic()
    named = {
        name: parameter for name, parameter in adapted.named_parameters().items() if trained is None or name in trained
    }
    parameters = list(named.values())
    start = [parameter.detach().clone() for parameter in parameters] if proximal_mu else []
    optimizer = make_optimizer(parameters, training, learning_rate)
    longest = max(map(len, rows.input_ids))
    gradients = _Gradients(adapted, parameters, gradient_checkpointing, longest)
    layouts = [gradients.layout(max(len(rows.input_ids[i]) for i in indices)) for indices in steps]
    losses: list[float] = []
    row_count = token_count = response_count = 0
    with _training(adapted, seed), _frozen(adapted, named):
        for number, indices in enumerate(steps, start=1):
            began = time.monotonic()
            if timeout_s is not None and began - started > timeout_s:
                raise ClientError(
                    f"Training took longer than {timeout_s:g} s: {number - 1} of {len(steps)} steps done."
                )
            ids = [rows.input_ids[i] for i in indices]
            prompts = [int(rows.prompt_lengths[i]) for i in indices]
            responses = sum(len(row) - max(1, prompt) for row, prompt in zip(ids, prompts, strict=True))
            loss = gradients.compute(ids, prompts, responses)
            if proximal_mu:
                _add_proximal_term(parameters, start, proximal_mu)
            if adjust is not None:
                adjust(named)
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            # The only wait for the GPU in a step, and in time: what is not finite never reaches the weights.
            loss_value, norm_value = torch.stack([loss, norm]).tolist()
            if not math.isfinite(loss_value) or not math.isfinite(norm_value):
                what = "gradient" if math.isfinite(loss_value) else "loss"
                raise ClientError(f"The {what} of step {number} is not finite.")
            if training.gradient_clip:
                torch.nn.utils.clip_grads_with_norm_(parameters, training.gradient_clip, norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss_value)
            tokens = sum(map(len, ids))
            row_count, token_count, response_count = (
                row_count + len(ids),
                token_count + tokens,
                response_count + responses,
            )
            if on_step is not None:
                seconds = time.monotonic() - began
                on_step(StepReport(number, len(steps), loss_value, norm_value, len(ids), tokens, seconds))
    return LocalResult(
        losses=tuple(losses),
        steps=len(steps),
        rows=row_count,
        tokens=token_count,
        response_tokens=response_count,
        seconds=time.monotonic() - started,
        learning_rate=learning_rate,
        layout=max(layouts, key=lambda layout: _SLOWNESS.index(layout.kind)),
    )


def check_trainable(adapted: AdaptedModel) -> None:
    """Run one short row forward and backward: what cannot be trained is refused before it costs anything.

    Raises:
        ConfigError: the model, with this adapter, fails in training mode, or no tensor of the adapter receives a gradient.
    """
    inner, device = adapted.base.model, adapted.base.device
    vocabulary = inner.get_input_embeddings().weight.shape[0]
    batch = pack([np.arange(vocabulary // 4, vocabulary // 4 + _TRIED_TOKENS, dtype=np.int32)], [1], device)
    bf16 = adapted.base.compute_dtype == torch.bfloat16
    with _training(adapted, (0,)):
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = summed_loss(padded_logits(adapted.model, batch), batch)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            reached = any(parameter.grad is not None for parameter in adapted.parameters())
        except Exception as error:  # a model's code raises whatever it likes
            if is_out_of_memory(error):
                return  # training takes less memory where it runs out
            problem = f"{type(inner).__name__} fails with this adapter ({type(error).__name__}: {first_line(error)})"
            raise ConfigError(
                [Problem("adapter.targets", f"{problem}; name other modules or choose another base")]
            ) from error
    if not reached:
        problem = f"no tensor of the adapter receives a gradient in {type(inner).__name__}; name other modules"
        raise ConfigError([Problem("adapter.targets", problem)])


_TRIED_TOKENS = 8


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter], training: TrainingConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """Return a fresh optimiser; betas and epsilon are AdamW's usual ones."""
    if training.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=training.weight_decay, fused=True)
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    # Paging moves state between the GPU's memory and the machine's; on the CPU there is nothing to move.
    kind = PagedAdamW8bit if training.optimizer == "paged_adamw_8bit" and parameters[0].is_cuda else AdamW8bit
    optimizer: torch.optim.Optimizer = kind(parameters, lr=learning_rate, weight_decay=training.weight_decay)
    return optimizer


_SLOWNESS: tuple[LayoutKind, ...] = ("packed", "padded", "row by row")


class _Gradients:
    """Computes a step's gradient in as few passes as the model and memory allow; all ways give the same result."""

    def __init__(
        self, adapted: AdaptedModel, parameters: list[torch.nn.Parameter], checkpointing: Switch, longest: int
    ) -> None:
        self.model, self.inner, self.device = adapted.model, adapted.base.model, adapted.base.device
        self.parameters = parameters
        self.longest = longest
        self.may_checkpoint = checkpointing == "auto"
        bf16 = adapted.base.compute_dtype == torch.bfloat16
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        if (limits := memory.known.get(self.model)) is None:
            tokens = memory.CPU_TOKENS if self.device.type == "cpu" else 2**31
            suggested = memory.suggests_checkpointing(self.inner, self.device)
            limits = memory.known[self.model] = memory.Limits(tokens, suggested)
        if checkpointing != "auto":
            limits.checkpointing = checkpointing == "on"
        self.limits = limits
        self.row_limit = min((limit.tokens for limit in row_limits(self.inner)), default=longest)

    def layout(self, longest: int) -> Layout:
        """Return how the rows of a step whose longest row has so many tokens share a pass.

        It depends on the model and on the client's rows only, not on what was trained before: a resumed run adds up in the
        same order.
        """
        # What the model does with rows within its window says nothing about longer rows.
        tried = min(self.longest, self.row_limit) if longest <= self.row_limit else self.longest
        if tried not in self.limits.layouts:
            self.limits.layouts[tried] = layout = self._choose(tried)
            if layout.kind == "row by row" or layout.unexpected:
                log.warning("Training is slower: each pass holds %s", _description(layout))
            else:
                log.info("Each pass of training holds %s", _description(layout))
        return self.limits.layouts[tried]

    def _choose(self, longest: int) -> Layout:
        """Try layouts on rows of `longest` tokens, or on as long ones as memory holds."""
        tried = longest
        while True:
            try:
                with self.autocast:
                    return choose_layout(self.inner, self.parameters, tried)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Out here the failed pass's tensors are no longer held by the exception.
            torch.cuda.empty_cache()
            tried //= 2
            if tried < memory.SHORTEST_TOKENS:
                raise ClientError(_NO_MEMORY)
            log.warning(
                "Memory ran out while fedtune tried how rows of %d tokens can share a pass; it tries rows of %d.",
                longest,
                tried,
            )

    def compute(self, ids: Sequence[npt.NDArray[np.int32]], prompts: Sequence[int], responses: int) -> torch.Tensor:
        """Set the parameters' gradients for these rows and return the mean loss per response token, on the device."""
        while True:
            try:
                return self._attempt(ids, prompts, responses)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                lengths = [len(row) for row in ids]
                if not self.limits.retreat(lengths, may_checkpoint=self.may_checkpoint):
                    raise ClientError(_NO_MEMORY) from None
            # Out here the failed pass's tensors are no longer held by the exception.
            for parameter in self.parameters:
                parameter.grad = None
            torch.cuda.empty_cache()

    def _attempt(self, ids: Sequence[npt.NDArray[np.int32]], prompts: Sequence[int], responses: int) -> torch.Tensor:
        lengths = [len(row) for row in ids]
        kind = self.layout(max(lengths)).kind
        limit = 0 if kind == "row by row" else self.limits.tokens
        total = torch.zeros((), device=self.device)
        with (
            packed_attention(self.inner) if kind == "packed" else nullcontext(),
            _checkpointing(self.inner, self.limits.checkpointing),
        ):
            for run in memory.cut(lengths, limit, padded=kind != "packed"):
                batch = pack(ids[run], prompts[run], self.device)
                loss = self._loss(batch, packed=kind == "packed") / responses
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
        return total

    def _loss(self, batch: Batch, *, packed: bool) -> torch.Tensor:
        with self.autocast:
            logits = packed_logits(self.model, batch) if packed else padded_logits(self.model, batch)
            return summed_loss(logits, batch)


_NO_MEMORY = "The device's memory does not hold a single row of training."


def _description(layout: Layout) -> str:
    what = {
        "packed": "several rows end to end",
        "padded": "several rows with padding",
        "row by row": "a single row",
    }[layout.kind]
    return what + (f" ({layout.reason})." if layout.reason else ".")


@torch.no_grad()
def _add_proximal_term(parameters: Sequence[torch.nn.Parameter], start: Sequence[torch.Tensor], mu: float) -> None:
    """Add mu · (w - w_start), the gradient of mu/2 · ||w - w_start||², to the parameters' gradients."""
    for parameter, anchor in zip(parameters, start, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter - anchor, alpha=mu)


@contextmanager
def _training(adapted: AdaptedModel, seed: Sequence[int]) -> Iterator[None]:
    """Training mode and seeded dropout inside; evaluation mode, no gradients, the caller's random state afterwards."""
    devices = range(torch.cuda.device_count()) if adapted.base.device.type == "cuda" else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0]))
        adapted.model.train()
        try:
            yield
        finally:
            adapted.model.eval()
            for parameter in adapted.parameters():
                parameter.grad = None


@contextmanager
def _frozen(adapted: AdaptedModel, trained: Collection[str]) -> Iterator[None]:
    """Compute no gradients for the adapter's other tensors inside."""
    others = [parameter for name, parameter in adapted.named_parameters().items() if name not in trained]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


@contextmanager
def _checkpointing(model: Any, on: bool) -> Iterator[None]:
    if not on or not model.supports_gradient_checkpointing:
        yield
        return
    renamed = hasattr(model, "activation_checkpointing_enable")  # transformers' name since 5.2x
    # Not the reentrant kind: it would need inputs with gradients, which a frozen base does not have.
    (model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable)(
        {"use_reentrant": False}
    )
    try:
        yield
    finally:
        (model.activation_checkpointing_disable if renamed else model.gradient_checkpointing_disable)()
