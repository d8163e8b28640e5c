"""SCAFFOLD's options: every tensor travels with its control variate, both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fedtune.config.strategies.base import Shapes, StrategyOptions

if TYPE_CHECKING:
    from fedtune.config.schema import FedTuneConfig


CONTROL = "control."
"""Prefix of a control variate's name."""


class Scaffold(StrategyOptions):
    """Control variates against client drift (https://arxiv.org/abs/1910.06378)."""

    name: Literal["scaffold"]
    """Each client corrects its gradients by how it has differed from the others; twice the bytes."""
    server_learning_rate: float = Field(1.0, gt=0)
    """Step along the clients' average update."""

    def down_shapes(
        self,
        config: FedTuneConfig,
        shapes: Shapes,
        server_round: int,
        partition: int,
        delta_rank: int | None = None,
    ) -> Shapes:
        """Send the adapter and its control variates."""
        return {**shapes, **{CONTROL + name: shape for name, shape in shapes.items()}}

    def up_shapes(self, config: FedTuneConfig, shapes: Shapes, server_round: int, partition: int) -> Shapes:
        """Return what was sent."""
        return self.down_shapes(config, shapes, server_round, partition)
