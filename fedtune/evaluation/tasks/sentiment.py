"""Tasks that ask for the sentiment of a financial text (protocol, section 5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fedtune.evaluation.tasks.base import (
    Answer,
    PaddedBatches,
    Prediction,
    Question,
    Row,
    Task,
    TokenCounts,
    pandas_json,
)

SENTIMENTS = ("positive", "negative", "neutral")


def answer_part(text: str) -> str:
    """Return the text after the first `Answer: ` and before a second one, `None` where there is no `Answer: `."""
    parts = text.split("Answer: ")
    return parts[1] if len(parts) > 1 else "None"


@dataclass(frozen=True)
class SentimentTask(Task):
    """A task that is answered with negative, neutral or positive, after a prompt without turn markers."""

    answer_type: ClassVar[str] = "sentiment"
    golds: ClassVar[frozenset[str]] = frozenset(SENTIMENTS)
    columns: ClassVar[tuple[str, str, str]] = ("context", "new_target", "new_out")
    keeps_outputs: ClassVar[bool] = False
    padded_batches: ClassVar[PaddedBatches] = PaddedBatches(size=32, max_length=512, output=answer_part)

    other_instructions: tuple[str, ...] = ()
    """Instructions of some prompts in place of `instruction`."""

    def wrap(self, prompt: str) -> str:
        """Return the prompt as it is."""
        return prompt

    def new_tokens(self, counted: TokenCounts) -> list[int]:
        """Return the tokens that each prompt leaves of the most that prompt and answer may have together."""
        return [max(1, self.padded_batches.max_length - count) for count in counted.prompts]

    def output(self, generated: str) -> str:
        """Return the new text up to a second `Answer: `."""
        return answer_part("Answer: " + generated)

    def score(self, question: Question, output: str) -> Prediction:
        """Compare the first sentiment, positive before negative before neutral, that the output contains."""
        gold, _ = _sentiment_in(question.gold)
        value, parsed = _sentiment_in(output)
        return Prediction(value, parsed, value == gold)

    def generations_text(self, answers: Sequence[Answer]) -> str:
        """Return the content of the generation file: JSON lines with the predictions."""
        records = (
            {
                "context": question.prompt,
                "new_target": _sentiment_in(question.gold)[0],
                "new_out": _sentiment_in(output)[0],
            }
            for question, output in answers
        )
        return "".join(pandas_json(record) + "\n" for record in records)

    @property
    def first_lines(self) -> frozenset[str]:
        """The first lines that prompts of this benchmark have."""
        return frozenset(f"Instruction: {text}" for text in (self.instruction, *self.other_instructions))


def _sentiment_in(text: str) -> tuple[str, bool]:
    """Return the sentiment that a text names, by default `neutral`, and whether it names one."""
    found = next((each for each in SENTIMENTS if each in text or each.capitalize() in text), None)
    return found or "neutral", found is not None


def finance_instruction(kind: Literal["news", "tweet"]) -> str:
    """Return the instruction of the finance benchmarks."""
    return f"What is the sentiment of this {kind}? Please choose an answer from {{negative/neutral/positive}}."


def finance_prompt(text: str, kind: Literal["news", "tweet"] = "news") -> str:
    """Return the prompt of a finance benchmark."""
    return f"Instruction: {finance_instruction(kind)}\nInput: {text}\nAnswer: "


def held_out(rows: Any) -> Iterable[Row]:
    """Return the quarter of a `datasets.Dataset` that the leaderboard scores."""
    test: Iterable[Row] = rows.train_test_split(0.25, seed=42)["test"]
    return test
