"""Strategies that add to the base: the base delta, a sum of products, travels with the adapter and grows with the rounds."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from fedtune.config.strategies.base import A, B, Shapes, StrategyOptions, Values, modules

if TYPE_CHECKING:
    from fedtune.config.schema import FedTuneConfig


DELTA, DELTA_A, DELTA_B = ".offset", ".offset_A", ".offset_B"
"""Endings of the base delta's tensors, as a matrix and as two factors."""


class BaseDeltaOptions(StrategyOptions):
    """Options of a strategy that adds to the base."""

    averages_products: ClassVar[bool] = True

    def down_shapes(
        self,
        config: FedTuneConfig,
        shapes: Shapes,
        server_round: int,
        partition: int,
        delta_rank: int | None = None,
    ) -> Shapes:
        """Send the base delta, and the adapter unless it follows from the seed."""
        if delta_rank is None:
            delta_rank = (server_round - 1) * _rank_of_a_round(config)
        return {
            **{name: shape for name, shape in shapes.items() if not self.fresh_adapter or not name.endswith((A, B))},
            **delta_shapes(shapes, delta_rank),
        }

    def order_values(self, config: FedTuneConfig, server_round: int) -> Values:
        """Send the base delta's rank, which says what its tensors are."""
        return {"offset-rank": (server_round - 1) * _rank_of_a_round(config)}

    def kind(self, config: FedTuneConfig, shapes: Shapes, server_round: int, partition: int) -> tuple[int, int]:
        """Tell rounds apart until the base delta grows no more."""
        return min(server_round, _dense_from(config, shapes)), 0

    def groups_of_rounds(self, config: FedTuneConfig, shapes: Shapes) -> list[tuple[int, int]]:
        """Return every round in which the base delta still grows, and all others together."""
        rounds = config.federation.rounds
        last = min(rounds, _dense_from(config, shapes))
        return [(number, 1) for number in range(1, last)] + [(last, rounds - last + 1)]


class FLoRA(BaseDeltaOptions):
    """The clients' adapters are stacked, which is exact, and added to the base (https://arxiv.org/abs/2409.05976)."""

    fresh_adapter: ClassVar[bool] = True
    name: Literal["flora"]
    """Each round starts a fresh adapter on a base that holds all former ones; messages to clients grow with the rounds."""


class FedExLoRA(BaseDeltaOptions):
    """FedAvg, and what it misses of the average of BA is added to the base (https://arxiv.org/abs/2410.09432)."""

    name: Literal["fedex-lora"]
    """The exact average; messages to clients grow with the rounds."""


def delta_shapes(shapes: Shapes, rank: int) -> Shapes:
    """Return the shapes of the base delta: two factors of `rank` per module, or the product where that is smaller."""
    found: dict[str, tuple[int, ...]] = {}
    for module, (out_features, in_features) in modules(shapes).items() if rank else ():
        if is_dense(rank, out_features, in_features):
            found[module + DELTA] = (out_features, in_features)
        else:
            found[module + DELTA_A] = (rank, in_features)
            found[module + DELTA_B] = (out_features, rank)
    return found


def is_dense(rank: int, out_features: int, in_features: int) -> bool:
    """Whether a product of two factors of `rank` has no more values than they have together."""
    return rank * (out_features + in_features) >= out_features * in_features


def _rank_of_a_round(config: FedTuneConfig) -> int:
    return config.federation.clients_per_round * config.adapter.rank


def _dense_from(config: FedTuneConfig, shapes: Shapes) -> int:
    """Return a round from which on the base delta is a matrix for all modules, so that messages grow no more."""
    a_round = _rank_of_a_round(config)
    return max((-(-out * inner // (out + inner) // a_round) for out, inner in modules(shapes).values()), default=0) + 2
