"""What a process that runs clients holds once: base model, adapter slots, tokenised rows.

The base is loaded once per process, and clients and rounds swap adapter weights in place. One workspace is kept at a time,
for the config at hand.
"""

from __future__ import annotations

import logging
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.config.load import load_config
from fedtune.config.schema import FedTuneConfig
from fedtune.data.files import read_file
from fedtune.data.partition import Partitions, load_partitions
from fedtune.data.source import needed_columns
from fedtune.data.tokenize import TokenizedRows, tokenize_rows
from fedtune.errors import ClientError, ConfigError, MissingError
from fedtune.federation.node.policy import NODE_KEY, NodeSettings, config_on_node
from fedtune.federation.row_check import RowsError, check_rows
from fedtune.models.adapter import AdaptedModel, attach
from fedtune.models.base import Base, empty_model, load_base, load_tokenizer
from fedtune.models.limits import Limits, limits_of
from fedtune.runs.directory import file_sha256
from fedtune.runs.inputs import Inputs

if TYPE_CHECKING:
    import datasets
    from flwr.app import Context

log = logging.getLogger(__name__)


class Workspace:
    """Base model, adapter and data of one config; each part is loaded when it is first asked for."""

    def __init__(self, config: FedTuneConfig) -> None:
        self.config = config
        self._rows: dict[int, TokenizedRows] = {}
        self.inputs: Inputs | None = None
        """The local files as they were when this was made, where that is known."""

    @cached_property
    def base(self) -> Base:
        """The base model, loaded and quantized as the config says."""
        return load_base(self.config.model)

    @cached_property
    def adapted(self) -> AdaptedModel:
        """The base with the adapter attached."""
        return attach(self.base, self.config.adapter)

    @cached_property
    def partitions(self) -> Partitions:
        """All clients' rows."""
        return load_partitions(self.config)

    def rows(self, partition: int) -> TokenizedRows:
        """One client's rows, tokenised once a run."""
        if partition not in self._rows:
            table, tokenizer = self._table(partition), load_tokenizer(self.config.model)
            rows = tokenize_rows(table, self.config.data, tokenizer, self.config.training.sequence_length)
            check_rows(rows, table, tokenizer, self.config, self.limits, self._owner(partition))
            self._rows[partition] = rows
        return self._rows[partition]

    @cached_property
    def limits(self) -> Limits:
        """What rows the base model takes; known without its weights."""
        return limits_of(self.base.model if "base" in vars(self) else empty_model(self.config.model))

    def _owner(self, partition: int) -> str:
        return f"client {partition}"

    def _table(self, partition: int) -> datasets.Dataset:
        return self.partitions.rows(partition)


class NodeWorkspace(Workspace):
    """A data owner's: whatever number the client has, its rows are all rows of the owner's file, in the file's order.

    The node's own log holds why it refuses a run; what it sends holds nothing of its data or its paths.
    """

    def __init__(self, config: FedTuneConfig) -> None:
        super().__init__(config)
        self._sha256 = ""

    @cached_property
    def base(self) -> Base:
        """The base model, as the owner named it.

        Raises:
            ClientError: it cannot be loaded, or does not pass the checks of a loaded base.
        """
        try:
            return load_base(self.config.model)
        except (ConfigError, MissingError) as error:
            log.warning("the base model is refused: %s", error)
            keys = [problem.path for problem in error.problems] if isinstance(error, ConfigError) else ["model.base"]
            raise ClientError(
                f"This node's base model is refused ({', '.join(keys)}); its own log says why."
            ) from error

    def fingerprint(self, partition: int) -> str:
        """Return the sha256 of the bytes of the file that the rows were read from."""
        self.rows(partition)
        return self._sha256

    def rows(self, partition: int) -> TokenizedRows:
        """All rows of the owner's file.

        Raises:
            ClientError: the run's templates name columns that the file lacks, no row has anything to learn from, the base model
                cannot take a row, or the file changed while it was read.
        """
        if partition in self._rows:
            return self._rows[partition]
        file = Path(str(self.config.data.source))
        before = file_sha256(file) if file.is_file() else ""
        try:
            rows = super().rows(partition)
            if not len(rows):
                raise ClientError("No row of this node's data has anything to learn from.")
            if file_sha256(file) != before or self._sha256 not in ("", before):
                raise ClientError("This node's data file changed while it was read.")
        except RowsError as error:
            log.warning("%s", error)
            raise ClientError(error.public) from error
        except ConfigError as error:
            if not any(problem.path.startswith("data.") for problem in error.problems):
                raise
            raise ClientError("The run's templates name columns that this node's data does not have.") from error
        except ClientError:
            self._rows.pop(partition, None)
            raise
        self._sha256 = before
        return rows

    def _owner(self, partition: int) -> str:  # noqa: ARG002
        return "this node's data"

    def _table(self, partition: int) -> datasets.Dataset:  # noqa: ARG002
        return read_file(Path(str(self.config.data.source)), needed_columns(self.config.data))


def workspace_of_client(context: Context) -> Workspace:
    """Return this process's workspace for a client: on a data owner's node, of the owner's own file and base model.

    Raises:
        ClientError: the node does not take part in this run (see `config_on_node`).
    """
    settings = context.node_config.get(NODE_KEY)
    if settings is None:
        return workspace_of(config_json_of(context))
    server_version = str(context.run_config.get("fedtune-version", ""))
    return _node_workspace(config_json_of(context), server_version, str(settings))


@lru_cache(maxsize=1)
def workspace_of(config_json: str) -> Workspace:
    """Return this process's workspace for a config, given as the JSON string that travels."""
    return Workspace(FedTuneConfig.model_validate_json(config_json, strict=True))


@lru_cache(maxsize=1)
def _node_workspace(config_json: str, server_version: str, settings: str) -> NodeWorkspace:
    return NodeWorkspace(config_on_node(config_json, server_version, NodeSettings.from_json(settings)))


def config_json_of(context: Context) -> str:
    """Return the config that a Flower app was started with, as JSON.

    Flower's run config carries only flat values, so the whole typed config travels as one string, `fedtune-config`.
    When that is empty, as in a plain `flwr run .`, the challenge that `challenge` names is meant.
    """
    if text := str(context.run_config.get("fedtune-config", "")):
        return text
    return load_config(challenge=str(context.run_config.get("challenge", "tiny"))).config.model_dump_json()
