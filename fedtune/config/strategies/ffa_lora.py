"""FFA-LoRA: A stays at its initial values on every client; only B is trained, sent and averaged.

Sun et al., https://arxiv.org/abs/2403.12313. With one A for all, the average of the products B_i · A is the product of the
average, which FedAvg on both factors misses. A follows from the seed, so it is never sent. Example: A = 2, two clients
with 1 and 3 examples reply B = 0 and B = 4: B = 3, B·A = 6 = (1 · 0 · 2 + 3 · 4 · 2) / 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from fedtune.config.strategies.base import RANDOM, Shapes, StrategyOptions

if TYPE_CHECKING:
    from fedtune.config.schema import FedTuneConfig


class FFALoRA(StrategyOptions):
    """LoRA with A frozen at its initial values (https://arxiv.org/abs/2403.12313)."""

    supports_privacy: ClassVar[bool] = True
    name: Literal["ffa-lora"]
    """Only B is trained and sent: less than half the bytes where queries are grouped, and averaging B is averaging BA."""

    def is_trained(self, name: str, server_round: int) -> bool:
        """Train B only."""
        return not name.endswith(RANDOM)

    def down_shapes(
        self,
        config: FedTuneConfig,
        shapes: Shapes,
        server_round: int,
        partition: int,
        delta_rank: int | None = None,
    ) -> Shapes:
        """Send what is trained."""
        return self.up_shapes(config, shapes, server_round, partition)
