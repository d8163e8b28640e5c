"""FlexLoRA: the clients' products B·A are averaged and split again by SVD, so that clients may have different ranks.

Bai et al., https://arxiv.org/abs/2402.11505. The average W = sum p_i·B_i·A_i = U·S·V^T; the next adapter is B = U·S, A = V^T, cut
to the adapter's rank, and each client is sent its first `rank_i` directions. All products are scaled alike, by alpha over the
adapter's rank (over its root with rsLoRA). Example: two clients of equal weight reply A = 1, B = 2 and A = 3, B = 4: W = 7,
A = ±1, B = ±7.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.base import A, B, Shapes, modules
from fedtune.federation.base_delta import split
from fedtune.federation.reply_validator import Accepted, Client
from fedtune.federation.strategies.base import Algorithm, Outgoing, weighted_mean, weights_of
from fedtune.models.adapter import AdapterTensors


class FlexLoRA(Algorithm):
    """The average of the products, split by SVD."""

    def outgoing(self, server_round: int, adapter: AdapterTensors, clients: Sequence[Client]) -> list[Outgoing]:
        """Send each client as many directions as its rank."""
        options = self.config.strategy
        by_rank: dict[tuple[int, int], AdapterTensors] = {}
        ranks = [options.kind(self.config, self.shapes, server_round, client.partition) for client in clients]
        for client, rank in zip(clients, ranks, strict=True):
            if rank not in by_rank:
                shapes = options.down_shapes(self.config, self.shapes, server_round, client.partition)
                by_rank[rank] = {
                    name: adapter[name][tuple(slice(size) for size in shape)] for name, shape in shapes.items()
                }
        return [Outgoing(client, by_rank[rank]) for client, rank in zip(clients, ranks, strict=True)]

    def aggregate(
        self,
        server_round: int,  # noqa: ARG002
        adapter: AdapterTensors,
        replies: Sequence[Accepted],
    ) -> AdapterTensors:
        """Average the products and split their sum."""
        weights, found = weights_of(replies), [reply.tensors for reply in replies]
        others = [name for name in self.shapes if not name.endswith((A, B))]
        result = adapter | weighted_mean(found, weights, others)
        for module in modules(self.shapes):
            left = torch.cat([w * each[module + B] for each, w in zip(found, weights, strict=True)], dim=1)
            right = torch.cat([each[module + A] for each in found])
            directions = min(left.shape[0], *right.shape)
            result[module + B], result[module + A] = split(left, right, self.config.adapter.rank)
            # With both factors zero a direction would never learn: it keeps its row of A.
            result[module + A][directions:] = adapter[module + A][directions:]
        return result


def build(config: FedTuneConfig, shapes: Shapes) -> Algorithm:
    """Return FlexLoRA."""
    return FlexLoRA(config, shapes)
