"""FIQA, sentiment of 304 financial headlines and posts (https://doi.org/10.1145/3184558.3192301).

Instruction: What is the sentiment of this tweet? Please choose an answer from {negative/neutral/positive}.
Input: Long $TUNE, looking good
Answer:
"""

from __future__ import annotations

from fedtune.evaluation.tasks.base import Part, Row, RowError, Source, text_of
from fedtune.evaluation.tasks.sentiment import SentimentTask, finance_instruction, finance_prompt, held_out


def ask(row: Row) -> tuple[str, str]:
    """Return prompt and gold of a row with `sentence`, `sentiment_score` (-1 to 1) and `format` (`post` is a tweet)."""
    score = row["sentiment_score"]
    if isinstance(score, bool) or not isinstance(score, int | float) or not -1 <= score <= 1:
        raise RowError(f"sentiment_score is {score!r}, not a number from -1 to 1")
    gold = "negative" if score < -0.1 else "neutral" if score < 0.1 else "positive"
    return finance_prompt(text_of(row, "sentence"), "tweet" if row["format"] == "post" else "news"), gold


TASK = SentimentTask(
    name="fiqa",
    title="FIQA",
    instruction=finance_instruction("news"),
    other_instructions=(finance_instruction("tweet"),),
    fields=("sentence", "sentiment_score", "format"),
    more_fields=("_id", "aspect", "aspects", "snippets", "target", "label"),
    ask=ask,
    # The content hash is not known yet.
    parts={"": Part(304)},
    # No commit is known to be the leaderboard's.
    sources=(Source("pauri32/fiqa-2018", "train+validation+test", original=True, rows=held_out),),
)
