"""The learning rate of a round: a cosine over the run's rounds, constant inside each (protocol, section 1)."""

from __future__ import annotations

import math

from fedtune.config.schema import TrainingConfig


def learning_rate(training: TrainingConfig, server_round: int, rounds: int) -> float:
    """Return the learning rate of a round: min + (max - min) / 2 · (1 + cos(π · round / rounds)).

    Args:
        training: holds max and min.
        server_round: counted from 1, so the maximum itself is never used and the last round gets the minimum.
        rounds: of the whole run.
    """
    low, high = training.learning_rate_min, training.learning_rate_max
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * server_round / rounds))
