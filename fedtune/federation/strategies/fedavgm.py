"""FedAvgM: the server steps along a running sum of the rounds' updates, each round keeping a share of the sum before.

Hsu et al., https://arxiv.org/abs/1909.06335. With Δ the FedAvg of the replies less the adapter: v = momentum · v + Δ,
adapter = adapter + learning rate · v. Example: momentum 0.5, learning rate 1; the adapter 0.0 and replies whose average is
2.0: v = 2.0, the adapter becomes 2.0; then replies whose average is 3.0: v = 0.5 · 2.0 + 1.0 = 2.0, the adapter becomes 4.0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from flwr.serverapp.strategy import FedAvgM

from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.averages import FedAvgM as Options
from fedtune.config.strategies.base import Shapes
from fedtune.federation.reply_validator import Accepted
from fedtune.federation.strategies.base import Algorithm
from fedtune.federation.strategies.flower import EVERYONE, OnFlower
from fedtune.models.adapter import AdapterTensors


class OnMomentum(OnFlower):
    """On Flower's FedAvgM, whose momentum, an array for each of the adapter's tensors in their order, is the state."""

    strategy: FedAvgM

    def aggregate(self, server_round: int, adapter: AdapterTensors, replies: Sequence[Accepted]) -> AdapterTensors:
        """Step from `adapter`, which after a resume the strategy does not know of."""
        self.strategy.current_arrays = self.record(adapter)
        return super().aggregate(server_round, adapter, replies)

    def state(self) -> AdapterTensors:
        """Return the momentum by the adapter's names; Flower keeps it with the sign of a gradient."""
        momentum = self.strategy.momentum_vector or []
        return {name: torch.from_numpy(values) for name, values in zip(self.shapes, momentum, strict=bool(momentum))}

    def restore(self, state: AdapterTensors) -> None:
        """Take up the momentum."""
        self.strategy.momentum_vector = [state[name].numpy() for name in self.shapes]


def build(config: FedTuneConfig, shapes: Shapes) -> Algorithm:
    """Return Flower's FedAvgM with the config's learning rate and momentum."""
    options = config.strategy
    assert isinstance(options, Options)
    strategy = FedAvgM(
        **EVERYONE,
        server_learning_rate=options.server_learning_rate,
        server_momentum=options.server_momentum,
    )
    return OnMomentum(config, shapes, strategy)
