"""What a run would send, from shapes alone: no weights are loaded, and for a recipe's own base no network is needed."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from fedtune.budget.count import WIRE_FORMATS, Shapes, adapter_bytes
from fedtune.budget.envelope import Span, message_span, reply_span
from fedtune.config.facts import known_architecture
from fedtune.config.schema import FedTuneConfig


@dataclass(frozen=True)
class Plan:
    """A run's work and its training messages.

    Bytes without another word are the leaderboard's count: arrays and their keys (protocol, section 3). `serialised` ones are
    everything that Flower serialises, as a span: some numbers beside the adapter have no fixed length.
    """

    rounds: int
    clients: int
    clients_per_round: int
    steps_per_round: int
    """Most optimiser steps of a client in a round; fewer when its rows run out first."""
    strategy: str
    wire_dtype: str
    arrays: int
    """Tensors in a message."""
    parameters: int
    """Trainable parameters of the adapter."""
    message_bytes: int
    """One message to a client."""
    reply_bytes: int
    """One client's reply."""
    client_round_bytes: int
    """A client's part of a round that it takes part in, both ways."""
    client_bytes: float
    """A client's part of the run, both ways, on average: a round's clients are drawn by lot."""
    round_bytes: int
    """All messages of a round, both ways."""
    down_bytes: int
    """All messages of the run to clients."""
    up_bytes: int
    """All replies of the run."""
    total_bytes: int
    """All messages of the run, both ways."""
    serialised_message: Span
    serialised_reply: Span
    serialised_round: Span
    serialised_total: Span


@dataclass(frozen=True)
class TransferTime:
    """How long the messages are on their way, every client on a link of its own and all of them at once."""

    down_s: float
    """One message to a client."""
    up_s: float
    """One reply."""
    round_s: float
    """A round, which ends with its slowest client; all have the same link here."""
    total_s: float
    """The run."""


def plan(config: FedTuneConfig, shapes: Shapes | None = None) -> Plan:
    """Return what a run of `config` would do and send.

    Args:
        config: The run's config.
        shapes: Names and shapes of the adapter's tensors, where they are known already.

    Raises:
        MissingError: the base's config.json is needed for the adapter's shapes and cannot be had.
        ConfigError: the base is no language model, or has no such modules.
    """
    if shapes is None:
        shapes = shapes_of(config)
    down, up = sent_shapes(config, shapes)
    npy = WIRE_FORMATS[config.communication.wire_dtype].npy
    message, reply = adapter_bytes(down, npy), adapter_bytes(up, npy)
    federation = config.federation
    a_round = federation.clients_per_round
    messages = a_round * federation.rounds
    serialised_message, serialised_reply = message_span(config, down), reply_span(config, up)
    return Plan(
        rounds=federation.rounds,
        clients=federation.clients,
        clients_per_round=a_round,
        steps_per_round=config.training.max_steps,
        strategy=config.strategy.name,
        wire_dtype=config.communication.wire_dtype,
        arrays=len(shapes),
        parameters=sum(prod(shape) for shape in shapes.values()),
        message_bytes=message,
        reply_bytes=reply,
        client_round_bytes=message + reply,
        client_bytes=(message + reply) * messages / federation.clients,
        round_bytes=(message + reply) * a_round,
        down_bytes=message * messages,
        up_bytes=reply * messages,
        total_bytes=(message + reply) * messages,
        serialised_message=serialised_message,
        serialised_reply=serialised_reply,
        serialised_round=(serialised_message + serialised_reply).times(a_round),
        serialised_total=(serialised_message + serialised_reply).times(messages),
    )


def shapes_of(config: FedTuneConfig) -> Shapes:
    """Return names and shapes of the adapter that `config` trains.

    Raises:
        MissingError, ConfigError: as `plan` does.
    """
    from fedtune.models.shapes import adapter_shapes

    return adapter_shapes(config.model, config.adapter, known_architecture(config))


def sent_shapes(config: FedTuneConfig, shapes: Shapes) -> tuple[Shapes, Shapes]:  # noqa: ARG001
    """Return what a message carries down and a reply carries up, by the config's strategy.

    FedAvg and FedProx send the whole adapter both ways; a strategy that sends part of it is told apart here.
    """
    return shapes, shapes


def transfer_time(planned: Plan, *, uplink: float, downlink: float) -> TransferTime:
    """Return how long a plan's serialised bytes take on clients' links of `uplink` and `downlink` bytes per second.

    Latency, transport framing, and a server whose own link is the narrow one are left out.
    """
    down_s = planned.serialised_message.high / downlink
    up_s = planned.serialised_reply.high / uplink
    return TransferTime(down_s, up_s, down_s + up_s, (down_s + up_s) * planned.rounds)
