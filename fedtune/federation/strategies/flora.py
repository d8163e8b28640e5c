"""FLoRA: the clients' adapters are stacked, which is the exact average of their products, and become part of the base.

Wang et al., https://arxiv.org/abs/2409.05976. With B = [p_1·B_1 … p_K·B_K] and A = [A_1; …; A_K], B·A is the sum of p_i·B_i·A_i;
averaging A and B apart adds the products of every client's B with every other's A. Each round starts a fresh adapter, a function
of the seed and the round, which therefore is not sent. Example: two clients of equal weight reply A = 1, B = 2 and A = 3, B = 4:
the base gains (2 · 1 + 4 · 3) / 2 = 7 where FedAvg would have 3 · 2 = 6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.base import A, B, Shapes, modules
from fedtune.federation.base_delta import BaseDeltaAlgorithm
from fedtune.federation.reply_validator import Accepted
from fedtune.federation.strategies.base import Algorithm, weighted_mean, weights_of
from fedtune.models.adapter import AdapterTensors, initial_tensors


class FLoRA(BaseDeltaAlgorithm):
    """The stack of all rounds' adapters on the base."""

    def reference(self, server_round: int, read: AdapterTensors) -> AdapterTensors:
        """Differences are from the round's fresh adapter."""
        return read | self._fresh(server_round)

    def aggregate(self, server_round: int, adapter: AdapterTensors, replies: Sequence[Accepted]) -> AdapterTensors:
        """Stack what the clients learnt onto the base, and start afresh."""
        weights, scale = weights_of(replies), self.config.adapter.scale
        found = [reply.tensors for reply in replies]
        self.add(
            {
                module: (
                    torch.cat([w * scale * each[module + B] for each, w in zip(found, weights, strict=True)], dim=1),
                    torch.cat([each[module + A] for each in found]),
                )
                for module in modules(self.shapes)
            }
        )
        others = [name for name in self.shapes if not name.endswith((A, B))]
        return adapter | weighted_mean(found, weights, others) | self._fresh(server_round + 1)

    def _fresh(self, server_round: int) -> AdapterTensors:
        shapes = {name: shape for name, shape in self.shapes.items() if name.endswith((A, B))}
        return initial_tensors(shapes, self.config.seed, server_round)


def build(config: FedTuneConfig, shapes: Shapes) -> Algorithm:
    """Return FLoRA."""
    return FLoRA(config, shapes)
