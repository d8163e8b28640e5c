"""What some algorithms add to the base: a sum of products, kept as factors while they are smaller, sent with the adapter.

The base may be quantized and is never changed; clients add the delta to the outputs of its modules
(`AdaptedModel.set_base_delta`). In files the delta and the adapter are one LoRA adapter of a higher rank, which PEFT reads as any
other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fedtune.config.schema import AdapterConfig, FedTuneConfig
from fedtune.config.strategies.base import A, B, Shapes, modules
from fedtune.config.strategies.base_delta import DELTA, DELTA_A, DELTA_B, is_dense
from fedtune.federation.reply_validator import Client
from fedtune.federation.strategies.base import Algorithm, Outgoing
from fedtune.models.adapter import AdapterTensors

_RANK = "offset_rank"

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""By module: (out_features, R) and (R, in_features)."""


class BaseDeltaAlgorithm(Algorithm):
    """An algorithm that adds to the base; what it adds, and when, the algorithms say."""

    def __init__(self, config: FedTuneConfig, shapes: Shapes) -> None:
        """Set up with nothing added."""
        super().__init__(config, shapes)
        self.delta: AdapterTensors = {}
        self.rank = 0
        """Rank of the delta's factors; it grows on where they have become one matrix."""

    def outgoing(self, server_round: int, adapter: AdapterTensors, clients: Sequence[Client]) -> list[Outgoing]:
        """Send the delta, and what of the adapter travels."""
        wanted = self.config.strategy.down_shapes(
            self.config, self.shapes, server_round, clients[0].partition, self.rank
        )
        held = adapter | self.delta
        tensors = {name: held[name] for name in wanted}
        return [Outgoing(client, tensors, {"offset-rank": self.rank}) for client in clients]

    def add(self, factors: Factors) -> None:
        """Add products of factors, all of one rank, to the delta."""
        self.rank += next(left.shape[1] for left, _ in factors.values())
        delta: AdapterTensors = {}
        for module, (left, right) in factors.items():
            before = product_of(self.delta, module)
            if is_dense(self.rank, left.shape[0], right.shape[1]):
                total = (left.double() @ right.double()).float()
                delta[module + DELTA] = total if before is None else total + before[0] @ before[1]
            else:
                delta[module + DELTA_A] = right if before is None else torch.cat([before[1], right])
                delta[module + DELTA_B] = left if before is None else torch.cat([before[0], left], dim=1)
        self.delta = {name: tensor.contiguous() for name, tensor in delta.items()}

    def state(self) -> AdapterTensors:
        """Return the delta and its rank."""
        return {**self.delta, _RANK: torch.tensor(self.rank)}

    def restore(self, state: AdapterTensors) -> None:
        """Restore the delta."""
        self.delta = {name: tensor for name, tensor in state.items() if name != _RANK}
        self.rank = int(state[_RANK])

    def published(self, adapter: AdapterTensors) -> tuple[AdapterTensors, AdapterConfig]:
        """Return adapter and delta as one adapter of scale 1, whose rank is the same for all modules: filled up with zeros."""
        parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for module in modules(self.shapes):
            left, right = adapter[module + B] * self.config.adapter.scale, adapter[module + A]
            parts[module] = [(left, right)] if left.any() else []
            if (held := product_of(self.delta, module)) is not None:
                most = min(self.rank, held[0].shape[0], held[1].shape[1])
                parts[module].append(split(*held, most) if held[0].shape[1] > most else held)
        rank = max(1, *(sum(left.shape[1] for left, _ in pairs) for pairs in parts.values()))
        tensors = dict(adapter)
        for module, pairs in parts.items():
            out_features, in_features = adapter[module + B].shape[0], adapter[module + A].shape[1]
            tensors[module + A], tensors[module + B] = torch.zeros(rank, in_features), torch.zeros(out_features, rank)
            start = 0
            for left, right in pairs:
                tensors[module + A][start : start + len(right)] = right
                tensors[module + B][:, start : start + len(right)] = left
                start += len(right)
        return tensors, self.config.adapter.model_copy(update={"rank": rank, "alpha": rank, "rslora": False})


def product_of(delta: AdapterTensors, module: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the factors of what is added to a module; a matrix as itself times the identity."""
    if (dense := delta.get(module + DELTA)) is not None:
        return dense, torch.eye(dense.shape[1])
    if module + DELTA_A in delta:
        return delta[module + DELTA_B], delta[module + DELTA_A]
    return None


def split(left: torch.Tensor, right: torch.Tensor, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return U·S (out_features, rank) and V^T (rank, in_features) of the SVD of left @ right, float32.

    The product itself is never made: QR of both factors leaves a small matrix to decompose, in float64.

    Args:
        left: (out_features, R).
        right: (R, in_features).
        rank: How many of the largest singular values are kept, zeros beyond those there are; None keeps all.
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    u, s, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    left, right = (q_left @ u * s).float(), (vt @ q_right.T).float()
    if rank is None:
        return left, right
    missing = max(0, rank - left.shape[1])
    pad = torch.nn.functional.pad
    return pad(left[:, :rank], (0, missing)).contiguous(), pad(right[:rank], (0, 0, 0, missing)).contiguous()
