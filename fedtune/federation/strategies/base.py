"""What an algorithm is on the server: who is sent what, how replies become the next adapter, what must survive a crash.

The algorithm of this file itself is FedAvg on whatever part of the adapter travels (`config/strategies/` says which): the part
that clients train is averaged, the rest stays. Algorithms override what they do differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from fedtune.config.schema import AdapterConfig, FedTuneConfig
from fedtune.config.strategies.base import Shapes
from fedtune.federation.reply_validator import Accepted, Client
from fedtune.models.adapter import AdapterTensors


@dataclass(frozen=True)
class Outgoing:
    """What one client is sent."""

    client: Client
    tensors: AdapterTensors
    """Names and shapes as `down_shapes` says; clients that are sent the same share one object."""
    values: Mapping[str, int | float] = field(default_factory=dict)
    """The strategy's values for the client, beside the round and its learning rate."""


class ClientPart(Protocol):
    """What a strategy adds to training on a client in one round."""

    def __call__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Change the gradients of a step."""

    def changes(self) -> AdapterTensors:
        """Return the tensors that travel beside the adapter."""

    def kept(self) -> AdapterTensors:
        """Return what the client keeps for its next round."""


class Algorithm:
    """FedAvg on the part of the adapter that travels; the base of all others."""

    def __init__(self, config: FedTuneConfig, shapes: Shapes) -> None:
        """Set up for a run's config and the whole adapter's names and shapes."""
        self.config = config
        self.shapes = shapes

    def outgoing(self, server_round: int, adapter: AdapterTensors, clients: Sequence[Client]) -> list[Outgoing]:
        """Return what each of the round's clients is sent."""
        wanted = self.config.strategy.down_shapes(self.config, self.shapes, server_round, clients[0].partition)
        tensors = {name: adapter[name] for name in wanted}
        return [Outgoing(client, tensors) for client in clients]

    def reference(self, server_round: int, read: AdapterTensors) -> AdapterTensors:  # noqa: ARG002
        """Return what a reply's differences are relative to, where the codec sends differences; other tensors come whole.

        Args:
            server_round: From 1.
            read: What the client has read of its message.
        """
        return read

    def aggregate(self, server_round: int, adapter: AdapterTensors, replies: Sequence[Accepted]) -> AdapterTensors:
        """Return the next adapter from the accepted replies, which are in partition order."""
        names = self.config.strategy.up_shapes(self.config, self.shapes, server_round, replies[0].client.partition)
        return {**adapter, **weighted_mean([reply.tensors for reply in replies], weights_of(replies), names)}

    def state(self) -> AdapterTensors:
        """Return what must survive a crash beside the adapter, as tensors by name; empty for most."""
        return {}

    def restore(self, state: AdapterTensors) -> None:
        """Take up a state that `state` has returned."""

    def published(self, adapter: AdapterTensors) -> tuple[AdapterTensors, AdapterConfig]:
        """Return the adapter as it is written to files, and the settings that it then has."""
        return adapter, self.config.adapter


def weights_of(replies: Sequence[Accepted]) -> list[float]:
    """Return each reply's share of the round's examples; they sum to 1."""
    examples = [float(reply.report.examples) for reply in replies]
    return [count / sum(examples) for count in examples]


def weighted_mean(
    adapters: Sequence[AdapterTensors], weights: Sequence[float], names: Mapping[str, object] | Sequence[str]
) -> AdapterTensors:
    """Return the weighted sum of the adapters' tensors of `names`, in float64 and then float32, in the order given."""
    mean = {}
    for name in names:
        total = torch.zeros(adapters[0][name].shape, dtype=torch.float64)
        for adapter, weight in zip(adapters, weights, strict=True):
            total += adapter[name].to(torch.float64) * weight
        mean[name] = total.to(torch.float32)
    return mean
