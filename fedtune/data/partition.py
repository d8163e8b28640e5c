"""The data split among the clients, and the table that shows how even the split is."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import datasets

from fedtune.config.schema import FedTuneConfig
from fedtune.data.prompt import unknown_column
from fedtune.data.source import load_files, load_rows
from fedtune.data.values import ValueRefusedError, to_text
from fedtune.errors import ConfigError, Problem
from fedtune.runs.log import silence_libraries


@dataclass(frozen=True)
class PartitionSummary:
    """One line of the partition table."""

    partition: int
    """Number of the client, counted from 0."""
    name: str
    """File name, value of the column, or the number."""
    rows: int
    """Number of rows."""
    skew: float | None
    """Total-variation distance, in [0, 1], of the client's labels from the whole's; None without a label column."""
    top_label: str | None
    """The client's most frequent label."""
    top_share: float | None
    """Share of the client's rows that have it."""


@dataclass(frozen=True, eq=False)
class Partitions:
    """Every client's rows."""

    parts: tuple[datasets.Dataset, ...]
    """One table a client."""
    names: tuple[str, ...]
    """File name, value of the column, or "0", "1", …"""
    label: str | None = None
    """Column that the skew is measured on: `data.partition_by`, if the data has it."""

    def rows(self, partition: int) -> datasets.Dataset:
        """Return one client's rows."""
        return self.parts[partition]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each client."""
        return tuple(len(part) for part in self.parts)

    def table(self) -> list[PartitionSummary]:
        """Return rows, label skew and most frequent label of each client."""
        if self.label is None:
            return [PartitionSummary(i, self.names[i], rows, None, None, None) for i, rows in enumerate(self.sizes)]
        counts = [Counter(_label_text(value) or "" for value in _column(part, self.label)) for part in self.parts]
        whole = sum(counts, Counter[str]())
        summaries = []
        for partition, count in enumerate(counts):
            # Ties go to the label that sorts first, so that the table does not depend on the rows' order.
            top, top_count = min(count.items(), key=lambda item: (-item[1], item[0]))
            skew = sum(abs(count[v] / count.total() - whole[v] / whole.total()) for v in sorted(whole)) / 2
            summaries.append(
                PartitionSummary(partition, self.names[partition], count.total(), skew, top, top_count / count.total())
            )
        return summaries


def load_partitions(config: FedTuneConfig) -> Partitions:
    """Load the data and split it among `federation.clients` clients, by flwr-datasets' partitioners.

    The same config gives the same rows to the same clients in the same order, on any machine.

    Raises:
        ConfigError: the number of clients does not fit the data, a client would be empty, or a column does not exist.
        MissingError, UsageError: as for `fedtune.data.source.load_rows`.
    """
    data, clients = config.data, config.federation.clients
    if data.partitioner == "files":
        tables = load_files(data)
        if len(tables) != clients:
            raise _wrong_clients(clients, f"the folder has {len(tables)} files", len(tables))
        columns = next(iter(tables.values())).column_names
        return Partitions(tuple(tables.values()), tuple(tables), _label(data.partition_by, columns))

    rows = load_rows(data, config.seed)
    if len(rows) < clients:
        raise _wrong_clients(clients, f"the data has {len(rows)} rows", len(rows))
    if data.partitioner in ("natural", "dirichlet"):
        _check_column(rows, str(data.partition_by), data.partitioner)
    # NaturalIdPartitioner draws its progress bar straight on stderr.
    with silence_libraries(), contextlib.redirect_stderr(io.StringIO()):
        partitioner = _partitioner(config)
        partitioner.dataset = rows
        try:
            count = partitioner.num_partitions
        except ValueError:
            raise ConfigError(
                [Problem("data.alpha", f"{data.alpha:g} leaves one of {clients} clients without rows; raise it")]
            ) from None
        if count != clients:
            raise _wrong_clients(clients, f"the data has {count} values of {data.partition_by!r}", count)
        parts = tuple(partitioner.load_partition(index) for index in range(clients))
    names = [str(index) for index in range(clients)]
    if data.partitioner == "natural":
        names = [_label_text(partitioner.partition_id_to_natural_id[index]) or "" for index in range(clients)]
    return Partitions(parts, tuple(names), _label(data.partition_by, rows.column_names))


def _partitioner(config: FedTuneConfig) -> Any:
    # Imported here because it takes seconds, which a refused source need not wait for.
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, NaturalIdPartitioner

    data, clients = config.data, config.federation.clients
    match data.partitioner:
        case "natural":
            return NaturalIdPartitioner(partition_by=data.partition_by)
        case "dirichlet":
            return DirichletPartitioner(
                num_partitions=clients,
                partition_by=data.partition_by,
                alpha=data.alpha,
                min_partition_size=1,
                seed=config.seed,
            )
        case _:
            return IidPartitioner(num_partitions=clients)


def _check_column(rows: datasets.Dataset, column: str, partitioner: str) -> None:
    if column not in rows.column_names:
        problem = unknown_column("data.partition_by", column, rows.column_names)
        other = "for equal shares: --set data.partitioner=iid"
        raise ConfigError([replace(problem, message=f"{problem.message}; {other}")])
    unusable = sum(isinstance(value, list | dict) or _label_text(value) is None for value in _column(rows, column))
    if unusable:
        raise ConfigError(
            [
                Problem(
                    "data.partition_by",
                    f"{unusable} rows have no single value of {column!r}, which {partitioner} needs",
                )
            ]
        )


def _label_text(value: Any) -> str | None:
    """Return a label as text; None for one that is missing or has no text."""
    try:
        return to_text(value)
    except ValueRefusedError:
        return None


def _column(rows: datasets.Dataset, column: str) -> list[Any]:
    # Taken as one slice: item by item through a shuffled table is twenty times slower.
    values: list[Any] = rows.select_columns([column])[:][column]
    return values


def _label(column: str | None, columns: list[str]) -> str | None:
    return column if column in columns else None


def _wrong_clients(clients: int, found: str, right: int) -> ConfigError:
    return ConfigError([Problem("federation.clients", f"is {clients}, but {found}: --set federation.clients={right}")])
