"""Tiny, the test set of the tiny challenge: questions about the herbs of an invented world, part of fedtune.

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

from fedtune.evaluation.tasks.base import Part
from fedtune.evaluation.tasks.medmcqa import OPTIONS
from fedtune.evaluation.tasks.mmlu import INSTRUCTION
from fedtune.evaluation.tasks.short_answer import ChoiceTask, ask_choice

TASK = ChoiceTask(
    name="tiny",
    title="Tiny",
    instruction=INSTRUCTION,
    fields=("question", *OPTIONS, "cop", "subject"),
    ask=ask_choice(INSTRUCTION, OPTIONS, first=0),
    parts={"": Part(None)},
    more_fields=("id",),
    subset_field="subject",
    shipped=Path(__file__).parents[2] / "data" / "builtin" / "tiny" / "test.jsonl",
)
