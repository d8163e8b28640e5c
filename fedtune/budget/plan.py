"""What a run would send, from shapes alone: no weights are loaded, and for a recipe's own base no network is needed."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.budget.count import adapter_bytes
from fedtune.config.facts import known_architecture
from fedtune.config.schema import FedTuneConfig

_NPY_DTYPES = {"float32": "<f4", "bf16": "<u2", "fp16": "<f2"}


@dataclass(frozen=True)
class Plan:
    """A run's work and its training messages, in the leaderboard's count."""

    rounds: int
    clients_per_round: int
    steps_per_round: int
    """Most optimiser steps of a client in a round; fewer when its rows run out first."""
    parameters: int
    """Trainable parameters of the adapter."""
    message_bytes: int
    """One adapter, one way."""
    round_bytes: int
    """All messages of a round, both ways."""
    total_bytes: int
    """All messages of the run, both ways."""


def plan(config: FedTuneConfig) -> Plan:
    """Return what a run of `config` would do and send.

    Raises:
        MissingError: the base's config.json is needed for the adapter's shapes and cannot be had.
    """
    from math import prod

    from fedtune.models.shapes import adapter_shapes

    shapes = adapter_shapes(config.model, config.adapter, known_architecture(config))
    message = adapter_bytes(shapes, _NPY_DTYPES[config.communication.wire_dtype])
    of_round = 2 * message * config.federation.clients_per_round
    return Plan(
        rounds=config.federation.rounds,
        clients_per_round=config.federation.clients_per_round,
        steps_per_round=config.training.max_steps,
        parameters=sum(prod(shape) for shape in shapes.values()),
        message_bytes=message,
        round_bytes=of_round,
        total_bytes=of_round * config.federation.rounds,
    )
