"""From outputs to the leaderboard's accuracy, and what that hides (protocol, sections 4 and 5)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedtune.errors import UsageError
from fedtune.evaluation.benchmarks.base import AnswerType

ACCEPTED = frozenset(("a", "b", "c", "d", "e", "yes", "no"))
SENTIMENTS = ("positive", "negative", "neutral")
# The first of these that an output holds is replaced.
DOUBLED = (("yesyes", "yes"), ("nono", "no"), ("yesno", "yes"), ("noyes", "no"))


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to one question."""

    prompt: str
    """The unwrapped prompt."""
    gold: str
    output: str
    """The new text only; in finance what follows the first `Answer: `, or `None`."""
    subset: str | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """What an output is taken for."""

    value: str
    """Lower case; the whole lower-cased output where nothing else was found in it."""
    parsed: bool
    """Whether the output could be right at all: otherwise its form failed, whatever the model knows."""


@dataclass(frozen=True)
class SubsetScore:
    """The score on one subset."""

    name: str
    n: int
    k: int
    unparsed: int | None

    @property
    def accuracy(self) -> float:
        """k / n."""
        return self.k / self.n


@dataclass(frozen=True)
class Score:
    """The leaderboard's accuracy and what stands behind it."""

    n: int
    """Questions."""
    k: int
    """Right answers."""
    unparsed: int | None
    """Outputs that are no answer in form; None where only the mapped answers are known."""
    unparsed_outputs: tuple[tuple[str, int], ...]
    """The most frequent of them with their counts, at most five."""
    k_parsed: int
    """Right answers among the parsed ones."""
    subsets: tuple[SubsetScore, ...]
    """One row a subset, in the data's order; empty where there are none."""
    majority: str
    """The most frequent prediction."""
    majority_count: int
    correct: tuple[bool, ...] = field(repr=False)
    """Whether each answer is right, in the data's order; what a paired test needs."""

    @property
    def accuracy(self) -> float:
        """k / n, the published number."""
        return self.k / self.n

    @property
    def unparsed_share(self) -> float | None:
        """Unparsed outputs over questions."""
        return None if self.unparsed is None else self.unparsed / self.n

    @property
    def accuracy_parsed(self) -> float | None:
        """Accuracy on the answers that could be parsed; None where none could, or where that is not known."""
        if self.unparsed is None or self.unparsed == self.n:
            return None
        return self.k_parsed / (self.n - self.unparsed)

    @property
    def majority_share(self) -> float:
        """Share of the most frequent prediction: near 1 for a model that always says the same."""
        return self.majority_count / self.n


def predict(output: str, answer_type: AnswerType) -> Prediction:
    """Return what `output` is taken for (protocol, section 4; section 5 for `sentiment`).

    >>> predict("B. Because", "choice"), predict("The answer", "choice")
    (Prediction(value='b', parsed=True), Prediction(value='the answer', parsed=False))
    """
    if answer_type == "sentiment":
        return _predict_sentiment(output)
    raw = output.lower()
    text = raw.split("\n##")[1].split("\n")[0] if "\n##" in raw else raw
    text = re.sub(" +", " ", re.sub("[^a-zA-Z0-9]", " ", text).strip())
    if answer_type == "choice":
        text = text[:1]
    else:
        doubled, single = next((pair for pair in DOUBLED if pair[0] in text), ("", ""))
        text = text.replace(doubled, single) if doubled else text
    if text in ACCEPTED:
        return Prediction(text, True)
    # "maybe" is not accepted, yet an output of exactly that is compared as it stands and may be right.
    return Prediction(raw, answer_type == "yes-no" and raw == "maybe")


def _predict_sentiment(output: str) -> Prediction:
    for sentiment in SENTIMENTS:
        if sentiment in output or sentiment.capitalize() in output:
            return Prediction(sentiment, True)
    return Prediction("neutral", False)


def score(answers: Sequence[Answer], answer_type: AnswerType, *, mapped: bool = False) -> Score:
    """Score answers as the leaderboard does.

    Args:
        answers: In the data set's order.
        answer_type: The benchmark's.
        mapped: The outputs are the predictions already, as in the leaderboard's finance files; how many of them were
            unparsed is then not known.

    Raises:
        UsageError: there are no answers.
    """
    if not answers:
        raise UsageError("There are no answers to score.")
    predictions = [predict(answer.output, answer_type) for answer in answers]
    golds = [
        _predict_sentiment(answer.gold).value if answer_type == "sentiment" else answer.gold.lower()
        for answer in answers
    ]
    correct = [prediction.value == gold for prediction, gold in zip(predictions, golds, strict=True)]
    parsed = [mapped or prediction.parsed for prediction in predictions]
    missed = Counter(answer.output for answer, is_parsed in zip(answers, parsed, strict=True) if not is_parsed)
    majority, majority_count = Counter(prediction.value for prediction in predictions).most_common(1)[0]

    places: dict[str, list[int]] = {}
    for place, answer in enumerate(answers):
        if answer.subset is not None:
            places.setdefault(answer.subset, []).append(place)
    subsets = tuple(
        SubsetScore(
            name=name,
            n=len(at),
            k=sum(correct[place] for place in at),
            unparsed=None if mapped else sum(not parsed[place] for place in at),
        )
        for name, at in places.items()
    )
    return Score(
        n=len(answers),
        k=sum(correct),
        unparsed=None if mapped else sum(missed.values()),
        unparsed_outputs=tuple(missed.most_common(5)),
        k_parsed=sum(right and is_parsed for right, is_parsed in zip(correct, parsed, strict=True)),
        subsets=subsets,
        majority=majority,
        majority_count=majority_count,
        correct=tuple(correct),
    )
