"""What a process that runs clients holds once: base model, adapter slots, tokenised rows.

The base is loaded once per process, and clients and rounds swap adapter weights in place. One workspace is kept at a time,
for the config at hand.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from fedtune.config.load import load_config
from fedtune.config.schema import FedTuneConfig
from fedtune.data.partition import Partitions, load_partitions
from fedtune.data.tokenize import TokenizedRows, tokenize_rows
from fedtune.models.adapter import AdaptedModel, attach
from fedtune.models.base import Base, load_base, load_tokenizer

if TYPE_CHECKING:
    from flwr.app import Context


class Workspace:
    """Base model, adapter and data of one config; each part is loaded when it is first asked for."""

    def __init__(self, config: FedTuneConfig) -> None:
        self.config = config
        self._rows: dict[int, TokenizedRows] = {}

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
            self._rows[partition] = tokenize_rows(
                self.partitions.rows(partition),
                self.config.data,
                load_tokenizer(self.config.model),
                self.config.training.sequence_length,
            )
        return self._rows[partition]


@lru_cache(maxsize=1)
def workspace_of(config_json: str) -> Workspace:
    """Return this process's workspace for a config, given as the JSON string that travels."""
    return Workspace(FedTuneConfig.model_validate_json(config_json, strict=True))


def config_json_of(context: Context) -> str:
    """Return the config that a Flower app was started with, as JSON.

    Flower's run config carries only flat values, so the whole typed config travels as one string, `fedtune-config`.
    When that is empty, as in a plain `flwr run .`, the challenge that `challenge` names is meant.
    """
    if text := str(context.run_config.get("fedtune-config", "")):
        return text
    return load_config(challenge=str(context.run_config.get("challenge", "tiny"))).config.model_dump_json()
