"""Answers many requests at a time: shared prefixes are computed once, and logits only for the last position.

The prompts of a benchmark begin with the same tokens. The state after a common prefix is computed once and reused. The rest of
each prompt is sorted by length and batched to a token budget. This is not exact on every model: `PATHS` lists the alternatives
from the fastest to the simplest, and `probe.choose_path` takes the first that gives the same answers as the model's own
`generate` on one prompt at a time.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal

import torch
from transformers import Cache, DynamicCache

from fedtune.errors import MissingError
from fedtune.evaluation.backends.generation import Reply, Request, Tokens, greedy, pad_token_of, stop_tokens
from fedtune.models.base import Base, is_out_of_memory
from fedtune.models.compat import DynamicLayer, LinearAttentionCacheLayerMixin

CPU_TOKENS, GPU_TOKENS = 2048, 32768
"""Initial tokens of a batch, padding included; running out of memory halves the number."""

_GROUPED = "TRANSFORMERS_SDPA_FORCE_GQA"

_LEAST_MEMBERS, _LEAST_GAIN = 8, 16
"""A longer common prefix gets its own pass from so many prompts and so many additional tokens on."""

_WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size", "attention_window_size", "window_size")
"""Config keys of attention windows and chunks."""


@dataclass(frozen=True)
class AnswerPath:
    """One method of computing answers."""

    name: str
    """In results, journals and on the terminal."""
    padding: Literal["right", "left", "none"]
    """Side on which a batch's shorter rows are padded; "none": all rows of a batch have the same length."""
    shares_prefixes: bool = False
    own_masks: bool = False
    """Pass no mask, or one made here, where a plain causal mask is enough; otherwise the model builds its masks from ones and
    zeros for tokens and padding."""


PATHS = (
    AnswerPath("shared prefixes", "right", shares_prefixes=True, own_masks=True),
    AnswerPath("shared prefixes, the model's own masks", "right", shares_prefixes=True),
    AnswerPath("batches padded on the right", "right"),
    AnswerPath("batches padded on the left", "left"),
    AnswerPath("batches of equal length", "none"),
)
"""From the fastest to the simplest; those that do not pad on the right use the model's own `generate`."""


class UnsupportedPathError(Exception):
    """A path does not support a model's cache or output; the message gives the reason."""


@dataclass(frozen=True)
class Group:
    """Requests that begin with the same tokens."""

    prefix: Tokens
    members: tuple[int, ...]
    """Indices of the requests."""


@dataclass
class Budget:
    """Tokens of a batch; permanently reduced when memory runs out."""

    tokens: int

    @classmethod
    def of(cls, device: torch.device) -> Budget:
        """Return the initial budget on `device`."""
        return cls(GPU_TOKENS if device.type == "cuda" else CPU_TOKENS)


@dataclass
class Work:
    """Counts of the computation so far."""

    prompt_tokens: int = 0
    """Tokens of the complete prompts."""
    computed_tokens: int = 0
    """Tokens that went through the model: shared prefixes once, padding included."""
    halvings: list[int] = field(default_factory=list)
    """Token budgets after running out of memory."""


def group_by_prefix(sequences: Sequence[Tokens]) -> list[Group]:
    """Group token sequences by their common prefixes; every sequence keeps at least one token after the prefix.

    Returns:
        Groups that contain every index once; small groups stay in the group with the shorter prefix.
    """
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    groups: list[Group] = []

    def shared(low: int, high: int) -> int:
        # Of sorted sequences the first and the last have the least in common.
        first, last = sequences[order[low]], sequences[order[high - 1]]
        most = min(len(sequences[index]) for index in order[low:high]) - 1
        return min(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))), most)

    def split(low: int, high: int, depth: int) -> None:
        rest: list[int] = []
        start = low
        while start < high:
            end = start + 1
            while end < high and sequences[order[end]][depth] == sequences[order[start]][depth]:
                end += 1
            deeper = shared(start, end) if end - start >= _LEAST_MEMBERS and end - start < high - low else 0
            if deeper >= depth + _LEAST_GAIN:
                split(start, end, deeper)
            else:
                rest += order[start:end]
            start = end
        if rest:
            groups.append(Group(sequences[rest[0]][:depth], tuple(rest)))

    if sequences:
        split(0, len(sequences), shared(0, len(sequences)))
    return groups


def answer(
    base: Base,
    requests: Sequence[Request],
    budget: Budget,
    work: Work | None = None,
    path: AnswerPath = PATHS[0],
    *,
    keep_logits: bool = False,
) -> Iterator[list[Reply]]:
    """Answer requests greedily, batch by batch, in an order that reduces padding.

    Args:
        base: The base model, with any adapter that is attached to it.
        requests: In any order.
        budget: Tokens of a batch.
        work: Counts to increase.
        path: The method; `probe.choose_path` finds one that is exact for the model.
        keep_logits: Whether replies contain their logits.

    Yields:
        The replies of one batch.

    Raises:
        MissingError: a single question does not fit in the device's memory.
        UnsupportedPathError: the model does not allow this path.
    """
    work = work if work is not None else Work()
    lengths = [len(request.tokens) for request in requests]
    groups = [Group((), tuple(range(len(requests))))] if requests else []
    if path.shares_prefixes:
        groups = group_by_prefix([request.tokens for request in requests])
    window = smallest_window(base.model)
    for group in groups:
        cache = None
        if group.prefix and len(group.members) > 1:
            cache = _prefix_cache(base, group.prefix, work)
        else:
            group = Group((), group.members)
        # Longest first, so that a lack of memory shows in the first batch.
        waiting = sorted(group.members, key=lambda index: -lengths[index])
        while waiting:
            batch = _next_batch(requests, waiting, budget.tokens, len(group.prefix), path, window)
            try:
                if path.padding == "right":
                    replies = _answer_batch(base, requests, batch, group.prefix, cache, work, path, keep_logits)
                else:
                    replies = _generate_batch(base, requests, batch, work, keep_logits)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise memory_error(lengths[batch[0]]) from None
                budget.tokens = max(1, budget.tokens // 2)
                work.halvings.append(budget.tokens)
                torch.cuda.empty_cache()
                continue
            waiting = waiting[len(batch) :]
            yield replies


def memory_error(length: int) -> MissingError:
    """Return the error for a question of `length` tokens that does not fit in memory."""
    return MissingError(f"One question of {length} tokens does not fit in the device's memory.")


def smallest_window(model: Any) -> int | None:
    """Return the tokens of the model's smallest attention window or chunk; None where attention sees all tokens."""
    config = model.config.get_text_config(decoder=True)
    found = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    found += [getattr(config, name, None) for name in _WINDOWS]
    return min((int(size) for size in found if isinstance(size, int) and size > 0), default=None)


def _next_batch(
    requests: Sequence[Request], waiting: Sequence[int], tokens: int, prefix: int, path: AnswerPath, window: int | None
) -> Sequence[int]:
    """Return the first requests of `waiting`, which is sorted from the longest on, to answer together."""
    longest = len(requests[waiting[0]].tokens)
    batch = waiting[: max(1, tokens // (longest - prefix))]
    if path.padding == "none":
        return list(takewhile(lambda index: len(requests[index].tokens) == longest, batch))
    if path.padding == "right" and window is not None and max(requests[index].new_tokens for index in batch) > 1:
        # Windows count padding as well, and every new token must see its whole row.
        fitting = list(takewhile(lambda index: longest + requests[index].new_tokens <= window, batch))
        return fitting or batch[:1]
    return batch


@torch.inference_mode()
def _prefix_cache(base: Base, prefix: Tokens, work: Work) -> Cache:
    """Return the model's state after a prefix, for one row."""
    ids = torch.tensor([prefix], device=base.device)
    with _arithmetic(base):
        cache = _forward(base, rows=None, input_ids=ids, use_cache=True)[1]
    work.computed_tokens += len(prefix)
    if not isinstance(cache, Cache):
        raise UnsupportedPathError("its state is not in a transformers cache")
    return cache


@torch.inference_mode()
def _answer_batch(
    base: Base,
    requests: Sequence[Request],
    batch: Sequence[int],
    prefix: Tokens,
    shared: Cache | None,
    work: Work,
    path: AnswerPath = PATHS[0],
    keep_logits: bool = False,
) -> list[Reply]:
    rests = [requests[index].tokens[len(prefix) :] for index in batch]
    lengths = torch.tensor([len(rest) for rest in rests], device=base.device)  # (rows,)
    width, rows = max(map(len, rests)), len(rests)
    ids = torch.tensor([rest + (0,) * (width - len(rest)) for rest in rests], device=base.device)  # (rows, width)
    cache = _repeat(shared, rows) if shared is not None else None
    most = max(requests[index].new_tokens for index in batch)
    real = (torch.arange(width, device=base.device) < lengths[:, None]).long()
    mask = torch.cat([real.new_ones(rows, len(prefix)), real], dim=1)  # (rows, prefix + width)

    with _arithmetic(base):
        first_mask: torch.Tensor | None = mask
        if path.own_masks:
            # All padding is to the right of the tokens, so the causal mask is enough, and faster.
            first_mask = _causal_mask(base, len(prefix), width) if cache is not None else None
        logits, cache = _forward(
            base,
            rows=lengths - 1,
            input_ids=ids,
            attention_mask=first_mask,
            past_key_values=cache,
            use_cache=most > 1 or cache is not None,
        )
        if most > 1:
            _check_padding(cache)
        best = logits.topk(2, dim=-1)
        chosen, steps = [best.indices[:, 0]], [logits]
        limits = torch.tensor([requests[index].new_tokens for index in batch], device=base.device)  # (rows,)
        ends = torch.tensor(sorted(stop_tokens(base)), dtype=torch.long, device=base.device)
        over = torch.zeros(rows, dtype=torch.bool, device=base.device)  # answers that are complete
        for step in range(1, most):
            over |= torch.isin(chosen[-1], ends) | (limits <= step)
            if bool(over.all()):
                break
            mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
            logits, cache = _forward(
                base,
                rows=torch.zeros_like(lengths),
                input_ids=chosen[-1][:, None],
                attention_mask=mask,
                position_ids=(len(prefix) + lengths + step - 1)[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            chosen.append(logits.argmax(dim=-1))
            if keep_logits:
                steps.append(logits)
    work.prompt_tokens += sum(len(requests[index].tokens) for index in batch)
    work.computed_tokens += rows * width + rows * (len(chosen) - 1)
    return _as_replies(base, requests, batch, chosen, steps, keep_logits)


@torch.inference_mode()
def _generate_batch(
    base: Base, requests: Sequence[Request], batch: Sequence[int], work: Work, keep_logits: bool
) -> list[Reply]:
    """Answer one batch through the model's own `generate`, with shorter rows padded and masked on the left."""
    rows = [requests[index].tokens for index in batch]
    width = max(map(len, rows))
    pad = pad_token_of(base)
    ids = torch.tensor([(pad,) * (width - len(row)) + row for row in rows], device=base.device)  # (rows, width)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=base.device)
    out = base.model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max(requests[index].new_tokens for index in batch),
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_logits=True,
        **greedy(base),
    )
    steps = [logits.float() for logits in (out.logits if keep_logits else out.logits[:1])]
    chosen = list(out.sequences[:, width:].unbind(dim=1))
    work.prompt_tokens += sum(map(len, rows))
    work.computed_tokens += len(rows) * (width + len(chosen) - 1)
    return _as_replies(base, requests, batch, chosen, steps, keep_logits)


def _as_replies(
    base: Base,
    requests: Sequence[Request],
    batch: Sequence[int],
    chosen: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    keep_logits: bool,
) -> list[Reply]:
    """Return the replies of a batch from each step's tokens, (rows,), and logits, (rows, vocabulary)."""
    best = steps[0].topk(2, dim=-1).values
    gaps = (best[:, 0] - best[:, 1]).tolist()
    columns = torch.stack(list(chosen), dim=1).tolist()
    stops = stop_tokens(base)
    replies = []
    for row, (index, tokens, gap) in enumerate(zip(batch, columns, gaps, strict=True)):
        kept = _until_stop(tokens[: requests[index].new_tokens], stops)
        text = base.tokenizer.decode(kept, skip_special_tokens=True)
        logits = torch.stack([step[row] for step in steps[: len(kept)]]) if keep_logits else None
        replies.append(Reply(index, text, gap, tuple(kept), logits))
    return replies


def _forward(base: Base, *, rows: torch.Tensor | None, **inputs: Any) -> tuple[torch.Tensor, Any]:
    """Run the model, with its head on one position per row, and return (rows, vocabulary) logits in float32 and the state.

    The model's own forward computes the logits, because many families scale or cap the head's output.

    Args:
        base: The base model.
        rows: (rows,): the position of the logits in each row; None where the caller ignores the logits.
        inputs: Of the model's forward; inputs that it does not know are dropped.
    """
    model = base.model
    known = inspect.signature(model.forward).parameters
    if inputs.get("past_key_values") is not None and "past_key_values" not in known:
        raise UnsupportedPathError("its state is not in a transformers cache")
    inputs = {name: value for name, value in inputs.items() if name in known and value is not None}
    ids = inputs["input_ids"]
    wanted = torch.full((len(ids),), ids.shape[1] - 1, device=ids.device) if rows is None else rows

    def select(_module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = arguments[0] if arguments else None
        if not isinstance(hidden, torch.Tensor) or not hidden.is_floating_point() or hidden.shape[:-1] != ids.shape:
            return None
        return (hidden[torch.arange(len(ids), device=ids.device), wanted][:, None], *arguments[1:])

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(select) if isinstance(head, torch.nn.Module) else None
    try:
        out = model(**inputs, return_dict=True)
    finally:
        if hook is not None:
            hook.remove()
    logits = out.logits  # (rows, 1 or width, vocabulary)
    if logits.shape[1] != 1:
        logits = logits[torch.arange(len(ids), device=ids.device), wanted][:, None]
    return logits[:, 0].float(), out.get("past_key_values")


def _check_padding(cache: Any) -> None:
    """Refuse caches that padding on the right would change permanently, and outputs without a cache."""
    if not isinstance(cache, Cache):
        raise UnsupportedPathError("its state is not in a transformers cache")
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
        raise UnsupportedPathError("it keeps a running state, which padding would change")


def _until_stop(tokens: Sequence[int], stops: frozenset[int]) -> list[int]:
    """Return the tokens up to and including a stop token, which stays in the text unless the tokenizer calls it special."""
    kept: list[int] = []
    for token in tokens:
        kept.append(token)
        if token in stops:
            break
    return kept


def _repeat(cache: Cache, rows: int) -> Cache:
    """Return a copy of a one-row cache for `rows` rows."""
    if isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers):
        plain = DynamicCache()
        for number, layer in enumerate(cache.layers):
            plain.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), number)
        return plain
    other = copy.deepcopy(cache)
    other.reorder_cache(torch.zeros(rows, dtype=torch.long))
    return other


def _causal_mask(base: Base, past: int, width: int) -> torch.Tensor | None:
    """Return the mask to add to the attention's scores, (1, 1, width, past + width), or None for the one of transformers.

    That one has booleans for every row, which torch's CPU kernel converts to numbers in every layer.
    """
    window = smallest_window(base.model)
    if not _plain_cpu(base) or (window is not None and past + width > window):
        return None
    mask = torch.full((width, past + width), float("-inf"), dtype=torch.float32)
    return mask.triu(past + 1)[None, None]


def _plain_cpu(base: Base) -> bool:
    return base.device.type == "cpu" and base.compute_dtype == torch.float32


@contextmanager
def _arithmetic(base: Base) -> Iterator[None]:
    """Compute in bf16 where the base model does, and in float32 otherwise."""
    before = os.environ.get(_GROUPED)
    if _plain_cpu(base):
        # Without this, transformers copies keys and values for every head that shares them.
        os.environ[_GROUPED] = "1"
    try:
        with torch.autocast(base.device.type, torch.bfloat16, enabled=base.compute_dtype == torch.bfloat16):
            yield
    finally:
        if before is None:
            os.environ.pop(_GROUPED, None)
        else:
            os.environ[_GROUPED] = before
