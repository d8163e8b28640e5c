"""MedMCQA, 4,183 questions of Indian medical entrance exams (https://arxiv.org/abs/2203.14371).

You are a medical doctor answering realworld medical entrance exam questions. ...
Question: Which vitamin prevents scurvy?

Options:
A. A
B. B1
C. C
D. D
The answer is:
"""

from __future__ import annotations

from fedtune.evaluation.benchmarks.base import LETTERS, Benchmark, Part, Row, Source, choice_prompt, index_of, text_of

INSTRUCTION = (
    "You are a medical doctor answering realworld medical entrance exam questions. Based on your understanding of "
    "basic and clinical science, medical knowledge, and mechanisms underlying health, disease, patient care, and modes "
    "of therapy, answer the following multiple-choice question. Select one correct answer from A to D. Base your "
    "answer on the current and standard practices referenced in medical guidelines."
)
OPTIONS = ("opa", "opb", "opc", "opd")


def ask(row: Row) -> tuple[str, str]:
    """Return prompt and gold of a row with `question`, `opa` to `opd` and `cop` (0-3)."""
    options = [text_of(row, name) for name in OPTIONS]
    return choice_prompt(INSTRUCTION, text_of(row, "question"), options), LETTERS[index_of(row, "cop", 0, 3)]


BENCHMARK = Benchmark(
    name="medmcqa",
    title="MedMCQA",
    answer_type="choice",
    instruction=INSTRUCTION,
    chance=1 / 4,
    fields=("question", *OPTIONS, "cop"),
    more_fields=("id", "choice_type", "exp", "subject_name", "topic_name"),
    ask=ask,
    parts={"": Part(4183, "1dbd834adaf757e0df3618539d1e13a648f40bad4aeb63118428e4dd3e7f33bd")},
    sources=(
        # The hub's `medmcqa` of the leaderboard's scripts leads to this repository.
        Source("openlifescienceai/medmcqa", "validation", revision="91c6572c454088bf71b679ad90aa8dffcd0d5868"),
    ),
)
