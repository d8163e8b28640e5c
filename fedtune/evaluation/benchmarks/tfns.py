"""TFNS, sentiment of 2,388 finance-related tweets (https://huggingface.co/datasets/zeroshot/twitter-financial-news-sentiment).

Instruction: What is the sentiment of this tweet? Please choose an answer from {negative/neutral/positive}.
Input: $TUNE: shares slide after warning
Answer:
"""

from __future__ import annotations

from fedtune.evaluation.benchmarks.base import (
    Benchmark,
    Part,
    Row,
    Source,
    finance_instruction,
    finance_prompt,
    index_of,
    text_of,
)

# Another order than FPB's.
LABELS = ("negative", "positive", "neutral")


def ask(row: Row) -> tuple[str, str]:
    """Return prompt and gold of a row with `text` and `label` (0 negative, 1 positive, 2 neutral)."""
    return finance_prompt(text_of(row, "text"), "tweet"), LABELS[index_of(row, "label", 0, 2)]


BENCHMARK = Benchmark(
    name="tfns",
    title="TFNS",
    answer_type="sentiment",
    instruction=finance_instruction("tweet"),
    chance=1 / 3,
    fields=("text", "label"),
    ask=ask,
    # The content hash is not known yet: the official rows were not at hand.
    parts={"": Part(2388)},
    # No commit is known to be the leaderboard's.
    sources=(Source("zeroshot/twitter-financial-news-sentiment", "validation", original=True),),
)
