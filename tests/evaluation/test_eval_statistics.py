"""Interval and paired test, against numbers computed by hand."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.evaluation.statistics import mcnemar, wilson


def pairs(only_first: int, only_second: int, both: int = 0) -> tuple[list[bool], list[bool]]:
    first = [True] * only_first + [False] * only_second + [True] * both
    return first, [False] * only_first + [True] * only_second + [True] * both


def test_wilson_by_hand() -> None:
    # z = 2, k = 8, n = 16: (0.5 + 4/32) / (1 + 4/16) = 0.5, half = 2·√(0.25/16 + 4/1024) / 1.25 = √5/10.
    interval = wilson(8, 16, z=2.0)
    assert (interval.low, interval.high) == pytest.approx((0.5 - math.sqrt(5) / 10, 0.5 + math.sqrt(5) / 10))
    # Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662; 15 of 148 gives 0.0624 to 0.1605.
    assert (wilson(81, 263).low, wilson(81, 263).high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert (wilson(15, 148).low, wilson(15, 148).high) == pytest.approx((0.0624, 0.1605), abs=5e-5)


def test_wilson_at_the_ends() -> None:
    # k = 0: low is 0 and high is z²/(n + z²); z = 2, n = 4 gives 1/2.
    assert (wilson(0, 4, z=2.0).low, wilson(0, 4, z=2.0).high) == (0.0, 0.5)
    assert (wilson(4, 4, z=2.0).low, wilson(4, 4, z=2.0).high) == (0.5, 1.0)
    for k, n in ((0, 0), (-1, 3), (4, 3)):
        with pytest.raises(ValueError, match="not a share"):
            wilson(k, n)


def test_mcnemar_by_hand() -> None:
    result = mcnemar(*pairs(5, 1, both=4))
    assert (result.only_first, result.only_second, result.difference) == (5, 1, 0.4)
    assert result.p_value == 2 * (1 + 6) / 64
    # 10 against 2: 2·(1 + 12 + 66) / 4096.
    assert mcnemar(*pairs(2, 10)).p_value == 158 / 4096
    assert mcnemar(*pairs(2, 10)).difference == -8 / 12
    assert mcnemar(*pairs(3, 3)).p_value == 1.0
    assert mcnemar(*pairs(0, 0, both=1)).p_value == 1.0
    assert mcnemar(*pairs(5000, 0)).p_value == 0.0


def test_mcnemar_needs_pairs() -> None:
    for first, second in (([], []), ([True], [])):
        with pytest.raises(ValueError, match="paired"):
            mcnemar(first, second)


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_equals_the_sum_of_binomials(only_first: int, only_second: int) -> None:
    m, low = only_first + only_second, min(only_first, only_second)
    plain = min(Fraction(1), Fraction(2 * sum(math.comb(m, count) for count in range(low + 1)), 2**m))
    assert mcnemar(*pairs(only_first, only_second, both=1)).p_value == float(plain)


@settings(deadline=None)
@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_mirrors(kn: tuple[int, int]) -> None:
    k, n = kn
    interval, mirrored = wilson(k, n), wilson(n - k, n)
    assert 0 <= interval.low <= k / n <= interval.high <= 1
    assert interval.low == pytest.approx(1 - mirrored.high, abs=1e-12)
