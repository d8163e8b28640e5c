"""FFA-LoRA: A stays at its initial values on every client, only B is trained, sent and averaged.

Sun et al., https://arxiv.org/abs/2403.12313. With one A for all, the average of the products B_i · A is the product of the
average, which FedAvg on both factors misses. A is a function of the seed, so it is never sent. Example: A = 2, two clients
with 1 and 3 examples reply B = 0 and B = 4: B = 3, B·A = 6 = (1 · 0 · 2 + 3 · 4 · 2) / 4.
"""

from __future__ import annotations

from fedtune.budget.count import Shapes
from fedtune.config.schema import FedTuneConfig
from fedtune.federation.strategies.base import Algorithm


def build(config: FedTuneConfig, shapes: Shapes) -> Algorithm:
    """Return FedAvg on what travels, which for FFA-LoRA is B."""
    return Algorithm(config, shapes)
