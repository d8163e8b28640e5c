"""Checks a benchmark's tokenised questions against the base model, before the first is answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedtune.errors import UsageError
from fedtune.evaluation.answer import Request
from fedtune.models.base import Base
from fedtune.models.limits import first_excess, limits_of, warn_of_length


def check_questions(base: Base, bench: str, numbers: Mapping[str, int], requests: Sequence[Request]) -> None:
    """Check that the base has an embedding for every token of the questions, and positions for question and answer.

    Args:
        base: The base model.
        bench: The benchmark's name.
        numbers: Each prompt's place among the benchmark's questions, in the order of `requests`.
        requests: The tokenised prompts.

    Raises:
        UsageError: a token has no embedding, or a question and its answer have more tokens than the model has positions.
    """
    limits = limits_of(base.model)
    name = base.model.config.model_type
    # The last token of an answer is never read.
    whole = [request.tokens + (0,) * (request.new_tokens - 1) for request in requests]
    excess = first_excess(whole, limits)
    if excess is None:
        warn_of_length(max(map(len, whole), default=0), limits, f"a question of {bench} with its answer", name)
        return
    where = f"Question {list(numbers.values())[excess.place] + 1} of {bench}"
    if excess.token is not None:
        token = base.tokenizer.convert_ids_to_tokens(excess.token)
        raise UsageError(
            f"{where} holds the token {token!r} ({excess.token}), which has no embedding: the {name} model has "
            f"{limits.embeddings:,}.",
            hint="Use the tokenizer that belongs to the base model.",
        )
    raise UsageError(
        f"{where} needs {excess.length:,} tokens with its answer, and the {name} model has {limits.positions:,} positions.",
        hint="Choose another benchmark, or a base model with more positions.",
    )
