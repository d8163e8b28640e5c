"""Fast paths from questions to answers: many at a time, shared prefixes once, the last position's logits only.

The prompts of a benchmark begin alike: the state after their common prefix is computed once and reused, as deep as common
prefixes go. What remains of each prompt is sorted by length and batched to a token budget. Not every model allows that:
`PATHS` lists the ways from the quickest to the plainest, and `probe.choose_path` takes the first that answers as the model's
own `generate` does on one prompt at a time.
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
from fedtune.models.base import Base, is_out_of_memory
from fedtune.models.check import ends_of_text
from fedtune.models.compat import DynamicLayer, LinearAttentionCacheLayerMixin

Tokens = tuple[int, ...]

CPU_TOKENS, GPU_TOKENS = 2048, 32768
"""Tokens of a batch, padding included, to begin with; running out of memory halves it."""

_GROUPED = "TRANSFORMERS_SDPA_FORCE_GQA"

_LEAST_MEMBERS, _LEAST_GAIN = 8, 16
"""A deeper common prefix is worth a pass of its own from so many prompts and so many tokens on."""

_WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size", "attention_window_size", "window_size")
"""Names of windows and chunks of attention in configs."""


@dataclass(frozen=True)
class AnswerPath:
    """One way of computing answers."""

    name: str
    """In results, journals and on the terminal."""
    padding: Literal["right", "left", "none"]
    """Which side of a batch's shorter rows is filled; "none": all rows of a batch are equally long."""
    shares_prefixes: bool = False
    own_masks: bool = False
    """Leave out masks, or pass our own, where a plain causal mask is enough; else the model builds its masks from ones and
    zeros for tokens and padding."""


PATHS = (
    AnswerPath("shared prefixes", "right", shares_prefixes=True, own_masks=True),
    AnswerPath("shared prefixes, the model's own masks", "right", shares_prefixes=True),
    AnswerPath("batches padded on the right", "right"),
    AnswerPath("batches padded on the left", "left"),
    AnswerPath("batches of equal length", "none"),
)
"""From the quickest to the plainest; those that do not pad on the right go through the model's own `generate`."""


class UnsupportedPathError(Exception):
    """A model's cache or output is not what a path needs; the text says why."""


@dataclass(frozen=True)
class Request:
    """One prompt, ready for the model."""

    tokens: Tokens
    """Of the wrapped prompt, with the tokenizer's special tokens."""
    new_tokens: int
    """Most tokens of the answer."""


@dataclass(frozen=True)
class Reply:
    """The model's greedy answer to one request."""

    place: int
    """The request's place in the list of requests."""
    text: str
    """The new tokens as text, special tokens left out."""
    gap: float
    """Logit of the first new token over the runner-up's: a small one may turn with the arithmetic."""
    tokens: Tokens = ()
    """The new tokens, up to and including one that ends the answer."""
    logits: torch.Tensor | None = field(default=None, repr=False, compare=False)
    """(new tokens, vocabulary) where they were asked for."""


@dataclass(frozen=True)
class Group:
    """Requests that begin with the same tokens."""

    prefix: Tokens
    members: tuple[int, ...]
    """Places of the requests."""


@dataclass
class Budget:
    """Tokens of a batch; shrinks for good when memory runs out."""

    tokens: int

    @classmethod
    def of(cls, device: torch.device) -> Budget:
        """Return the budget to begin with on `device`."""
        return cls(GPU_TOKENS if device.type == "cuda" else CPU_TOKENS)


@dataclass
class Work:
    """What the answers have cost so far."""

    prompt_tokens: int = 0
    """Tokens of the prompts, each prompt counted whole."""
    computed_tokens: int = 0
    """Tokens that went through the model: shared prefixes once, padding included."""
    halvings: list[int] = field(default_factory=list)
    """Token budgets after running out of memory."""


def tokenize(base: Base, prompts: Sequence[str]) -> list[Tokens]:
    """Return the tokens of wrapped prompts, special tokens included, as `tokenizer(prompt)` gives them."""
    return [tuple(ids) for ids in base.tokenizer(list(prompts))["input_ids"]] if prompts else []


def group_by_prefix(sequences: Sequence[Tokens]) -> list[Group]:
    """Group token sequences by their common prefixes; every sequence keeps at least one token of its own.

    Returns:
        Groups in which every place occurs once; small branches stay with the group that they branch off from.
    """
    order = sorted(range(len(sequences)), key=lambda place: sequences[place])
    groups: list[Group] = []

    def shared(low: int, high: int) -> int:
        # Of sorted sequences the first and the last have the least in common.
        first, last = sequences[order[low]], sequences[order[high - 1]]
        most = min(len(sequences[place]) for place in order[low:high]) - 1
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
    """Answer requests greedily, batch by batch, in an order of our own choosing.

    Args:
        base: The base model; an adapter that is attached to it acts.
        requests: Tokens and lengths of answers.
        budget: Tokens of a batch.
        work: Is added to.
        path: How; `probe.choose_path` says which are exact for a model.
        keep_logits: Replies carry their logits.

    Yields:
        The replies of one batch.

    Raises:
        MissingError: the device's memory does not hold a single question.
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
        # Longest first: the first batch is the one that memory may not hold.
        waiting = sorted(group.members, key=lambda place: -lengths[place])
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
                    raise no_room(lengths[batch[0]]) from None
                budget.tokens = max(1, budget.tokens // 2)
                work.halvings.append(budget.tokens)
                torch.cuda.empty_cache()
                continue
            waiting = waiting[len(batch) :]
            yield replies


def no_room(length: int) -> MissingError:
    """Return the error that says that memory does not hold a question of `length` tokens."""
    return MissingError(f"The device's memory does not hold one question of {length} tokens.")


def smallest_window(model: Any) -> int | None:
    """Return the tokens of the model's smallest attention window or chunk; None where attention sees all tokens."""
    config = model.config.get_text_config(decoder=True)
    found = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    found += [getattr(config, name, None) for name in _WINDOWS]
    return min((int(size) for size in found if isinstance(size, int) and size > 0), default=None)


def _next_batch(
    requests: Sequence[Request], waiting: Sequence[int], tokens: int, prefix: int, path: AnswerPath, window: int | None
) -> Sequence[int]:
    """Return how many of `waiting`, which is sorted from the longest on, are answered together."""
    longest = len(requests[waiting[0]].tokens)
    batch = waiting[: max(1, tokens // (longest - prefix))]
    if path.padding == "none":
        return list(takewhile(lambda place: len(requests[place].tokens) == longest, batch))
    if path.padding == "right" and window is not None and max(requests[place].new_tokens for place in batch) > 1:
        # Windows count padding as well: what is generated must see all of its row, whatever lies between.
        fitting = list(takewhile(lambda place: longest + requests[place].new_tokens <= window, batch))
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
        raise UnsupportedPathError("its state is kept in no cache of transformers'")
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
    rests = [requests[place].tokens[len(prefix) :] for place in batch]
    lengths = torch.tensor([len(rest) for rest in rests], device=base.device)  # (rows,)
    width, rows = max(map(len, rests)), len(rests)
    ids = torch.tensor([rest + (0,) * (width - len(rest)) for rest in rests], device=base.device)  # (rows, width)
    cache = _repeat(shared, rows) if shared is not None else None
    most = max(requests[place].new_tokens for place in batch)
    stops = stop_tokens(base)
    real = (torch.arange(width, device=base.device) < lengths[:, None]).long()
    mask = torch.cat([real.new_ones(rows, len(prefix)), real], dim=1)  # (rows, prefix + width)

    with _arithmetic(base):
        first_mask: torch.Tensor | None = mask
        if path.own_masks:
            # Padding lies to the right of everything that looks: the causal mask is enough, and quicker.
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
        limits = torch.tensor([requests[place].new_tokens for place in batch], device=base.device)  # (rows,)
        ends = torch.tensor(sorted(stops), dtype=torch.long, device=base.device)
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
    work.prompt_tokens += sum(len(requests[place].tokens) for place in batch)
    work.computed_tokens += rows * width + rows * (len(chosen) - 1)
    return _as_replies(base, requests, batch, chosen, steps, stops, keep_logits)


@torch.inference_mode()
def _generate_batch(
    base: Base, requests: Sequence[Request], batch: Sequence[int], work: Work, keep_logits: bool
) -> list[Reply]:
    """Answer one batch through the model's own `generate`; shorter rows are padded on the left, and masked there."""
    rows = [requests[place].tokens for place in batch]
    width = max(map(len, rows))
    pad = pad_token_of(base)
    ids = torch.tensor([(pad,) * (width - len(row)) + row for row in rows], device=base.device)  # (rows, width)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=base.device)
    stops = stop_tokens(base)
    out = base.model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max(requests[place].new_tokens for place in batch),
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_logits=True,
    )
    steps = [logits.float() for logits in (out.logits if keep_logits else out.logits[:1])]
    chosen = list(out.sequences[:, width:].unbind(dim=1))
    work.prompt_tokens += sum(map(len, rows))
    work.computed_tokens += len(rows) * (width + len(chosen) - 1)
    return _as_replies(base, requests, batch, chosen, steps, stops, keep_logits)


def _as_replies(
    base: Base,
    requests: Sequence[Request],
    batch: Sequence[int],
    chosen: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    stops: frozenset[int],
    keep_logits: bool,
) -> list[Reply]:
    """Return the replies of a batch from its tokens, (rows,) a step, and logits, (rows, vocabulary) a step."""
    best = steps[0].topk(2, dim=-1).values
    gaps = (best[:, 0] - best[:, 1]).tolist()
    columns = torch.stack(list(chosen), dim=1).tolist()
    replies = []
    for row, (place, tokens, gap) in enumerate(zip(batch, columns, gaps, strict=True)):
        kept = _until_stop(tokens[: requests[place].new_tokens], stops)
        text = base.tokenizer.decode(kept, skip_special_tokens=True)
        logits = torch.stack([step[row] for step in steps[: len(kept)]]) if keep_logits else None
        replies.append(Reply(place, text, gap, tuple(kept), logits))
    return replies


def _forward(base: Base, *, rows: torch.Tensor | None, **inputs: Any) -> tuple[torch.Tensor, Any]:
    """Run the model, its head on one position a row only, and return (rows, vocabulary) logits in float32 and the state.

    The model's own forward computes the logits, because many families scale or cap what the head gives.

    Args:
        base: The base model.
        rows: (rows,): the position whose logits are wanted in each row; None for no logits that matter.
        inputs: What the model's forward takes; an input that it does not know is left out.
    """
    model = base.model
    known = inspect.signature(model.forward).parameters
    if inputs.get("past_key_values") is not None and "past_key_values" not in known:
        raise UnsupportedPathError("its state is kept in no cache of transformers'")
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
    """Refuse caches that padding on the right would enter for good, and outputs without a cache."""
    if not isinstance(cache, Cache):
        raise UnsupportedPathError("its state is kept in no cache of transformers'")
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
        raise UnsupportedPathError("it keeps a running state, which padding would enter")


def stop_tokens(base: Base) -> frozenset[int]:
    """Return the tokens that end an answer: the tokenizer's EOS, which training teaches, and the generation config's."""
    return frozenset(ends_of_text(base.model, base.tokenizer))


def _until_stop(tokens: Sequence[int], stops: frozenset[int]) -> list[int]:
    """Return the tokens up to and including a stop token, which is text where the tokenizer does not call it special."""
    kept: list[int] = []
    for token in tokens:
        kept.append(token)
        if token in stops:
            break
    return kept


def pad_token_of(base: Base) -> int:
    """Return the token that `generate` pads with; one prompt at a time never needs it."""
    if base.tokenizer.pad_token_id is not None:
        return int(base.tokenizer.pad_token_id)
    return int(base.tokenizer.eos_token_id or 0)


def _repeat(cache: Cache, rows: int) -> Cache:
    """Return a copy of a one-row cache for `rows` rows; the original stays as it is."""
    if isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers):
        plain = DynamicCache()
        for number, layer in enumerate(cache.layers):
            plain.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), number)
        return plain
    other = copy.deepcopy(cache)
    other.reorder_cache(torch.zeros(rows, dtype=torch.long))
    return other


def _causal_mask(base: Base, past: int, width: int) -> torch.Tensor | None:
    """Return the mask that is added to the attention's scores, (1, 1, width, past + width), or None for transformers' own.

    Theirs is one of booleans a row, which torch's CPU kernel turns into numbers again in every layer.
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
    """bf16 arithmetic where the base computes in it; plain float32 elsewhere."""
    before = os.environ.get(_GROUPED)
    if _plain_cpu(base):
        # transformers copies keys and values for every head that shares them, unless told that the kernel can do without.
        os.environ[_GROUPED] = "1"
    try:
        with torch.autocast(base.device.type, torch.bfloat16, enabled=base.compute_dtype == torch.bfloat16):
            yield
    finally:
        if before is None:
            os.environ.pop(_GROUPED, None)
        else:
            os.environ[_GROUPED] = before
