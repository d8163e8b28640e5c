"""FedProx: FedAvg whose clients add mu/2 · ||w - w_global||² to their loss.

Li et al., https://arxiv.org/abs/1812.06127. Flower's strategy only sends mu; the term itself acts in
`training/local.py`, where a step's gradient gains mu · (w - w_global). Example: mu = 0.5, w = 3.0, w_global = 1.0 adds
0.5 · 2.0 = 1.0 to the gradient.
"""

from __future__ import annotations

from flwr.serverapp.strategy import FedProx, Strategy

from fedtune.config.schema import FedProx as Options
from fedtune.federation.strategies.fedavg import EVERYONE


def build(options: Options) -> Strategy:
    """Return Flower's FedProx with the config's mu."""
    return FedProx(**EVERYONE, proximal_mu=options.proximal_mu)
