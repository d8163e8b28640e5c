"""The order in which a client's rows are drawn: which rows go into each optimiser step of a round."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from fedtune.config.schema import TrainingConfig

Indices = npt.NDArray[np.int64]

# Keeps this generator's stream apart from every other one that the run seeds with the same numbers.
_TAG = 0x0D_0E_50


def steps_of_round(
    rows: int, training: TrainingConfig, *, seed: int, partition: int, server_round: int, reshuffle: bool
) -> list[Indices]:
    """Return the row indices of each optimiser step of one client's round.

    Every epoch is a fresh permutation cut into steps of `training.rows_per_step` rows; the last step of an epoch may be
    shorter, as in `transformers.Trainer`. The list ends after `training.max_steps` steps or `training.epochs` epochs,
    whichever comes first.

    Args:
        rows: Number of rows that the client has.
        training: Batch size, accumulation, steps and epochs.
        seed: The run's seed.
        partition: The client's partition.
        server_round: The round, counted from 1.
        reshuffle: A fresh order in every round; false repeats one order, as the leaderboard's template does.

    Returns:
        One array of shape (rows_in_step,) per step, its values in [0, rows).
    """
    steps: list[Indices] = []
    for epoch in range(training.epochs if rows else 0):
        entropy = [_TAG, seed, partition, epoch, *([server_round] if reshuffle else [])]
        order = np.random.default_rng(entropy).permutation(rows)
        for start in range(0, rows, training.rows_per_step):
            steps.append(order[start : start + training.rows_per_step])
            if len(steps) == training.max_steps:
                return steps
    return steps


def share_seen(
    sizes: Sequence[int], visits: Iterable[tuple[int, int]], training: TrainingConfig, *, seed: int, reshuffle: bool
) -> float:
    """Return the share of all rows of all clients that were drawn at least once.

    Args:
        sizes: Rows of each partition.
        visits: (partition, server_round) of every local training that took place.
        training: As for `steps_of_round`.
        seed: The run's seed.
        reshuffle: As for `steps_of_round`.

    Returns:
        A number in [0, 1]; 0 without rows.
    """
    seen = [np.zeros(size, dtype=bool) for size in sizes]
    # Without reshuffling every round of a client draws the same rows: one of them is enough.
    for partition, server_round in {(p, r if reshuffle else 1) for p, r in visits}:
        for step in steps_of_round(
            sizes[partition], training, seed=seed, partition=partition, server_round=server_round, reshuffle=reshuffle
        ):
            seen[partition][step] = True
    return sum(int(mask.sum()) for mask in seen) / max(1, sum(sizes))
