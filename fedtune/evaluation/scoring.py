"""The leaderboard's accuracy over all answers, and the counts that explain it (protocol, sections 4 and 5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedtune.errors import UsageError
from fedtune.evaluation.tasks.base import Answer, Task


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
    """The leaderboard's accuracy with its counts."""

    n: int
    """Questions."""
    k: int
    """Right answers."""
    unparsed: int | None
    """Outputs that do not have the form of an answer; None where only the predictions are known."""
    unparsed_outputs: tuple[tuple[str, int], ...]
    """The most frequent of them with their counts, at most five."""
    k_parsed: int
    """Right answers among the parsed ones."""
    subsets: tuple[SubsetScore, ...]
    """In the data's order; empty where there are no subsets."""
    majority: str
    """The most frequent prediction."""
    majority_count: int
    correct: tuple[bool, ...] = field(repr=False)
    """Whether each answer is right, in the data's order, for a paired test."""

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
        """Accuracy on the parsed answers; None where there are none, or where their number is not known."""
        if self.unparsed is None or self.unparsed == self.n:
            return None
        return self.k_parsed / (self.n - self.unparsed)

    @property
    def majority_share(self) -> float:
        """Share of the most frequent prediction: near 1 for a model that always gives the same answer."""
        return self.majority_count / self.n


def score_answers(task: Task, answers: Sequence[Answer], *, mapped: bool = False) -> Score:
    """Score answers as the leaderboard does.

    Args:
        task: The benchmark, or any other of the same answer type.
        answers: In the data set's order.
        mapped: Whether the outputs are predictions already, as in the leaderboard's finance files, so that the number of
            unparsed outputs is not known.

    Raises:
        UsageError: there are no answers.
    """
    if not answers:
        raise UsageError("There are no answers to score.")
    predictions = [task.score(question, output) for question, output in answers]
    parsed = [mapped or prediction.parsed for prediction in predictions]
    unparsed = Counter(answer.output for answer, is_parsed in zip(answers, parsed, strict=True) if not is_parsed)
    majority, majority_count = Counter(prediction.value for prediction in predictions).most_common(1)[0]

    by_subset: dict[str, list[int]] = {}
    for index, (question, _) in enumerate(answers):
        if question.subset is not None:
            by_subset.setdefault(question.subset, []).append(index)
    subsets = tuple(
        SubsetScore(
            name=name,
            n=len(indices),
            k=sum(predictions[index].correct for index in indices),
            unparsed=None if mapped else sum(not parsed[index] for index in indices),
        )
        for name, indices in by_subset.items()
    )
    correct = tuple(prediction.correct for prediction in predictions)
    return Score(
        n=len(answers),
        k=sum(correct),
        unparsed=None if mapped else sum(unparsed.values()),
        unparsed_outputs=tuple(unparsed.most_common(5)),
        k_parsed=sum(right and is_parsed for right, is_parsed in zip(correct, parsed, strict=True)),
        subsets=subsets,
        majority=majority,
        majority_count=majority_count,
        correct=correct,
    )
