"""FedMedian: of each value of the adapter, the median of the clients' values.

Yin et al., https://arxiv.org/abs/1803.01498, option I; for an even number of clients the mean of the two in the middle. Numbers
of examples do not count. Example: clients reply 1.0, 2.0 and 1000.0; the new value is 2.0, where their mean is 334.3.
"""

from __future__ import annotations

from flwr.serverapp.strategy import FedMedian

from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.base import Shapes
from fedtune.federation.strategies.base import Algorithm
from fedtune.federation.strategies.flower import EVERYONE, OnFlower


def build(config: FedTuneConfig, shapes: Shapes) -> Algorithm:
    """Return Flower's FedMedian."""
    return OnFlower(config, shapes, FedMedian(**EVERYONE))
