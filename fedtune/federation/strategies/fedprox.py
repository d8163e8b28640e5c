"""FedProx: FedAvg whose clients add mu/2 · ||w - w_global||² to their loss.

Li et al., https://arxiv.org/abs/1812.06127. Flower's strategy only sends mu; the term itself acts in
`training/local.py`, where a step's gradient gains mu · (w - w_global). Example: mu = 0.5, w = 3.0, w_global = 1.0 adds
0.5 · 2.0 = 1.0 to the gradient.
"""

from __future__ import annotations

from flwr.serverapp.strategy import FedProx

from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.averages import FedProx as Options
from fedtune.config.strategies.base import Shapes
from fedtune.federation.strategies.base import Algorithm
from fedtune.federation.strategies.flower import EVERYONE, OnFlower


def build(config: FedTuneConfig, shapes: Shapes) -> Algorithm:
    """Return Flower's FedProx with the config's mu."""
    options = config.strategy
    assert isinstance(options, Options)
    return OnFlower(config, shapes, FedProx(**EVERYONE, proximal_mu=options.proximal_mu))
