"""FedYogi: as FedAdam, with a second moment that moves towards Δ² by at most (1 - beta_2) · Δ².

Reddi et al., https://arxiv.org/abs/2003.00295, algorithm 2: m = beta_1 · m + (1 - beta_1) · Δ,
v = v - (1 - beta_2) · Δ² · sign(v - Δ²), adapter = adapter + eta · m / (√v + tau); m starts at 0 and v at tau². Example: eta 0.1,
beta_1 0.5, beta_2 0.75, tau 1, Δ = 2: m = 1, v = 1 + 0.25 · 4 = 2, the step is 0.1 · 1 / (√2 + 1) = 0.0414.
"""

from __future__ import annotations

from flwr.serverapp.strategy import FedYogi

from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.averages import FedYogi as Options
from fedtune.config.strategies.base import Shapes
from fedtune.federation.strategies.base import Algorithm
from fedtune.federation.strategies.flower import EVERYONE, OnMoments, server_rates


def build(config: FedTuneConfig, shapes: Shapes) -> Algorithm:
    """Return Flower's FedYogi with the config's rates."""
    options = config.strategy
    assert isinstance(options, Options)
    eta, tau = server_rates(config, options)
    strategy = FedYogi(**EVERYONE, eta=eta, beta_1=options.beta_1, beta_2=options.beta_2, tau=tau)
    return OnMoments(config, shapes, strategy)
