"""Statistics of accuracies: a confidence interval, and a paired test between two models on the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a share, 0 <= low <= high <= 1."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedTest:
    """The comparison of two models on the same questions."""

    only_first: int
    """Questions that only the first got right."""
    only_second: int
    """Questions that only the second got right."""
    difference: float
    """Accuracy of the first minus that of the second."""
    p_value: float
    """Exact two-sided p-value of McNemar's test."""


def wilson(k: int, n: int, z: float = Z_95) -> Interval:
    """Return Wilson's score interval of k right among n (https://doi.org/10.1080/01621459.1927.10502953).

    Unlike p ± 1.96·√(p(1-p)/n), it stays between 0 and 1 and is not empty at k = 0 or k = n.

    >>> wilson(5, 10)
    Interval(low=0.236593090511256, high=0.7634069094887439)

    Raises:
        ValueError: not 0 <= k <= n, or n is 0.
    """
    if n <= 0 or not 0 <= k <= n:
        raise ValueError(f"k = {k} of n = {n} is not a share")
    share, square = k / n, z * z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = z * math.sqrt(share * (1 - share) / n + square / (4 * n * n)) / (1 + square / n)
    # Rounding may leave 1e-17 at the ends.
    return Interval(0.0 if k == 0 else max(0.0, middle - half), 1.0 if k == n else min(1.0, middle + half))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
    """Test whether two models differ on the questions that only one of them got right (https://doi.org/10.1007/BF02295996).

    The test is exact and two-sided: under the null hypothesis each of these questions is a fair coin, so p is twice the
    binomial tail, P(X <= smaller count) at 1/2, and at most 1. There is no mid-p correction, so p is never too small.

    >>> mcnemar([True] * 5 + [False], [False] * 5 + [True]).p_value  # 2 · (1 + 6) / 64
    0.21875

    Args:
        first: Whether the first model is right, for each question.
        second: The same for the second model, the questions in the same order.

    Raises:
        ValueError: the lengths differ, or there are no questions.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} answers cannot be paired")
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    differing = only_first + only_second
    # Integers up to the one division, so that nothing underflows.
    tail, term = 0, 1
    for count in range(min(only_first, only_second) + 1):
        tail += term
        term = term * (differing - count) // (count + 1)
    return PairedTest(
        only_first=only_first,
        only_second=only_second,
        difference=(only_first - only_second) / len(first),
        p_value=min(1.0, 2 * tail / 2**differing),
    )
