"""FedAvg: the average of the clients' adapters, weighted by their numbers of examples.

McMahan et al., https://arxiv.org/abs/1602.05629. Example: two clients with 1 and 3 examples reply 0.0 and 4.0; the new value
is (1 · 0.0 + 3 · 4.0) / 4 = 3.0.
"""

from __future__ import annotations

from typing import TypedDict

from flwr.serverapp.strategy import FedAvg, Strategy

from fedtune.config.schema import FedAvg as Options


class Everyone(TypedDict):
    """Settings of Flower's sampling that make a strategy take every node that it is shown."""

    fraction_train: float
    min_train_nodes: int
    min_available_nodes: int


EVERYONE = Everyone(fraction_train=1.0, min_train_nodes=1, min_available_nodes=1)


def build(options: Options) -> Strategy:  # noqa: ARG001 (FedAvg has no options)
    """Return Flower's FedAvg."""
    return FedAvg(**EVERYONE)
