"""FedAdam: the round's average update is a gradient for Adam on the server.

Reddi et al., https://arxiv.org/abs/2003.00295, algorithm 2. With Δ the FedAvg of the replies less the adapter, value by value:
m = beta_1 · m + (1 - beta_1) · Δ, v = beta_2 · v + (1 - beta_2) · Δ², adapter = adapter + eta · m / (√v + tau); m starts at 0 and
v at tau². Example: eta 0.1, beta_1 0.5, beta_2 0.75, tau 1, Δ = 3: m = 1.5, v = 0.75 · 1 + 0.25 · 9 = 3, the step is
0.1 · 1.5 / (√3 + 1) = 0.0549.
"""

from __future__ import annotations

from collections.abc import Sequence

from flwr.serverapp.strategy import FedAdam

from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.averages import FedAdam as Options
from fedtune.config.strategies.base import Shapes
from fedtune.federation.reply_validator import Accepted
from fedtune.federation.strategies.base import Algorithm
from fedtune.federation.strategies.flower import EVERYONE, OnMoments, server_rates
from fedtune.models.adapter import AdapterTensors


class OnAdam(OnMoments):
    """On Flower's FedAdam, without its bias correction, which the paper does not have and which counts one round too many."""

    def __init__(self, config: FedTuneConfig, shapes: Shapes, options: Options) -> None:
        """Set up with `options`."""
        self.options = options
        self.eta, tau = server_rates(config, options)
        strategy = FedAdam(**EVERYONE, eta=self.eta, beta_1=options.beta_1, beta_2=options.beta_2, tau=tau)
        super().__init__(config, shapes, strategy)

    def aggregate(self, server_round: int, adapter: AdapterTensors, replies: Sequence[Accepted]) -> AdapterTensors:
        """Undo what Flower is about to multiply eta by."""
        first, second = (1 - beta ** (server_round + 1) for beta in (self.options.beta_1, self.options.beta_2))
        self.strategy.eta = self.eta * first / second**0.5
        return super().aggregate(server_round, adapter, replies)


def build(config: FedTuneConfig, shapes: Shapes) -> Algorithm:
    """Return Flower's FedAdam with the config's rates."""
    assert isinstance(config.strategy, Options)
    return OnAdam(config, shapes, config.strategy)
