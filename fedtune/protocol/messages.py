"""The records of a message beside its tensors: what a server orders, what a client reports, who a client is.

Each record is built in one place, written with `to_record`, and read with `from_record`, which checks every value that the other
side sent. `bounds` returns the smallest and the largest record of a run, for the forecast of message sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedtune.config.schema import FedTuneConfig

if TYPE_CHECKING:
    from flwr.app import ConfigRecord, MetricRecord

ARRAYS, METRICS, CONFIG = "arrays", "metrics", "config"
"""Keys of the records in a message."""

Value = int | float | list[int] | list[float]


class WireError(ValueError):
    """A message does not hold what it must; the text is safe to log."""


@dataclass(frozen=True)
class TrainOrder:
    """What a client is told for one round of training."""

    server_round: int
    """From 1."""
    learning_rate: float
    values: Mapping[str, int | float] = field(default_factory=dict)
    """The strategy's own values, such as `proximal-mu`."""

    @property
    def proximal_mu(self) -> float:
        """Weight of FedProx's term."""
        return float(self.values.get("proximal-mu", 0.0))

    @property
    def delta_rank(self) -> int:
        """Rank of the base delta in the message."""
        return int(self.values.get("offset-rank", 0))

    def as_values(self) -> dict[str, Value]:
        """Return every value by its key in the message."""
        return {**self.values, "learning-rate": self.learning_rate, "server-round": self.server_round}

    def to_record(self) -> ConfigRecord:
        """Return the order as the record of a message."""
        from flwr.app import ConfigRecord

        return ConfigRecord(self.as_values())  # type: ignore[arg-type]

    @classmethod
    def from_record(cls, record: object) -> TrainOrder:
        """Read an order.

        Raises:
            WireError: the record is missing, or holds something else than numbers.
        """
        from flwr.app import ConfigRecord

        if not isinstance(record, ConfigRecord):
            raise WireError(f"it lacks its {CONFIG!r} record")
        values: dict[str, Any] = dict(record)
        for key in ("server-round", "learning-rate"):
            if not _is_number(values.get(key)):
                raise WireError(f"its {key} is {values.get(key)!r}, not a number")
        own = {key: value for key, value in values.items() if _is_number(value)}
        return cls(int(own.pop("server-round")), float(own.pop("learning-rate")), own)

    @classmethod
    def bounds(cls, config: FedTuneConfig) -> tuple[TrainOrder, TrainOrder]:
        """Return the orders of the first and of the last round."""
        first, last = (
            cls(number, 0.0, config.strategy.order_values(config, number)) for number in (1, config.federation.rounds)
        )
        return first, last


@dataclass(frozen=True)
class TrainReply:
    """What a client reports of one round; under local privacy only what anyone knows beforehand."""

    server_round: int
    """From 1."""
    examples: int | float
    """The client's weight in an average; 1 under local privacy."""
    loss: float | None = None
    """Mean training loss of the round; None under local privacy, as is everything below."""
    losses: tuple[float, ...] = ()
    """Training loss of each step."""
    rows: int = 0
    """Rows of all steps."""
    tokens: int = 0
    """Tokens of those rows."""
    response_tokens: int = 0
    """Tokens on which the loss was computed."""
    seconds: float = 0.0
    """Time that training took."""

    def as_values(self) -> dict[str, Value]:
        """Return every value by its key in the message."""
        public: dict[str, Value] = {"server-round": self.server_round, "num-examples": self.examples}
        if self.loss is None:
            return public
        return {
            **public,
            "train-loss": self.loss,
            "losses": list(self.losses),
            "rows": self.rows,
            "tokens": self.tokens,
            "response-tokens": self.response_tokens,
            "seconds": self.seconds,
        }

    def to_record(self) -> MetricRecord:
        """Return the report as the record of a message."""
        from flwr.app import MetricRecord

        return MetricRecord(self.as_values())

    @classmethod
    def from_record(cls, record: object, server_round: int, most_examples: int, *, with_loss: bool) -> TrainReply:
        """Read a client's report.

        Args:
            record: The record of the reply.
            server_round: The round that the client was asked to train.
            most_examples: The most examples that it may claim.
            with_loss: Whether it must report its loss.

        Raises:
            WireError: a value is missing, of another type, of another round, too large or not finite.
        """
        from flwr.app import MetricRecord

        if not isinstance(record, MetricRecord):
            raise WireError(f"the reply lacks its {METRICS!r} record")
        values: dict[str, Any] = dict(record)
        if values.get("server-round") != server_round:
            raise WireError(f"the reply is of round {values.get('server-round')!r}, not {server_round}")
        examples, loss = values.get("num-examples"), values.get("train-loss")
        if not _is_number(examples) or not 0 < examples <= most_examples:  # type: ignore[operator]
            raise WireError(f"num-examples is {examples!r}, not a number above 0 and at most {most_examples}")
        if (with_loss or loss is not None) and not _is_number(loss):
            raise WireError(f"train-loss is {loss!r}, not a finite number")
        losses = values.get("losses", [])
        if not isinstance(losses, list) or not all(map(_is_number, losses)):
            raise WireError("losses is not a list of finite numbers")
        for key in ("rows", "tokens", "response-tokens", "seconds"):
            if not _is_number(values.get(key, 0)) or values.get(key, 0) < 0:
                raise WireError(f"{key} is {str(values[key])[:40]}, not a number of at least 0")
        return cls(
            server_round,
            examples,  # type: ignore[arg-type]
            None if loss is None else float(loss),
            tuple(losses),
            int(values.get("rows", 0)),
            int(values.get("tokens", 0)),
            int(values.get("response-tokens", 0)),
            float(values.get("seconds", 0.0)),
        )

    @classmethod
    def bounds(cls, config: FedTuneConfig) -> tuple[TrainReply, TrainReply]:
        """Return the smallest report of a run and the largest."""
        training, rounds = config.training, config.federation.rounds
        if config.privacy.mode == "local":
            return cls(1, 1), cls(rounds, 1)
        rows = training.max_steps * training.rows_per_step
        tokens = rows * training.sequence_length
        losses = (0.0,) * training.max_steps
        return (
            cls(1, 1, 0.0, losses[:1], 1, 1, 1),
            cls(rounds, config.federation.max_examples, 0.0, losses, rows, tokens, tokens),
        )


@dataclass(frozen=True)
class ClientDescription:
    """What a client answers before the first round."""

    partition: int
    """The client's place in the federation, from 0."""
    rows: int
    """Its rows; 1 under local privacy, where a number of rows is data like any other."""

    def to_record(self) -> MetricRecord:
        """Return the description as the record of a message."""
        from flwr.app import MetricRecord

        return MetricRecord({"partition-id": self.partition, "rows": self.rows})

    @classmethod
    def from_record(cls, record: object, partitions: int) -> ClientDescription:
        """Read a description.

        Raises:
            WireError: it does not describe one of `partitions` clients with at least one row.
        """
        values: Mapping[str, Any] = record if isinstance(record, Mapping) else {}
        if "partition-id" not in values or "rows" not in values:
            raise WireError("does not say which client it is")
        partition, rows = values["partition-id"], values["rows"]
        if not isinstance(partition, int) or not 0 <= partition < partitions:
            raise WireError(f"says it is client {partition}, and there are clients 0 to {partitions - 1}")
        if not isinstance(rows, int) or rows < 1:
            raise WireError(f"says it is client {partition} and has no rows")
        return cls(partition, rows)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
