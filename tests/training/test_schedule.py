"""The learning rate over the rounds, by hand."""

from __future__ import annotations

import pytest

from fedtune.config.schema import TrainingConfig
from fedtune.training.schedule import learning_rate


def test_cosine_from_near_max_to_min() -> None:
    training = TrainingConfig(learning_rate_max=5e-5, learning_rate_min=1e-6)
    # 1e-6 + 24.5e-6 * (1 + cos(pi * round / 4)): cos is 0.70711, 0, -0.70711, -1
    found = [learning_rate(training, server_round, 4) for server_round in (1, 2, 3, 4)]
    assert found == pytest.approx([4.28241e-5, 2.55e-5, 8.17588e-6, 1e-6], rel=1e-5)
    assert learning_rate(training, 1, 1) == 1e-6


def test_equal_ends_are_constant() -> None:
    training = TrainingConfig(learning_rate_max=3e-4, learning_rate_min=3e-4)
    assert {learning_rate(training, server_round, 10) for server_round in range(1, 11)} == {3e-4}
