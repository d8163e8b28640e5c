"""Strategies that withstand hostile clients."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedtune.config.strategies.base import StrategyOptions


class FedMedian(StrategyOptions):
    """The median of the clients' adapters, value by value (https://arxiv.org/abs/1803.01498)."""

    name: Literal["fedmedian"]
    """Withstands just under half of the clients of a round, three of which must reply; ignores numbers of examples."""

    @property
    def replies_needed(self) -> int:
        """The fewest replies of a round with which the strategy withstands the hostile clients."""
        return 3


class FedTrimmedAvg(StrategyOptions):
    """The mean without each value's extremes (https://arxiv.org/abs/1803.01498)."""

    name: Literal["fedtrimmedavg"]
    """Drops the largest and the smallest of each value, then averages; ignores numbers of examples."""
    beta: float = Field(0.2, ge=0.001, lt=0.5)
    """Share of a round's replies that is cut off at each end, rounded down; too few replies to cut one fail the round."""

    @property
    def replies_needed(self) -> int:
        """The fewest replies of a round with which the strategy withstands the hostile clients."""
        replies = int(1 / self.beta)
        while not int(self.beta * replies):  # the strategy rounds the number that it cuts off down
            replies += 1
        return replies


class Krum(StrategyOptions):
    """The one adapter nearest to its neighbours (https://arxiv.org/abs/1703.02757)."""

    name: Literal["krum"]
    """Takes a single client's adapter each round; 2 · malicious + 3 clients must reply."""
    malicious: int = Field(1, ge=0)
    """Clients a round that may be hostile."""

    @property
    def replies_needed(self) -> int:
        """The fewest replies of a round with which the strategy withstands the hostile clients."""
        return 2 * self.malicious + 3


class MultiKrum(StrategyOptions):
    """The average of the adapters nearest to their neighbours (https://arxiv.org/abs/1703.02757)."""

    name: Literal["multikrum"]
    """As Krum, averaging several; ignores numbers of examples."""
    malicious: int = Field(1, ge=0)
    """Clients a round that may be hostile."""
    selected: int | None = Field(None, ge=1)
    """Clients whose adapters are averaged; None is as many as a score has neighbours: the replies less `malicious` and 2."""

    @property
    def replies_needed(self) -> int:
        """The fewest replies of a round with which the strategy withstands the hostile clients."""
        return max(2 * self.malicious + 3, self.malicious + (self.selected or 0))


class Bulyan(StrategyOptions):
    """Krum, then a trimmed mean (https://arxiv.org/abs/1802.07927)."""

    name: Literal["bulyan"]
    """4 · malicious + 3 clients must reply; ignores numbers of examples."""
    malicious: int = Field(1, ge=0)
    """Clients a round that may be hostile."""

    @property
    def replies_needed(self) -> int:
        """The fewest replies of a round with which the strategy withstands the hostile clients."""
        return 4 * self.malicious + 3
