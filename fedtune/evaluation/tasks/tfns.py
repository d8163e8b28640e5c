"""TFNS, sentiment of 2,388 finance-related tweets (https://huggingface.co/datasets/zeroshot/twitter-financial-news-sentiment).

Instruction: What is the sentiment of this tweet? Please choose an answer from {negative/neutral/positive}.
Input: $TUNE: shares slide after warning
Answer:
"""

from __future__ import annotations

from fedtune.evaluation.tasks.base import Part, Row, Source, index_of, text_of
from fedtune.evaluation.tasks.sentiment import SentimentTask, finance_instruction, finance_prompt

# In another order than FPB's.
LABELS = ("negative", "positive", "neutral")


def ask(row: Row) -> tuple[str, str]:
    """Return prompt and gold of a row with `text` and `label` (0 negative, 1 positive, 2 neutral)."""
    return finance_prompt(text_of(row, "text"), "tweet"), LABELS[index_of(row, "label", 0, 2)]


TASK = SentimentTask(
    name="tfns",
    title="TFNS",
    instruction=finance_instruction("tweet"),
    fields=("text", "label"),
    ask=ask,
    # The content hash is not known yet.
    parts={"": Part(2388)},
    # No commit is known to be the leaderboard's.
    sources=(Source("zeroshot/twitter-financial-news-sentiment", "validation", original=True),),
)
