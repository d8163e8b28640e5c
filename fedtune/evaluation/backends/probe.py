"""Chooses the fastest path on which a model gives the same answers as one-by-one generation (`choose_path`).

Batches, padding and shared prefixes are wrong on models with sliding windows, running states, positions that are counted from
the mask, or settings of `generate` that change the logits. So the loaded model, with its adapter, answers a few of the
benchmark's prompts on each path in turn, until the answers of one agree with the model's own `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice
from typing import Any

import torch

from fedtune.errors import FedTuneError, MissingError, UsageError
from fedtune.evaluation.backends.fast import (
    PATHS,
    AnswerPath,
    Budget,
    UnsupportedPathError,
    answer,
    memory_error,
    smallest_window,
)
from fedtune.evaluation.backends.generation import Reply, Request
from fedtune.evaluation.backends.official import answer_one_by_one
from fedtune.models.base import Base, is_out_of_memory
from fedtune.models.limits import limits_of

ONE_BY_ONE = "one-by-one generation"
"""Name of the path without batches."""

MOST_STEPS = 8
"""Most new tokens that the probe compares; a longer prompt represents longer answers."""

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
"""Settings of a generation config that change greedy answers, with the values that have no effect."""


@dataclass(frozen=True)
class Choice:
    """The path on which a model answers a benchmark."""

    path: AnswerPath | None
    """None means one by one."""
    reason: str
    """The probe's findings, for people."""

    @property
    def name(self) -> str:
        """The path's name in results and journals."""
        return ONE_BY_ONE if self.path is None else self.path.name


def choose_path(base: Base, requests: Sequence[Request], budget: Budget) -> Choice:
    """Return the fastest path on which `base`, with its adapter, gives the same answers as one prompt at a time.

    Args:
        base: The loaded model.
        requests: All of the benchmark's, so that a resumed evaluation chooses the same path.
        budget: Tokens of a batch; reduced where memory runs out.

    Raises:
        MissingError: a single question does not fit in the device's memory, or the model's logits are not numbers.
        UsageError: the model cannot generate at all.
    """
    samples = _samples(requests)
    plain = _generate(base, samples)
    if any(reply.logits is not None and bool(reply.logits.isnan().any()) for reply in plain):
        raise nan_error()
    _check_repeatable(base, samples[-1], plain[-1])
    reasons: dict[str, list[str]] = {}
    for path in PATHS:
        if path.padding == "none":
            samples = _equally_long(requests)
            plain = _generate(base, samples)
        reason = _refused(base, path, requests) or _difference(base, path, samples, plain, budget)
        if not reason:
            agreed = f"equal to one-by-one generation on {len(samples)} prompts"
            return Choice(path, "; ".join([agreed, *_listed(reasons)]))
        reasons.setdefault(reason, []).append(path.name)
    return Choice(None, "; ".join(_listed(reasons)))


def _generate(base: Base, samples: Sequence[Request]) -> list[Reply]:
    """Return the replies of the model's own `generate`, one prompt at a time, with their logits."""
    try:
        return list(chain.from_iterable(answer_one_by_one(base, samples, keep_logits=True)))
    except Exception as error:
        if is_out_of_memory(error):
            raise memory_error(max(len(sample.tokens) for sample in samples)) from None
        raise UsageError(
            f"The base model cannot generate with transformers ({_short_text(error)}).",
            hint="Choose another base model.",
        ) from error


def check_repeatable(base: Base, requests: Sequence[Request]) -> None:
    """Check on the longest request that a model gives the same answer twice.

    Raises:
        UsageError: the logits differ between two runs, or the model cannot generate at all.
        MissingError: the request does not fit in the device's memory.
    """
    longest = max(requests, key=lambda request: len(request.tokens))
    sample = replace(longest, new_tokens=min(longest.new_tokens, MOST_STEPS))
    _check_repeatable(base, sample, _generate(base, [sample])[0])


def _check_repeatable(base: Base, sample: Request, plain: Reply) -> None:
    if _compare(_generate(base, [sample])[0], plain, tolerance_of(base)):
        raise UsageError(
            f"The {base.model.config.model_type} model computes other logits each time for the same prompt, so its answers "
            "cannot be compared.",
            hint="Choose another base model.",
        )


def _listed(reasons: Mapping[str, Sequence[str]]) -> list[str]:
    """Return one text per reason, with the paths that it excludes."""
    return [f"not {' or '.join(paths)} ({reason})" for reason, paths in reasons.items()]


def nan_error() -> MissingError:
    """Return the error for logits that are not numbers."""
    return MissingError(
        "The model's logits are not numbers (NaN): the weights of the base or of the adapter are damaged.",
        hint="Score the base alone (--base without --peft) to find out which of the two it is.",
    )


def warnings_about(base: Base, requests: Sequence[Request]) -> list[str]:
    """Return warnings about how this model reads these prompts; the evaluation continues."""
    found = []
    end = base.tokenizer.eos_token_id
    if end is not None and requests and all(request.tokens[-1] == end for request in requests):
        found.append(
            "the tokenizer ends every prompt with its EOS token, and answers follow it, as in the leaderboard's scripts"
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
    """Return two requests of the shortest and two of the longest length that several requests have.

    Where all lengths differ, return the shortest and the longest request: this path then answers one by one.
    """
    by_length: dict[int, list[Request]] = {}
    for request in requests:
        by_length.setdefault(len(request.tokens), []).append(request)
    lengths = sorted(length for length, owners in by_length.items() if len(owners) > 1) or sorted(by_length)
    chosen = [request for length in dict.fromkeys((lengths[0], lengths[-1])) for request in by_length[length][:2]]
    return [replace(request, new_tokens=min(request.new_tokens, MOST_STEPS)) for request in chosen]


def _refused(base: Base, path: AnswerPath, requests: Sequence[Request]) -> str:
    """Return why a path cannot be exact on this model, whatever a few prompts show; an empty text if it may be."""
    changed = [
        name for name, neutral in _NEUTRAL.items() if getattr(base.model.generation_config, name, None) not in neutral
    ]
    # These settings depend on the tokens before, padding included; beams are rows of their own.
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
    """Return how a path's replies differ from those of one-by-one generation; an empty text if they do not."""
    batches = answer(base, samples, budget, path=path, keep_logits=True)
    try:
        replies = {reply.index: reply for reply in chain.from_iterable(batches)}
    except FedTuneError:
        raise
    except UnsupportedPathError as unsupported:
        return str(unsupported)
    except Exception as error:
        return _short_text(error)
    tolerance = tolerance_of(base)
    for index, expected in enumerate(plain):
        reason = _compare(replies[index], expected, tolerance)
        if reason:
            return reason
    return ""


def tolerance_of(base: Base) -> float:
    """Return by which share of the largest logit rounding alone may change a logit.

    float32 sums differ in the sixth digit between batches; bf16 and int8 keep two to three digits.
    """
    exact = base.compute_dtype == torch.float32 and not getattr(base.model, "is_loaded_in_8bit", False)
    return 1e-3 if exact else 5e-2


def is_tie(base: Base, plain: Reply, output: str, extract: Callable[[str], str]) -> bool:
    """Return whether rounding alone decides the first token at which another answer differs from the plain one.

    Args:
        base: The base model.
        plain: The answer of one-by-one generation, with its logits.
        output: The other answer.
        extract: From generated text to the part that is an answer.
    """
    assert plain.logits is not None
    for step, logits in enumerate(plain.logits):
        text = base.tokenizer.decode(plain.tokens[: step + 1], skip_special_tokens=True)
        if not output.startswith(extract(text)):
            best = logits.topk(2).values
            return bool(best[0] - best[1] <= _TIE * tolerance_of(base) * logits[logits.isfinite()].abs().max())
    return False


_TIE = 0.01
"""Share of the tolerance within which two logits count as equal: 1e-5 of the largest logit in float32."""


def _compare(reply: Reply, plain: Reply, tolerance: float) -> str:
    """Return how a reply differs from the plain one by more than rounding; an empty text if it does not."""
    assert reply.logits is not None
    assert plain.logits is not None
    # Beams may continue after the end of the answer, so that there are more logits than tokens.
    for step, (ours, theirs, *_) in enumerate(
        zip(reply.logits, plain.logits, reply.tokens, plain.tokens, strict=False)
    ):
        if ours.shape != theirs.shape:
            return f"{len(ours)} logits instead of {len(theirs)}"
        finite = theirs.isfinite()
        if bool((ours.isfinite() != finite).any()):
            return f"other logits are numbers at new token {step + 1}"
        if not bool(finite.any()):
            return ""  # only NaN on both paths
        largest = theirs[finite].abs().max()
        off = (ours[finite] - theirs[finite]).abs().max()
        if off > tolerance * largest:
            share = float(off / largest)
            return f"logits of new token {step + 1} differ by {share:.1%} of the largest (rounding is below {tolerance:.1%})"
        if reply.tokens[step] != plain.tokens[step]:
            best = theirs.topk(2).values
            if best[0] - best[1] > 2 * tolerance * largest:
                return f"new token {step + 1} differs though its logits do not"
            return ""  # rounding decides between two tokens; the tokens after them cannot be compared
    return "" if len(reply.tokens) == len(plain.tokens) else "the answers end at different tokens"


def _short_text(error: BaseException) -> str:
    """Return an error in one short line."""
    first = (str(error).strip().splitlines() or [""])[0]
    text = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return text if len(text) <= 100 else f"{text[:97]}…"
