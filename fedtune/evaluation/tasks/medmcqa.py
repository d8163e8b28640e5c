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

from fedtune.evaluation.tasks.base import LmEvalTask, Part, Source
from fedtune.evaluation.tasks.short_answer import ChoiceTask, ask_choice

INSTRUCTION = (
    "You are a medical doctor answering realworld medical entrance exam questions. Based on your understanding of "
    "basic and clinical science, medical knowledge, and mechanisms underlying health, disease, patient care, and modes "
    "of therapy, answer the following multiple-choice question. Select one correct answer from A to D. Base your "
    "answer on the current and standard practices referenced in medical guidelines."
)
OPTIONS = ("opa", "opb", "opc", "opd")


TASK = ChoiceTask(
    name="medmcqa",
    title="MedMCQA",
    instruction=INSTRUCTION,
    fields=("question", *OPTIONS, "cop"),
    more_fields=("id", "choice_type", "exp", "subject_name", "topic_name"),
    ask=ask_choice(INSTRUCTION, OPTIONS, first=0),
    parts={"": Part(4183, "1dbd834adaf757e0df3618539d1e13a648f40bad4aeb63118428e4dd3e7f33bd")},
    sources=(
        # The hub redirects the `medmcqa` of the leaderboard's scripts to this repository.
        Source("openlifescienceai/medmcqa", "validation", revision="91c6572c454088bf71b679ad90aa8dffcd0d5868"),
    ),
    lm_eval=LmEvalTask("medmcqa", "medmcqa/medmcqa.yaml"),
)
