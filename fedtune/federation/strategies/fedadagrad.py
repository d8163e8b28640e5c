"""FedAdagrad: the round's average update is a gradient for Adagrad on the server.

Reddi et al., https://arxiv.org/abs/2003.00295, algorithm 2 with beta_1 = 0: v = v + Δ², adapter = adapter + eta · Δ / (√v + tau);
v starts at tau². Example: eta 0.1, tau 1, Δ = 3: v = 1 + 9 = 10, the step is 0.1 · 3 / (√10 + 1) = 0.0721.
"""

from __future__ import annotations

from flwr.serverapp.strategy import FedAdagrad

from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.averages import FedAdagrad as Options
from fedtune.config.strategies.base import Shapes
from fedtune.federation.strategies.base import Algorithm
from fedtune.federation.strategies.flower import EVERYONE, OnMoments, server_rates


def build(config: FedTuneConfig, shapes: Shapes) -> Algorithm:
    """Return Flower's FedAdagrad with the config's rate."""
    options = config.strategy
    assert isinstance(options, Options)
    eta, tau = server_rates(config, options)
    return OnMoments(config, shapes, FedAdagrad(**EVERYONE, eta=eta, tau=tau))
