"""RoLoRA: B is trained in odd rounds and A in even ones, each averaged while the other is the same everywhere.

Chen et al., https://arxiv.org/abs/2502.01755. With the other factor fixed, the average of the products is the product of the
average, and both factors learn. A client that was not there in the round before needs both factors; it sends back the one
that it trained. Example: A = 2, B = 0; round 1: two clients of equal weight reply B = 1 and B = 3, so B = 2; round 2: they
reply A = 1 and A = 3, so A = 2 and B·A = 4.
"""

from __future__ import annotations

from fedtune.budget.count import Shapes
from fedtune.config.schema import FedTuneConfig
from fedtune.federation.strategies.base import Algorithm


def build(config: FedTuneConfig, shapes: Shapes) -> Algorithm:
    """Return FedAvg on what travels back, which for RoLoRA is B or A in turn."""
    return Algorithm(config, shapes)
