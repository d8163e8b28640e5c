"""CareQA, 5,621 questions of Spanish specialised health training exams, in English (https://arxiv.org/abs/2502.06666).

You are a medical doctor answering realworld medical entrance exam questions. ...
Question: Which of these is a bone?

Options:
A. Femur
B. Retina
C. Aorta
D. Pleura
The answer is:
"""

from __future__ import annotations

from fedtune.evaluation.benchmarks.base import LETTERS, Benchmark, Part, Row, Source, choice_prompt, index_of, text_of
from fedtune.evaluation.benchmarks.medmcqa import INSTRUCTION

OPTIONS = ("op1", "op2", "op3", "op4")


def ask(row: Row) -> tuple[str, str]:
    """Return prompt and gold of a row with `question`, `op1` to `op4` and `cop` (1-4)."""
    options = [text_of(row, name) for name in OPTIONS]
    return choice_prompt(INSTRUCTION, text_of(row, "question"), options), LETTERS[index_of(row, "cop", 1, 4) - 1]


BENCHMARK = Benchmark(
    name="careqa",
    title="CareQA",
    answer_type="choice",
    instruction=INSTRUCTION,
    chance=1 / 4,
    fields=("question", *OPTIONS, "cop"),
    more_fields=("exam_id", "category", "year", "unique_id"),
    ask=ask,
    # The content hash is not known yet: the official rows were not at hand.
    parts={"": Part(5621)},
    # No commit is known to be the leaderboard's.
    sources=(Source("HPAI-BSC/CareQA", "test", config="CareQA_en", original=True),),
)
