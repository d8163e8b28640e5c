"""FedAvg: the average of the clients' adapters, weighted by their numbers of examples.

McMahan et al., https://arxiv.org/abs/1602.05629. Example: two clients with 1 and 3 examples reply 0.0 and 4.0; the new value
is (1 · 0.0 + 3 · 4.0) / 4 = 3.0.
"""

from __future__ import annotations

from flwr.serverapp.strategy import FedAvg

from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.base import Shapes
from fedtune.federation.strategies.base import Algorithm
from fedtune.federation.strategies.flower import EVERYONE, OnFlower


def build(config: FedTuneConfig, shapes: Shapes) -> Algorithm:
    """Return Flower's FedAvg."""
    return OnFlower(config, shapes, FedAvg(**EVERYONE))
