"""Multi-Krum: the average of the clients' adapters with the lowest of Krum's scores.

Blanchard et al., https://arxiv.org/abs/1703.02757; every chosen client counts the same. Without `selected` as many are chosen as
a score has neighbours, n - f - 2. Example: f = 1, five clients reply 0.0, 1.0, 2.5, 3.0 and 100.0; `krum.py` has their scores,
7.25, 3.25, 2.5, 4.25 and 18915.25. The two lowest are averaged: (2.5 + 1.0) / 2 = 1.75.
"""

from __future__ import annotations

from collections.abc import Sequence

from flwr.serverapp.strategy import MultiKrum

from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.base import Shapes
from fedtune.config.strategies.robust import MultiKrum as Options
from fedtune.federation.reply_validator import Accepted
from fedtune.federation.strategies.base import Algorithm
from fedtune.federation.strategies.flower import EVERYONE, OnComparison
from fedtune.models.adapter import AdapterTensors


class OnMultiKrum(OnComparison):
    """On Flower's MultiKrum."""

    strategy: MultiKrum

    def __init__(self, config: FedTuneConfig, shapes: Shapes, options: Options) -> None:
        """Set up with `options`."""
        super().__init__(config, shapes, MultiKrum(**EVERYONE, num_malicious_nodes=options.malicious))
        self.options = options

    def aggregate(self, server_round: int, adapter: AdapterTensors, replies: Sequence[Accepted]) -> AdapterTensors:
        """Average as many as the config or the number of replies says."""
        neighbours = len(replies) - self.options.malicious - 2
        self.strategy.num_nodes_to_select = self.options.selected or neighbours
        return super().aggregate(server_round, adapter, replies)


def build(config: FedTuneConfig, shapes: Shapes) -> Algorithm:
    """Return Flower's MultiKrum against the config's number of hostile clients."""
    assert isinstance(config.strategy, Options)
    return OnMultiKrum(config, shapes, config.strategy)
