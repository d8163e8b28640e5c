"""The fast path from questions to answers: many at a time, shared prefixes once, the last position's logits only.

The prompts of a benchmark begin alike: their instruction's key-values are computed once and reused, as deep as common
prefixes go. What remains of each prompt is sorted by length and batched to a token budget, padded on the right, where a causal
model does not look; the vocabulary's logits are computed for the last position alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from fedtune.errors import MissingError
from fedtune.models.base import Base
from fedtune.models.check import ends_of_text

Tokens = tuple[int, ...]

CPU_TOKENS, GPU_TOKENS = 2048, 32768
"""Tokens of a batch, padding included, to begin with; running out of memory halves it."""

_GROUPED = "TRANSFORMERS_SDPA_FORCE_GQA"

_LEAST_MEMBERS, _LEAST_GAIN = 8, 16
"""A deeper common prefix is worth a pass of its own from so many prompts and so many tokens on."""


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


def answer(base: Base, requests: Sequence[Request], budget: Budget, work: Work | None = None) -> Iterator[list[Reply]]:
    """Answer requests greedily, batch by batch, in an order of our own choosing.

    Args:
        base: The base model; an adapter that is attached to it acts.
        requests: Tokens and lengths of answers.
        budget: Tokens of a batch.
        work: Is added to.

    Yields:
        The replies of one batch.

    Raises:
        MissingError: the device's memory does not hold a single question.
    """
    work = work if work is not None else Work()
    lengths = [len(request.tokens) for request in requests]
    for group in group_by_prefix([request.tokens for request in requests]):
        cache = _prefix_cache(base, group, work)
        if cache is None:
            group = Group((), group.members)
        # Longest first: the first batch is the one that memory may not hold.
        waiting = sorted(group.members, key=lambda place: -lengths[place])
        while waiting:
            longest = lengths[waiting[0]] - len(group.prefix)
            batch = waiting[: max(1, budget.tokens // longest)]
            try:
                replies = _answer_batch(base, requests, batch, group.prefix, cache, work)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise MissingError(
                        f"The device's memory does not hold one question of {lengths[batch[0]]} tokens."
                    ) from None
                budget.tokens = max(1, budget.tokens // 2)
                work.halvings.append(budget.tokens)
                torch.cuda.empty_cache()
                continue
            waiting = waiting[len(batch) :]
            yield replies


@torch.inference_mode()
def _prefix_cache(base: Base, group: Group, work: Work) -> Any:
    """Return the key-values of the group's prefix, None where there is none or the model keeps another kind of state."""
    if not group.prefix or len(group.members) == 1:
        return None
    ids = torch.tensor([group.prefix], device=base.device)
    with _arithmetic(base):
        cache = base.model.get_decoder()(input_ids=ids, use_cache=True).past_key_values
    work.computed_tokens += len(group.prefix)
    plain = isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
    return cache if plain else None


@torch.inference_mode()
def _answer_batch(
    base: Base, requests: Sequence[Request], batch: Sequence[int], prefix: Tokens, shared: Any, work: Work
) -> list[Reply]:
    rests = [requests[place].tokens[len(prefix) :] for place in batch]
    lengths = torch.tensor([len(rest) for rest in rests], device=base.device)  # (rows,)
    width, rows = max(map(len, rests)), len(rests)
    ids = torch.tensor([rest + (0,) * (width - len(rest)) for rest in rests], device=base.device)  # (rows, width)
    cache = _repeat(shared, rows) if shared is not None else None
    most = max(requests[place].new_tokens for place in batch)
    stops = stop_tokens(base)

    decoder, head = base.model.get_decoder(), base.model.get_output_embeddings()
    with _arithmetic(base):
        # Padding lies to the right of everything that looks: the causal mask is enough, and quicker.
        causal = _causal_mask(base, len(prefix), width) if cache is not None else None
        use_cache = most > 1 or cache is not None
        out = decoder(input_ids=ids, attention_mask=causal, past_key_values=cache, use_cache=use_cache)
        logits = head(out.last_hidden_state[torch.arange(rows, device=base.device), lengths - 1]).float()
        best = logits.topk(2, dim=-1)
        chosen = [best.indices[:, 0]]
        limits = torch.tensor([requests[place].new_tokens for place in batch], device=base.device)  # (rows,)
        ends = torch.tensor(sorted(stops), dtype=torch.long, device=base.device)
        over = torch.zeros(rows, dtype=torch.bool, device=base.device)  # answers that are complete
        real = (torch.arange(width, device=base.device) < lengths[:, None]).long()
        mask = torch.cat([real.new_ones(rows, len(prefix)), real], dim=1)  # (rows, prefix + width)
        for step in range(1, most):
            over |= torch.isin(chosen[-1], ends) | (limits <= step)
            if bool(over.all()):
                break
            mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
            out = decoder(
                input_ids=chosen[-1][:, None],
                attention_mask=mask,
                position_ids=(len(prefix) + lengths + step - 1)[:, None],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            chosen.append(head(out.last_hidden_state[:, -1]).argmax(dim=-1))
    work.prompt_tokens += sum(len(requests[place].tokens) for place in batch)
    work.computed_tokens += rows * width + rows * (len(chosen) - 1)
    gaps = (best.values[:, 0] - best.values[:, 1]).tolist()
    columns = torch.stack(chosen, dim=1).tolist()
    replies = []
    for place, tokens, gap in zip(batch, columns, gaps, strict=True):
        kept = until_stop(tokens[: requests[place].new_tokens], stops)
        replies.append(Reply(place, base.tokenizer.decode(kept, skip_special_tokens=True), gap))
    return replies


def stop_tokens(base: Base) -> frozenset[int]:
    """Return the tokens that end an answer: the tokenizer's EOS, which training teaches, and the generation config's."""
    return frozenset(ends_of_text(base.model, base.tokenizer))


def until_stop(tokens: Sequence[int], stops: frozenset[int]) -> list[int]:
    """Return the tokens before the first that ends an answer."""
    kept: list[int] = []
    for token in tokens:
        if token in stops:
            break
        kept.append(token)
    return kept


def _repeat(cache: Any, rows: int) -> DynamicCache:
    """Return a copy of a one-row cache for `rows` rows; the original stays as it is."""
    copy = DynamicCache()
    for number, layer in enumerate(cache.layers):
        copy.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), number)
    return copy


def _causal_mask(base: Base, past: int, width: int) -> torch.Tensor | None:
    """Return the mask that is added to the attention's scores, (1, 1, width, past + width), or None for transformers' own.

    Theirs is one of booleans a row, which torch's CPU kernel turns into numbers again in every layer.
    """
    layers = set(getattr(base.model.config, "layer_types", None) or ["full_attention"])
    windowed = getattr(base.model.config, "sliding_window", None) is not None or layers != {"full_attention"}
    if not _plain_cpu(base) or windowed:
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
