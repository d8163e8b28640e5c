"""FPB, the Financial PhraseBank: sentiment of 1,212 sentences from financial news (https://arxiv.org/abs/1307.5336).

Instruction: What is the sentiment of this news? Please choose an answer from {negative/neutral/positive}.
Input: Profit doubled in the third quarter .
Answer:
"""

from __future__ import annotations

from fedtune.evaluation.tasks.base import Part, Row, Source, index_of, text_of
from fedtune.evaluation.tasks.sentiment import SentimentTask, finance_instruction, finance_prompt, held_out

LABELS = ("negative", "neutral", "positive")


def ask(row: Row) -> tuple[str, str]:
    """Return prompt and gold of a row with `sentence` and `label` (0 negative, 1 neutral, 2 positive)."""
    return finance_prompt(text_of(row, "sentence")), LABELS[index_of(row, "label", 0, 2)]


TASK = SentimentTask(
    name="fpb",
    title="FPB",
    instruction=finance_instruction("news"),
    fields=("sentence", "label"),
    ask=ask,
    parts={"": Part(1212, "c6b8396b1997544bd6792e43426884c522ee9f036f4f7da27560cacbdde3bb11")},
    sources=(
        # A script data set; no commit of the hub's conversion is known, so the content hash decides.
        Source(
            "takala/financial_phrasebank",
            "train",
            config="sentences_50agree",
            original=True,
            script=True,
            parquet_export=True,
            rows=held_out,
        ),
    ),
)
