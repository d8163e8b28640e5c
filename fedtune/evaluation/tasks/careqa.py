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

from fedtune.evaluation.tasks.base import LmEvalTask, Part, Source
from fedtune.evaluation.tasks.medmcqa import INSTRUCTION
from fedtune.evaluation.tasks.short_answer import ChoiceTask, ask_choice

OPTIONS = ("op1", "op2", "op3", "op4")


TASK = ChoiceTask(
    name="careqa",
    title="CareQA",
    instruction=INSTRUCTION,
    fields=("question", *OPTIONS, "cop"),
    more_fields=("exam_id", "category", "year", "unique_id"),
    ask=ask_choice(INSTRUCTION, OPTIONS, first=1),
    # The content hash is not known yet.
    parts={"": Part(5621)},
    # No commit is known to be the leaderboard's.
    sources=(Source("HPAI-BSC/CareQA", "test", config="CareQA_en", original=True),),
    lm_eval=LmEvalTask("careqa_en", "careqa/careqa_en.yaml"),
)
