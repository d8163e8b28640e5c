"""The base class of every strategy's options, which also says what travels under the strategy.

Server, client, forecast and message sizes ask the options, so that they cannot disagree and none knows a strategy by name.
Shapes are those of the tensors in a message, by name. Tensors that an adapter does not have:

    control.{name}          SCAFFOLD's control variate of the adapter's tensor {name}
    {module}.offset_A       (R, in_features), and {module}.offset_B (out_features, R): the base delta of a module, whose product
                            offset_B · offset_A is added to the weight; {module}.offset once the product is smaller
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from fedtune.config.base import Section

if TYPE_CHECKING:
    from fedtune.config.schema import FedTuneConfig

Shapes = Mapping[str, tuple[int, ...]]
Values = dict[str, int | float]

A, B = ".lora_A.weight", ".lora_B.weight"
RANDOM = (A, ".lora_embedding_B")
"""Endings of the factors that start with random values. An embedding's are named the other way round: its B is the random one."""
ZERO = (B, ".lora_embedding_A")
"""Endings of the factors that start as zero."""


class StrategyOptions(Section):
    """Options of one strategy, with its traffic; the defaults are FedAvg's: the whole adapter travels both ways."""

    name: str
    """What users write as `strategy.name`."""
    averages_products: ClassVar[bool] = False
    """Whether the strategy takes an adapter for the product B·A: DoRA's update is another function of it."""
    supports_privacy: ClassVar[bool] = False
    """Whether the strategy computes only what follows from an average, so that differential privacy may be used with it."""
    fresh_adapter: ClassVar[bool] = False
    """Whether each round starts with a new adapter, which follows from the seed and the round."""

    @property
    def replies_needed(self) -> int:
        """The fewest replies of a round that the strategy can work with."""
        return 1

    def problem(self, config: FedTuneConfig) -> str | None:
        """Return why the options do not fit the rest of the config; None where they do."""
        return None

    def is_trained(self, name: str, server_round: int) -> bool:
        """Whether clients train the adapter's tensor `name` in a round (from 1), and so send it back."""
        return True

    def down_shapes(
        self,
        config: FedTuneConfig,
        shapes: Shapes,
        server_round: int,
        partition: int,
        delta_rank: int | None = None,
    ) -> Shapes:
        """Return what the message to a client carries.

        Args:
            config: The run's config.
            shapes: The whole adapter's.
            server_round: From 1.
            partition: The client.
            delta_rank: Rank of the base delta so far; None for the forecast, in which every client of every round replies.
        """
        return dict(shapes)

    def up_shapes(
        self,
        config: FedTuneConfig,
        shapes: Shapes,
        server_round: int,
        partition: int,
    ) -> Shapes:
        """Return what a client's reply carries."""
        return {name: shape for name, shape in shapes.items() if self.is_trained(name, server_round)}

    def order_values(self, config: FedTuneConfig, server_round: int) -> Values:
        """Return the values that travel to a client beside the round and its learning rate, as forecast."""
        return {}

    def kind(self, config: FedTuneConfig, shapes: Shapes, server_round: int, partition: int) -> tuple[int, int]:
        """Return what the shapes of a round and client depend on: two of the same kind have the same shapes."""
        return 0, 0

    def groups_of_rounds(self, config: FedTuneConfig, shapes: Shapes) -> list[tuple[int, int]]:
        """Return the run's rounds in groups that carry the same: one round of each group, and how many it has."""
        return [(1, config.federation.rounds)]

    def differs_by_client(self, config: FedTuneConfig) -> bool:
        """Whether clients of the same round are sent different shapes."""
        return False


def modules(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """Return (out_features, in_features) of every adapted module by name."""
    return {
        name.removesuffix(A): (shapes[name.removesuffix(A) + B][0], shape[1])
        for name, shape in shapes.items()
        if name.endswith(A)
    }
