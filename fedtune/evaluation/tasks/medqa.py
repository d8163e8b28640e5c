"""MedQA, 1,273 questions of the US Medical Licensing Examination with four options (https://arxiv.org/abs/2009.13081).

You are a medical doctor taking the US Medical Licensing Examination. ...
Question: A runner's calf cramps after a race. What is the best next step?

Options:
A. Rest and water
B. Surgery
C. A cast
D. Antibiotics
The answer is:
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fedtune.evaluation.tasks.base import LETTERS, LmEvalTask, Part, Row, RowError, Source, text_of
from fedtune.evaluation.tasks.short_answer import ChoiceTask, choice_prompt

# "From A to E" is the leaderboard's text, although there are four options.
INSTRUCTION = (
    "You are a medical doctor taking the US Medical Licensing Examination. You need to demonstrate your understanding "
    "of basic and clinical science, medical knowledge, and mechanisms underlying health, disease, patient care, and "
    "modes of therapy. Show your ability to apply the knowledge essential for medical practice. For the following "
    "multiple-choice question, select one correct answer from A to E. Base your answer on the current and standard "
    "practices referenced in medical guidelines."
)


def ask(row: Row) -> tuple[str, str]:
    """Return prompt and gold of a row with `question`, `options` [{key, value}] and `answer` (an option's value)."""
    options = row["options"]
    if not isinstance(options, list) or not all(isinstance(option, dict) for option in options):
        raise RowError("options is not a list of {key, value}")
    if [option.get("key") for option in options] != list(LETTERS):
        raise RowError(f"options has the keys {', '.join(str(option.get('key')) for option in options)}, not A to D")
    values = [text_of(option, "value") if "value" in option else "" for option in options]
    answer = text_of(row, "answer")
    if answer not in values:
        raise RowError("answer is not one of the options")
    gold = LETTERS[values.index(answer)]
    if row.get("answer_idx", gold) != gold:
        raise RowError(f"answer is option {gold}, but answer_idx is {row['answer_idx']}")
    return choice_prompt(INSTRUCTION, text_of(row, "question"), values), gold


def from_copy(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield rows of `GBaker/MedQA-USMLE-4-options` (options {A: ..., D: ...}) in the original's fields."""
    for row in rows:
        options = [{"key": key, "value": value} for key, value in sorted(row["options"].items())]
        yield {"question": row["question"], "options": options, "answer": row["answer"]}


def for_lm_eval(row: Row) -> Row:
    """Return a row in the fields of lm-eval's task."""
    options = [option["value"] for option in row["options"]]
    endings = {f"ending{index}": option for index, option in enumerate(options)}
    return {"sent1": row["question"], **endings, "label": options.index(row["answer"])}


TASK = ChoiceTask(
    name="medqa",
    title="MedQA",
    instruction=INSTRUCTION,
    fields=("question", "options", "answer"),
    more_fields=("answer_idx", "meta_info", "metamap_phrases"),
    ask=ask,
    parts={"": Part(1273, "aa1b1999ae9c489c3a8eea1de40a5500d80644e109220d284c62103780f32662")},
    sources=(
        Source(
            "GBaker/MedQA-USMLE-4-options",
            "test",
            revision="0fb93dd23a7339b6dcd27e241cb9b5eca62d4d18",
            rows=from_copy,
        ),
        # No commit of the hub's conversion is known; the content hash decides.
        Source(
            "bigbio/med_qa",
            "test",
            config="med_qa_en_4options_source",
            original=True,
            script=True,
            parquet_export=True,
        ),
    ),
    lm_eval=LmEvalTask("medqa_4options", "medqa/medqa.yaml", for_lm_eval),
)
