"""What a run would send, from shapes alone: no weights are loaded, and for a recipe's own base no network is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from fedtune.config.facts import known_architecture
from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.base import Shapes
from fedtune.protocol.message_size import Span, message_span, reply_span
from fedtune.protocol.sampling import sample
from fedtune.protocol.wire_format import wire_bytes

if TYPE_CHECKING:
    from fedtune.models.shapes import AdapterForm

Kind = tuple[int, int]
"""What the shapes of a message depend on, beside the config (`StrategyOptions.kind`)."""


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
    down_format: str
    """How messages to clients are written: the wire dtype, or a packed codec."""
    up_format: str
    """How replies are written."""
    arrays: int
    """Tensors of the adapter."""
    parameters: int
    """Parameters of the adapter."""
    varies: bool
    """Whether messages differ by round or client; figures of one message, client or round are then the largest."""
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
    serialised_down: Span
    serialised_up: Span
    serialised_total: Span
    notes: tuple[str, ...] = ()
    """What the user should know of the adapter, one sentence each."""


@dataclass(frozen=True)
class TransferTime:
    """How long the messages are on their way, every client on a link of its own and all of them at once."""

    down_s: float
    """One message to a client."""
    up_s: float
    """One reply."""
    round_s: float
    """A round, which ends with its slowest client; all have the same link here. The largest round where they differ."""
    total_s: float
    """The run; where clients' messages differ within a round, by their mean."""


def plan(config: FedTuneConfig, shapes: Shapes | None = None) -> Plan:
    """Return what a run of `config` would do and send.

    Args:
        config: The run's config.
        shapes: Names and shapes of the adapter's tensors, where they are known already.

    Raises:
        MissingError: the base's config.json is needed for the adapter's shapes and cannot be had.
        ConfigError: the base is no language model, or has no such modules.
    """
    notes: tuple[str, ...] = ()
    if shapes is None:
        form = _form_of(config)
        shapes, notes = form.shapes, form.notes
    sizes = Sizes(config, shapes)
    federation = config.federation
    groups = [(sizes.kinds(number), count) for number, count in config.strategy.groups_of_rounds(config, shapes)]
    counts: Counter[Kind] = Counter()
    for drawn, count in groups:
        for kind, messages in drawn.items():
            counts[kind] += messages * count
    largest = max(counts, key=lambda kind: sum(sizes.of(kind)))
    message, reply = sizes.of(largest)
    down = sum(sizes.of(kind)[0] * count for kind, count in counts.items())
    up = sum(sizes.of(kind)[1] * count for kind, count in counts.items())
    spans = {
        kind: (message_span(config, sizes.down_shapes(kind)), reply_span(config, sizes.up_shapes(kind)))
        for kind in counts
    }
    largest_round = max((drawn for drawn, _ in groups), key=lambda drawn: sizes.total(drawn))
    return Plan(
        rounds=federation.rounds,
        clients=federation.clients,
        clients_per_round=federation.clients_per_round,
        steps_per_round=config.training.max_steps,
        strategy=config.strategy.name,
        wire_dtype=config.communication.wire_dtype,
        down_format=config.down_format,
        up_format=config.up_format,
        arrays=len(shapes),
        parameters=sum(prod(shape) for shape in shapes.values()),
        varies=len(counts) > 1,
        message_bytes=message,
        reply_bytes=reply,
        client_round_bytes=message + reply,
        client_bytes=(down + up) / federation.clients,
        round_bytes=sizes.total(largest_round),
        down_bytes=down,
        up_bytes=up,
        total_bytes=down + up,
        serialised_message=spans[largest][0],
        serialised_reply=spans[largest][1],
        serialised_round=_sum(_sum(spans[kind]).times(count) for kind, count in largest_round.items()),
        serialised_down=_sum(spans[kind][0].times(count) for kind, count in counts.items()),
        serialised_up=_sum(spans[kind][1].times(count) for kind, count in counts.items()),
        serialised_total=_sum(_sum(spans[kind]).times(count) for kind, count in counts.items()),
        notes=notes,
    )


class Sizes:
    """The leaderboard's count of every message and reply of a run in which nobody fails."""

    def __init__(self, config: FedTuneConfig, shapes: Shapes) -> None:
        """Set up for an adapter of `shapes`."""
        self.config, self.shapes = config, shapes
        self._places: dict[Kind, tuple[int, int]] = {}
        self._known: dict[Kind, tuple[int, int]] = {}

    def kinds(self, server_round: int) -> Counter[Kind]:
        """Return how many messages of each kind a round has."""
        federation = self.config.federation
        # Only where clients differ does it matter who is drawn.
        by_client = self.config.strategy.differs_by_client(self.config)
        drawn = sample(self.config, server_round) if by_client else range(1)
        counts = Counter(self._kind(server_round, partition) for partition in drawn)
        return counts if by_client else Counter(dict.fromkeys(counts, federation.clients_per_round))

    def of(self, kind: Kind) -> tuple[int, int]:
        """Return the bytes of a message and of its reply."""
        if kind not in self._known:
            self._known[kind] = (
                wire_bytes(self.down_shapes(kind), self.config.down_format),
                wire_bytes(self.up_shapes(kind), self.config.up_format),
            )
        return self._known[kind]

    def pair(self, server_round: int, partition: int) -> tuple[int, int]:
        """Return the bytes of one client's message and reply in a round."""
        return self.of(self._kind(server_round, partition))

    def round(self, server_round: int) -> int:
        """Return the bytes of a round, both ways."""
        return self.total(self.kinds(server_round))

    def total(self, counts: Mapping[Kind, int]) -> int:
        """Return the bytes of so many messages of each kind and their replies."""
        return sum(sum(self.of(kind)) * count for kind, count in counts.items())

    def down_shapes(self, kind: Kind) -> Shapes:
        """Return what a message of a kind carries."""
        return self.config.strategy.down_shapes(self.config, self.shapes, *self._places[kind])

    def up_shapes(self, kind: Kind) -> Shapes:
        """Return what a reply of a kind carries."""
        return self.config.strategy.up_shapes(self.config, self.shapes, *self._places[kind])

    def _kind(self, server_round: int, partition: int) -> Kind:
        found = self.config.strategy.kind(self.config, self.shapes, server_round, partition)
        self._places.setdefault(found, (server_round, partition))
        return found


def _sum(spans: Iterable[Span]) -> Span:
    return sum(spans, start=Span(0, 0))


def shapes_of(config: FedTuneConfig) -> Shapes:
    """Return names and shapes of the adapter that `config` trains.

    Raises:
        MissingError, ConfigError: as `plan` does.
    """
    return _form_of(config).shapes


def _form_of(config: FedTuneConfig) -> AdapterForm:
    from fedtune.models.shapes import adapter_form

    form = adapter_form(config.model, config.adapter, known_architecture(config))
    if form.not_linear:
        from fedtune.models.targets import check_strategy

        check_strategy(config, form.not_linear)
    return form


def transfer_time(planned: Plan, *, uplink: float, downlink: float) -> TransferTime:
    """Return how long a plan's serialised bytes take on clients' links of `uplink` and `downlink` bytes per second.

    Latency, transport framing, and a server whose own link is the narrow one are left out.
    """
    down_s = planned.serialised_message.high / downlink
    up_s = planned.serialised_reply.high / uplink
    if not planned.varies:
        return TransferTime(down_s, up_s, down_s + up_s, (down_s + up_s) * planned.rounds)
    a_round = planned.clients_per_round
    mean_s = planned.serialised_down.high / a_round / downlink + planned.serialised_up.high / a_round / uplink
    return TransferTime(down_s, up_s, down_s + up_s, mean_s)
