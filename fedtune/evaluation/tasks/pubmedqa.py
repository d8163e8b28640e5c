"""PubMedQA, 500 research questions with their abstracts, answered yes, no or maybe (https://arxiv.org/abs/1909.06146).

    As an expert doctor in clinical science and medical knowledge, can you tell me if ... Answer yes, no, or maybe.
    Thirty runners drank tea before a race.
    They ran no faster than thirty others.
    Does tea make runners faster?
    The answer is:

The test fold is a fixed list of 500 of the 1,000 labelled questions, in its own order. `pubmedqa_test.txt` identifies
them by the first eight hex digits of the sha256 of their prompts, so that the fold can be taken from any copy of the 1,000.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from fedtune.evaluation.tasks.base import LmEvalTask, Part, Row, RowError, Source, one_of, text_of
from fedtune.evaluation.tasks.short_answer import YesNoTask, plain_prompt

INSTRUCTION = (
    "As an expert doctor in clinical science and medical knowledge, can you tell me if the following statement is "
    "correct? Answer yes, no, or maybe."
)


def ask(row: Row) -> tuple[str, str]:
    """Return prompt and gold of a row with `CONTEXTS`, `QUESTION` and `final_decision`."""
    contexts = row["CONTEXTS"]
    if not isinstance(contexts, list) or not all(isinstance(context, str) for context in contexts):
        raise RowError("CONTEXTS is not a list of texts")
    body = "\n".join([*contexts, text_of(row, "QUESTION")])
    return plain_prompt(INSTRUCTION, body), one_of(row, "final_decision", ("yes", "no", "maybe"))


def question_key(row: Row) -> str:
    """Return the identifier of a question in `pubmedqa_test.txt`."""
    return hashlib.sha256(ask(row)[0].encode()).hexdigest()[:8]


def cut_to_fold(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the rows of the test fold, in its order, from rows in the original's fields."""
    by_key = {question_key(row): row for row in rows}
    keys = Path(__file__).with_name("pubmedqa_test.txt").read_text(encoding="ascii").split()
    return (by_key[key] for key in keys if key in by_key)


def from_copy(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the test fold from `qiaojin/PubMedQA` (question, context.contexts, final_decision)."""
    return cut_to_fold(
        {
            "QUESTION": row["question"],
            "CONTEXTS": list(row["context"]["contexts"]),
            "final_decision": row["final_decision"],
        }
        for row in rows
    )


TASK = YesNoTask(
    name="pubmedqa",
    title="PubMedQA",
    instruction=INSTRUCTION,
    fields=("CONTEXTS", "QUESTION", "final_decision"),
    more_fields=("LONG_ANSWER", "LABELS", "MESHES", "YEAR", "reasoning_required_pred", "reasoning_free_pred"),
    ask=ask,
    parts={"": Part(500, "4edbd02062948bb462c4e71fc5c1627900c9813d724e57d2bb5e10dffaa925fe")},
    sources=(
        Source(
            "qiaojin/PubMedQA",
            "train",
            config="pqa_labeled",
            revision="9001f2853fb87cab8d220904e0de81ac6973b318",
            rows=from_copy,
        ),
        # No commit of the hub's conversion is known; the content hash decides.
        Source(
            "bigbio/pubmed_qa",
            "test",
            config="pubmed_qa_labeled_fold0_source",
            original=True,
            script=True,
            parquet_export=True,
        ),
    ),
    lm_eval=LmEvalTask("pubmedqa", "pubmedqa/pubmedqa.yaml"),
)
