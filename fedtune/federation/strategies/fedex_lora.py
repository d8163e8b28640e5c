"""FedEx-LoRA: FedAvg of A and of B, and what that misses of the average of their products becomes part of the base.

Singhal et al., https://arxiv.org/abs/2410.09432. The residual, sum p_i·B_i·A_i - B̄·Ā, is the sum of p_i·B_i·(A_i - Ā): K factors
of the adapter's rank. Example: two clients of equal weight reply A = 1, B = 2 and A = 3, B = 4: A = 2 and B = 3 make 6, the
base gains (2 · 1 + 4 · 3) / 2 - 6 = 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.base import A, B, Shapes, modules
from fedtune.federation.base_delta import BaseDeltaAlgorithm
from fedtune.federation.reply_validator import Accepted
from fedtune.federation.strategies.base import Algorithm, weighted_mean, weights_of
from fedtune.models.adapter import AdapterTensors


class FedExLoRA(BaseDeltaAlgorithm):
    """FedAvg with its residual on the base."""

    def aggregate(
        self,
        server_round: int,  # noqa: ARG002
        adapter: AdapterTensors,  # noqa: ARG002
        replies: Sequence[Accepted],
    ) -> AdapterTensors:
        """Average, and add to the base what the average misses."""
        weights, scale = weights_of(replies), self.config.adapter.scale
        found = [reply.tensors for reply in replies]
        mean = weighted_mean(found, weights, self.shapes)
        self.add(
            {
                module: (
                    torch.cat([w * scale * each[module + B] for each, w in zip(found, weights, strict=True)], dim=1),
                    torch.cat([each[module + A] - mean[module + A] for each in found]),
                )
                for module in modules(self.shapes)
            }
        )
        return mean


def build(config: FedTuneConfig, shapes: Shapes) -> Algorithm:
    """Return FedEx-LoRA."""
    return FedExLoRA(config, shapes)
