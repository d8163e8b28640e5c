"""What travels: the tensors of a message and of its reply, by strategy, round and client, from names and shapes alone.

Server, client, screen and forecast all ask this file, so that they cannot disagree. Tensors that no adapter has:

    control.{name}          SCAFFOLD's control variate of the adapter's tensor {name}
    {module}.offset_A       (R, in_features), and {module}.offset_B (out_features, R): what is added to the base's weight of a
                            module, offset_B · offset_A; or {module}.offset (out_features, in_features) once that is smaller
"""

from __future__ import annotations

from fedtune.budget.count import Shapes
from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies import FlexLoRA, StrategyOptions

A, B = ".lora_A.weight", ".lora_B.weight"
RANDOM = (A, ".lora_embedding_B")
"""Endings of the factors that start with random values. An embedding's are named the other way round: its B is the random one."""
ZERO = (B, ".lora_embedding_A")
"""Endings of the factors that start as zero."""
CONTROL = "control."
OFFSET, OFFSET_A, OFFSET_B = ".offset", ".offset_A", ".offset_B"
OFFSET_STRATEGIES = ("flora", "fedex-lora")
"""Those that add to the base."""


def is_trained(strategy: StrategyOptions, name: str, server_round: int) -> bool:
    """Whether clients train the adapter's tensor `name` in a round (from 1), and so send it back."""
    if strategy.name == "ffa-lora":
        return not name.endswith(RANDOM)
    if strategy.name == "rolora":
        return not name.endswith(RANDOM if server_round % 2 else ZERO)
    return True


def rank_of(config: FedTuneConfig, partition: int) -> int:
    """Return the rank of a client's adapter."""
    ranks = config.strategy.ranks if isinstance(config.strategy, FlexLoRA) else ()
    return ranks[partition % len(ranks)] if ranks else config.adapter.rank


def down_shapes(
    config: FedTuneConfig, shapes: Shapes, server_round: int, partition: int, offset_rank: int | None = None
) -> Shapes:
    """Return what the message to a client carries.

    Args:
        config: The run's config.
        shapes: The whole adapter's.
        server_round: From 1.
        partition: The client.
        offset_rank: Rank of what is added to the base so far; None for the forecast: every client of every round replied.
    """
    strategy = config.strategy
    if strategy.name == "ffa-lora":
        return {name: shape for name, shape in shapes.items() if not name.endswith(RANDOM)}
    if strategy.name == "flexlora":
        return _with_rank(shapes, rank_of(config, partition))
    if strategy.name == "scaffold":
        return {**shapes, **{CONTROL + name: shape for name, shape in shapes.items()}}
    if strategy.name in OFFSET_STRATEGIES:
        if offset_rank is None:
            offset_rank = (server_round - 1) * config.federation.clients_per_round * config.adapter.rank
        fresh = strategy.name == "flora"  # each round's adapter starts anew from the seed, and need not be sent
        return {
            **{name: shape for name, shape in shapes.items() if not fresh or not name.endswith((A, B))},
            **offset_shapes(shapes, offset_rank),
        }
    return dict(shapes)


def up_shapes(config: FedTuneConfig, shapes: Shapes, server_round: int, partition: int) -> Shapes:
    """Return what a client's reply carries."""
    strategy = config.strategy
    if strategy.name == "flexlora":
        return _with_rank(shapes, rank_of(config, partition))
    if strategy.name == "scaffold":
        return {**shapes, **{CONTROL + name: shape for name, shape in shapes.items()}}
    return {name: shape for name, shape in shapes.items() if is_trained(strategy, name, server_round)}


def kind(config: FedTuneConfig, shapes: Shapes, server_round: int, partition: int) -> tuple[int, int]:
    """Return what the shapes of a round and client depend on: two of the same kind have the same shapes."""
    name = config.strategy.name
    if name == "rolora":
        return server_round % 2, 0
    if name == "flexlora":
        return 0, rank_of(config, partition)
    if name in OFFSET_STRATEGIES:
        return min(server_round, _dense_from(config, shapes)), 0
    return 0, 0


def groups_of_rounds(config: FedTuneConfig, shapes: Shapes) -> list[tuple[int, int]]:
    """Return the run's rounds in groups that carry the same: one round of each group, and how many it has."""
    name, rounds = config.strategy.name, config.federation.rounds
    if name == "rolora":
        return [(1, (rounds + 1) // 2)] + ([(2, rounds // 2)] if rounds > 1 else [])
    if name == "flexlora" and len({rank_of(config, partition) for partition in range(config.federation.clients)}) > 1:
        return [(number, 1) for number in range(1, rounds + 1)]  # who is drawn decides
    if name in OFFSET_STRATEGIES:
        last = min(rounds, _dense_from(config, shapes))
        return [(number, 1) for number in range(1, last)] + [(last, rounds - last + 1)]
    return [(1, rounds)]


def _dense_from(config: FedTuneConfig, shapes: Shapes) -> int:
    """Return a round from which on what is added to the base is a matrix for all modules, so that messages grow no more."""
    a_round = config.federation.clients_per_round * config.adapter.rank
    return max((-(-out * inner // (out + inner) // a_round) for out, inner in modules(shapes).values()), default=0) + 2


def modules(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """Return (out_features, in_features) of every adapted module by name."""
    return {
        name.removesuffix(A): (shapes[name.removesuffix(A) + B][0], shape[1])
        for name, shape in shapes.items()
        if name.endswith(A)
    }


def offset_shapes(shapes: Shapes, rank: int) -> Shapes:
    """Return the shapes of what is added to the base: two factors of `rank` a module, the product where that is smaller."""
    found: dict[str, tuple[int, ...]] = {}
    for module, (out_features, in_features) in modules(shapes).items() if rank else ():
        if is_dense(rank, out_features, in_features):
            found[module + OFFSET] = (out_features, in_features)
        else:
            found[module + OFFSET_A] = (rank, in_features)
            found[module + OFFSET_B] = (out_features, rank)
    return found


def is_dense(rank: int, out_features: int, in_features: int) -> bool:
    """Whether a product of two factors of `rank` has no more values than they have together."""
    return rank * (out_features + in_features) >= out_features * in_features


def sample(config: FedTuneConfig, server_round: int) -> list[int]:
    """Return the partitions of a round's clients in order, drawn without replacement.

    The draw depends on the seed and the round alone, not on node ids, which Flower makes up anew for every run.
    """
    import numpy as np

    generator = np.random.default_rng([_SAMPLING, config.seed, server_round])
    federation = config.federation
    drawn = generator.choice(federation.clients, size=federation.clients_per_round, replace=False)
    return sorted(drawn.tolist())


_SAMPLING = 1
"""Keeps the stream of client sampling apart from other streams of the same seed."""


def _with_rank(shapes: Shapes, rank: int) -> Shapes:
    return {
        name: (rank, shape[1]) if name.endswith(A) else (shape[0], rank) if name.endswith(B) else shape
        for name, shape in shapes.items()
    }
