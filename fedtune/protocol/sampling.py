"""Which clients train in a round."""

from __future__ import annotations

from fedtune.config.schema import FedTuneConfig

_STREAM = 1
"""Keeps client sampling apart from other random streams of the same seed."""


def sample(config: FedTuneConfig, server_round: int) -> list[int]:
    """Return the partitions of a round's clients in order, drawn without replacement.

    The draw depends on the seed and the round alone, not on node ids, which Flower creates anew for every run.
    """
    import numpy as np

    generator = np.random.default_rng([_STREAM, config.seed, server_round])
    federation = config.federation
    drawn = generator.choice(federation.clients, size=federation.clients_per_round, replace=False)
    return sorted(drawn.tolist())
