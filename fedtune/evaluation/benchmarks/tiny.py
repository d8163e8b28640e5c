"""Tiny, the test set of the tiny challenge: an invented world's herbs, shipped with fedtune.

Answer the following multiple choice question.
Question: What is the taste of bridwort?

Options:
A. honey
B. smoke
C. salt
D. rain
The answer is:
"""

from __future__ import annotations

from pathlib import Path

from fedtune.evaluation.benchmarks.base import LETTERS, Benchmark, Part, Row, choice_prompt, index_of, text_of
from fedtune.evaluation.benchmarks.medmcqa import OPTIONS
from fedtune.evaluation.benchmarks.mmlu import INSTRUCTION


def ask(row: Row) -> tuple[str, str]:
    """Return prompt and gold of a row with MedMCQA's fields."""
    options = [text_of(row, name) for name in OPTIONS]
    return choice_prompt(INSTRUCTION, text_of(row, "question"), options), LETTERS[index_of(row, "cop", 0, 3)]


BENCHMARK = Benchmark(
    name="tiny",
    title="Tiny",
    answer_type="choice",
    instruction=INSTRUCTION,
    chance=1 / 4,
    fields=("question", *OPTIONS, "cop", "subject"),
    ask=ask,
    parts={"": Part(None)},
    more_fields=("id",),
    subset_field="subject",
    shipped=Path(__file__).parents[2] / "data" / "builtin" / "tiny" / "test.jsonl",
)
