"""RoLoRA: B is trained in odd rounds and A in even ones, each averaged while the other is the same everywhere.

Chen et al., https://arxiv.org/abs/2502.01755. With the other factor fixed, the average of the products is the product of the
average, and both factors learn. A client that did not take part in the round before needs both factors; it sends back the one
that it trained. Example: A = 2, B = 0; round 1: two clients of equal weight reply B = 1 and B = 3, so B = 2; round 2: they
reply A = 1 and A = 3, so A = 2 and B·A = 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fedtune.config.strategies.base import RANDOM, ZERO, Shapes, StrategyOptions

if TYPE_CHECKING:
    from fedtune.config.schema import FedTuneConfig


class RoLoRA(StrategyOptions):
    """LoRA that trains B and A in turn (https://arxiv.org/abs/2502.01755)."""

    name: Literal["rolora"]
    """B in odd rounds, A in even ones; what is not trained is not sent back."""

    def is_trained(self, name: str, server_round: int) -> bool:
        """Train B in odd rounds and A in even ones."""
        return not name.endswith(RANDOM if server_round % 2 else ZERO)

    def kind(self, config: FedTuneConfig, shapes: Shapes, server_round: int, partition: int) -> tuple[int, int]:
        """Tell odd rounds from even ones."""
        return server_round % 2, 0

    def groups_of_rounds(self, config: FedTuneConfig, shapes: Shapes) -> list[tuple[int, int]]:
        """Return the odd rounds and the even ones."""
        rounds = config.federation.rounds
        return [(1, (rounds + 1) // 2)] + ([(2, rounds // 2)] if rounds > 1 else [])
