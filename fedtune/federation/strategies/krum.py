"""Krum: the one client's adapter that lies nearest to its neighbours is the next adapter.

Blanchard et al., https://arxiv.org/abs/1703.02757. With f of n clients hostile, a client's score is the sum of its squared
distances to the n - f - 2 others nearest to it; the lowest score wins, which holds for n of at least 2f + 3. Example: f = 1, five
clients reply 0.0, 1.0, 2.5, 3.0 and 100.0; with two neighbours each, the scores are 1 + 6.25 = 7.25, 1 + 2.25 = 3.25,
0.25 + 2.25 = 2.5, 0.25 + 4 = 4.25 and 97² + 97.5² = 18915.25: the new value is 2.5.
"""

from __future__ import annotations

from flwr.serverapp.strategy import Krum

from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.base import Shapes
from fedtune.config.strategies.robust import Krum as Options
from fedtune.federation.strategies.base import Algorithm
from fedtune.federation.strategies.flower import EVERYONE, OnComparison


def build(config: FedTuneConfig, shapes: Shapes) -> Algorithm:
    """Return Flower's Krum against the config's number of hostile clients."""
    options = config.strategy
    assert isinstance(options, Options)
    return OnComparison(config, shapes, Krum(**EVERYONE, num_malicious_nodes=options.malicious))
