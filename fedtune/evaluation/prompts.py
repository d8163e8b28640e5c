"""From a benchmark's questions to the requests that a backend answers."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.errors import UsageError
from fedtune.evaluation.backends.generation import Request, tokenize
from fedtune.evaluation.settings import EvalSettings
from fedtune.evaluation.tasks.base import TokenCounts
from fedtune.evaluation.tasks.load import QuestionSet
from fedtune.models.base import Base
from fedtune.models.limits import first_excess, limits_of


@dataclass(frozen=True)
class Prompt:
    """One prompt of a benchmark; questions with the same prompt share one reply, as in the leaderboard's scripts."""

    request: Request
    indices: tuple[int, ...]
    """The questions with this prompt."""


def build_prompts(base: Base, questions: QuestionSet, settings: EvalSettings) -> list[Prompt]:
    """Return the distinct prompts of a benchmark in their order, with the most new tokens that the protocol allows.

    Raises:
        UsageError: a token has no embedding, or a question and its answer have more tokens than the model has positions.
    """
    task = questions.selection.task
    by_prompt: dict[str, list[int]] = {}
    for index, question in enumerate(questions.questions):
        by_prompt.setdefault(question.prompt, []).append(index)
    tokens = dict(zip(by_prompt, tokenize(base, [task.wrap(prompt) for prompt in by_prompt]), strict=True))
    if settings.mode == "official" and task.padded_batches is not None:
        tokens = {prompt: ids[: task.padded_batches.max_length] for prompt, ids in tokens.items()}
    golds = base.tokenizer([question.gold for question in questions.questions], add_special_tokens=False)["input_ids"]
    counted = TokenCounts(
        questions.questions,
        prompts=[len(tokens[question.prompt]) for question in questions.questions],
        golds=[len(ids) for ids in golds],
        batch_size=settings.batch_size,
    )
    new_tokens = task.new_tokens(counted)
    prompts = [
        Prompt(Request(tokens[text], new_tokens[indices[0]]), tuple(indices)) for text, indices in by_prompt.items()
    ]
    _check_tokens(base, questions.selection.name, prompts)
    return prompts


def _check_tokens(base: Base, bench: str, prompts: list[Prompt]) -> None:
    """Check that the base has an embedding for every token of the prompts, and positions for prompt and answer."""
    limits = limits_of(base.model)
    name = base.model.config.model_type
    # The model never reads the last token of an answer.
    rows = [prompt.request.tokens + (0,) * (prompt.request.new_tokens - 1) for prompt in prompts]
    excess = first_excess(rows, limits)
    if excess is None:
        return
    where = f"Question {prompts[excess.place].indices[-1] + 1} of {bench}"
    if excess.token is not None:
        token = base.tokenizer.convert_ids_to_tokens(excess.token)
        raise UsageError(
            f"{where} contains the token {token!r} ({excess.token}), which has no embedding: the {name} model has "
            f"{limits.embeddings:,}.",
            hint="Use the tokenizer that belongs to the base model.",
        )
    raise UsageError(
        f"{where} needs {excess.length:,} tokens with its answer, and the {name} model has {limits.positions:,} positions.",
        hint="Choose another benchmark, or a base model with more positions.",
    )
