"""Chooses how a model answers a benchmark: the quickest path that gives what one-by-one generation gives.

Batches, padding and shared prefixes are exact on some architectures and wrong on others: sliding windows, running states,
positions that are counted from the mask, settings of `generate` that change the logits. So the loaded model, its adapter
attached, answers a few of the benchmark's own prompts on each path in turn, until one agrees with the model's own `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch

from fedtune.errors import FedTuneError, MissingError, UsageError
from fedtune.evaluation.answer import (
    PATHS,
    AnswerPath,
    Budget,
    Reply,
    Request,
    UnsupportedPathError,
    answer,
    no_room,
    pad_token_of,
    smallest_window,
)
from fedtune.evaluation.official import answer_one_by_one
from fedtune.models.base import Base, is_out_of_memory
from fedtune.models.limits import limits_of

ONE_BY_ONE = "one-by-one generation"
"""Name of the plain path."""

MOST_STEPS = 8
"""New tokens that the probe compares at most; a far longer prompt stands for what longer answers add."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None, []),
    "sequence_bias": (None, {}),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1.0),
    "watermarking_config": (None,),
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0.0),
    "stop_strings": (None, []),
    "max_time": (None,),
}
"""Settings of a generation config that change greedy answers, with the values at which they do nothing."""


@dataclass(frozen=True)
class Choice:
    """How a model answers a benchmark."""

    path: AnswerPath | None
    """None is one by one."""
    reason: str
    """What the probe found, for people."""

    @property
    def name(self) -> str:
        """The path's name in results and journals."""
        return ONE_BY_ONE if self.path is None else self.path.name


def choose_path(base: Base, requests: Sequence[Request], budget: Budget) -> Choice:
    """Return the quickest path on which `base`, with what is attached to it, answers as one prompt at a time does.

    Args:
        base: The loaded model.
        requests: All of a benchmark's, so that a resumed evaluation chooses the same.
        budget: Tokens of a batch; shrinks where memory runs out.

    Raises:
        MissingError: the device's memory does not hold a single question, or the model's logits are not numbers.
        UsageError: the model cannot generate at all.
    """
    samples = _samples(requests)
    plain = _plainly(base, samples)
    if any(reply.logits is not None and bool(reply.logits.isnan().any()) for reply in plain):
        raise no_numbers()
    _check_repeatable(base, samples[-1], plain[-1])
    reasons: dict[str, list[str]] = {}
    for path in PATHS:
        if path.padding == "none":
            samples = _equally_long(requests)
            plain = _plainly(base, samples)
        reason = _refused(base, path, requests) or _difference(base, path, samples, plain, budget)
        if not reason:
            agreed = f"equal to one-by-one generation on {len(samples)} prompts"
            return Choice(path, "; ".join([agreed, *_listed(reasons)]))
        reasons.setdefault(reason, []).append(path.name)
    return Choice(None, "; ".join(_listed(reasons)))


def _plainly(base: Base, samples: Sequence[Request]) -> list[Reply]:
    """Return the replies of the model's own `generate`, one prompt at a time, with their logits."""
    try:
        return list(_all(answer_one_by_one(base, samples, pad_token_of(base), keep_logits=True)))
    except Exception as error:
        if is_out_of_memory(error):
            raise no_room(max(len(sample.tokens) for sample in samples)) from None
        raise UsageError(
            f"The base model cannot generate with transformers ({_said(error)}).", hint="Choose another base model."
        ) from error


def check_repeatable(base: Base, requests: Sequence[Request]) -> None:
    """Refuse a model whose answers are drawn at random, tried on the longest request.

    Raises:
        UsageError: asked twice, it computes other logits, or it cannot generate at all.
        MissingError: the device's memory does not hold the request.
    """
    longest = max(requests, key=lambda request: len(request.tokens))
    sample = replace(longest, new_tokens=min(longest.new_tokens, MOST_STEPS))
    _check_repeatable(base, sample, _plainly(base, [sample])[0])


def _check_repeatable(base: Base, sample: Request, plain: Reply) -> None:
    if _compare(_plainly(base, [sample])[0], plain, tolerance_of(base)):
        raise UsageError(
            f"The {base.model.config.model_type} model computes other logits each time for the same prompt, so its answers "
            "cannot be compared with anything.",
            hint="Choose another base model.",
        )


def _listed(reasons: Mapping[str, Sequence[str]]) -> list[str]:
    """Return one text a reason, with the paths that it rules out."""
    return [f"not {' or '.join(paths)} ({reason})" for reason, paths in reasons.items()]


def no_numbers() -> MissingError:
    """Return the error that says that a model's logits are not numbers."""
    return MissingError(
        "The model's logits are not numbers (NaN): the weights of the base or of the adapter are damaged.",
        hint="Score the base alone (--base without --peft) to see which of the two it is.",
    )


def warnings_about(base: Base, requests: Sequence[Request]) -> list[str]:
    """Return what the user should know of how this model takes these questions; nothing of it stops the evaluation."""
    found = []
    end = base.tokenizer.eos_token_id
    if end is not None and requests and all(request.tokens[-1] == end for request in requests):
        found.append(
            "the tokenizer ends every prompt with its EOS token, and answers follow that, as in the leaderboard's scripts"
        )
    positions = limits_of(base.model).positions
    if positions is not None:
        longer = sum(len(request.tokens) > positions for request in requests)
        if longer:
            found.append(f"{longer} of {len(requests)} prompts are longer than the model's {positions} positions")
    return found


def _samples(requests: Sequence[Request]) -> list[Request]:
    """Return the shortest, the median and the longest request, and one as long as the longest with its answer."""
    order = sorted(requests, key=lambda request: len(request.tokens))
    chosen = dict.fromkeys([order[0], order[len(order) // 2], order[-1]])
    samples = [replace(request, new_tokens=min(request.new_tokens, MOST_STEPS)) for request in chosen]
    total, furthest = max(
        ((len(request.tokens) + request.new_tokens, request) for request in requests), key=lambda pair: pair[0]
    )
    if furthest.new_tokens > MOST_STEPS:
        tokens = furthest.tokens + tuple(islice(cycle(furthest.tokens), total - MOST_STEPS - len(furthest.tokens)))
        samples.append(Request(tokens, MOST_STEPS))
    return samples


def _equally_long(requests: Sequence[Request]) -> list[Request]:
    """Return two requests of the shortest and of the longest length that two have, so that they make batches.

    Where no two are equally long, the shortest and the longest: that path then answers one by one.
    """
    by_length: dict[int, list[Request]] = {}
    for request in requests:
        by_length.setdefault(len(request.tokens), []).append(request)
    lengths = sorted(length for length, owners in by_length.items() if len(owners) > 1) or sorted(by_length)
    chosen = [request for length in dict.fromkeys((lengths[0], lengths[-1])) for request in by_length[length][:2]]
    return [replace(request, new_tokens=min(request.new_tokens, MOST_STEPS)) for request in chosen]


def _refused(base: Base, path: AnswerPath, requests: Sequence[Request]) -> str:
    """Return why a path cannot be exact whatever a few prompts say; empty where nothing is known against it."""
    changed = [
        name for name, neutral in _NEUTRAL.items() if getattr(base.model.generation_config, name, None) not in neutral
    ]
    # Settings of `generate` look at the tokens before, so that padding would count as well; beams are rows of their own.
    if changed and (path.padding != "none" or "num_beams" in changed):
        return f"the model's generation config sets {', '.join(changed)}"
    window = smallest_window(base.model)
    if path.padding == "right" and window is not None:
        totals = [len(request.tokens) + request.new_tokens for request in requests if request.new_tokens > 1]
        longest = max(totals, default=0)
        if longest > window:
            return f"questions and answers of up to {longest} tokens are longer than the model's window of {window}"
    return ""


def _difference(
    base: Base, path: AnswerPath, samples: Sequence[Request], plain: Sequence[Reply], budget: Budget
) -> str:
    """Return how a path's replies differ from the plain ones; empty where they do not."""
    try:
        replies = {reply.place: reply for reply in _all(answer(base, samples, budget, path=path, keep_logits=True))}
    except FedTuneError:
        raise
    except UnsupportedPathError as unsupported:
        return str(unsupported)
    except Exception as error:
        return _said(error)
    tolerance = tolerance_of(base)
    for place, expected in enumerate(plain):
        reason = _compare(replies[place], expected, tolerance)
        if reason:
            return reason
    return ""


def _all(batches: Iterator[list[Reply]]) -> Iterator[Reply]:
    for batch in batches:
        yield from batch


def tolerance_of(base: Base) -> float:
    """Return by how much of the largest logit rounding alone may move a logit.

    Sums of float32 differ in the sixth digit between batches; bf16 and int8 keep two to three digits.
    """
    exact = base.compute_dtype == torch.float32 and not getattr(base.model, "is_loaded_in_8bit", False)
    return 1e-3 if exact else 5e-2


def is_tie(base: Base, plain: Reply, agrees: Callable[[str], bool]) -> bool:
    """Return whether the first token at which another answer leaves the plain one is decided by rounding alone.

    Args:
        base: The base model.
        plain: The plain answer with its logits.
        agrees: Whether the other answer begins with a text.
    """
    assert plain.logits is not None
    for step, logits in enumerate(plain.logits):
        if not agrees(base.tokenizer.decode(plain.tokens[: step + 1], skip_special_tokens=True)):
            best = logits.topk(2).values
            return bool(best[0] - best[1] <= _TIE * tolerance_of(base) * logits[logits.isfinite()].abs().max())
    return False


_TIE = 0.01
"""Share of the tolerance that two logits may be apart and still change places: 1e-5 of the largest in float32."""


def _compare(reply: Reply, plain: Reply, tolerance: float) -> str:
    """Return how a reply differs from the plain one beyond rounding."""
    assert reply.logits is not None
    assert plain.logits is not None
    # Beams may go on after the answer has ended: then there are more logits than tokens.
    for step, (ours, theirs, *_) in enumerate(
        zip(reply.logits, plain.logits, reply.tokens, plain.tokens, strict=False)
    ):
        if ours.shape != theirs.shape:
            return f"{len(ours)} logits instead of {len(theirs)}"
        finite = theirs.isfinite()
        if bool((ours.isfinite() != finite).any()):
            return f"other logits are numbers at new token {step + 1}"
        if not bool(finite.any()):
            return ""  # nothing but NaN on both paths
        largest = theirs[finite].abs().max()
        off = (ours[finite] - theirs[finite]).abs().max()
        if off > tolerance * largest:
            share = float(off / largest)
            return f"logits of new token {step + 1} differ by {share:.1%} of the largest (rounding is below {tolerance:.1%})"
        if reply.tokens[step] != plain.tokens[step]:
            best = theirs.topk(2).values
            if best[0] - best[1] > 2 * tolerance * largest:
                return f"new token {step + 1} differs though its logits do not"
            return ""  # a tie that rounding decides; what follows cannot be compared
    return "" if len(reply.tokens) == len(plain.tokens) else "the answers end at different tokens"


def _said(error: BaseException) -> str:
    """Return an error in one short line."""
    first = (str(error).strip().splitlines() or [""])[0]
    text = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return text if len(text) <= 100 else f"{text[:97]}…"
