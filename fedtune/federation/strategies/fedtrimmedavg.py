"""FedTrimmedAvg: of each value of the adapter, the mean of the clients' values without the largest and the smallest.

Yin et al., https://arxiv.org/abs/1803.01498, option II: beta · n values, rounded down, are cut off at each end. Numbers of
examples do not count. Example: beta 0.2, five clients reply -1000.0, 1.0, 2.0, 6.0 and 9000.0: one is cut off at each end, and
the new value is (1.0 + 2.0 + 6.0) / 3 = 3.0.
"""

from __future__ import annotations

from flwr.serverapp.strategy import FedTrimmedAvg

from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.base import Shapes
from fedtune.config.strategies.robust import FedTrimmedAvg as Options
from fedtune.federation.strategies.base import Algorithm
from fedtune.federation.strategies.flower import EVERYONE, OnFlower


def build(config: FedTuneConfig, shapes: Shapes) -> Algorithm:
    """Return Flower's FedTrimmedAvg with the config's beta."""
    options = config.strategy
    assert isinstance(options, Options)
    return OnFlower(config, shapes, FedTrimmedAvg(**EVERYONE, beta=options.beta))
