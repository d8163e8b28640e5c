"""FlexLoRA's options: clients may have adapters of different ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from fedtune.config.strategies.base import A, B, Shapes, StrategyOptions

if TYPE_CHECKING:
    from fedtune.config.schema import FedTuneConfig


class FlexLoRA(StrategyOptions):
    """The clients' products BA are averaged and split again by SVD (https://arxiv.org/abs/2402.11505)."""

    averages_products: ClassVar[bool] = True
    name: Literal["flexlora"]
    """Clients may have different ranks; averaging is of BA, not of B and A apart."""
    ranks: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Ranks of clients 0, 1, …, from the start again after the last; empty: `adapter.rank` for all. None is larger than that."""

    def rank_of(self, config: FedTuneConfig, partition: int) -> int:
        """Return the rank of a client's adapter."""
        return self.ranks[partition % len(self.ranks)] if self.ranks else config.adapter.rank

    def problem(self, config: FedTuneConfig) -> str | None:
        """Refuse ranks above the adapter's."""
        too_large = max(self.ranks, default=0) > config.adapter.rank
        return f"strategy.ranks goes above adapter.rank ({config.adapter.rank})" if too_large else None

    def down_shapes(
        self,
        config: FedTuneConfig,
        shapes: Shapes,
        server_round: int,
        partition: int,
        delta_rank: int | None = None,
    ) -> Shapes:
        """Send as many directions as the client's rank."""
        rank = self.rank_of(config, partition)
        return {
            name: (rank, shape[1]) if name.endswith(A) else (shape[0], rank) if name.endswith(B) else shape
            for name, shape in shapes.items()
        }

    def up_shapes(self, config: FedTuneConfig, shapes: Shapes, server_round: int, partition: int) -> Shapes:
        """Return what was sent."""
        return self.down_shapes(config, shapes, server_round, partition)

    def kind(self, config: FedTuneConfig, shapes: Shapes, server_round: int, partition: int) -> tuple[int, int]:
        """Tell ranks apart."""
        return 0, self.rank_of(config, partition)

    def groups_of_rounds(self, config: FedTuneConfig, shapes: Shapes) -> list[tuple[int, int]]:
        """Return every round alone where clients differ: which of them are drawn decides."""
        if not self.differs_by_client(config):
            return super().groups_of_rounds(config, shapes)
        return [(number, 1) for number in range(1, config.federation.rounds + 1)]

    def differs_by_client(self, config: FedTuneConfig) -> bool:
        """Whether clients have different ranks."""
        return len({self.rank_of(config, partition) for partition in range(config.federation.clients)}) > 1
