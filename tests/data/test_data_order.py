"""The order of a client's rows."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config.schema import TrainingConfig
from fedtune.data.order import share_seen, steps_of_round


def training(batch: int, accumulation: int = 1, steps: int = 10, epochs: int = 3) -> TrainingConfig:
    return TrainingConfig(batch_size=batch, accumulation=accumulation, max_steps=steps, epochs=epochs)


def order(rows: int, config: TrainingConfig, server_round: int = 1, **changes: object) -> list[list[int]]:
    options = {"seed": 1, "partition": 0, "reshuffle": True, **changes}
    return [step.tolist() for step in steps_of_round(rows, config, server_round=server_round, **options)]


def test_epochs_end_the_round_and_the_last_step_is_shorter() -> None:
    steps = order(10, training(batch=2, accumulation=2, steps=100, epochs=2))
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    first, second = list(chain(*steps[:3])), list(chain(*steps[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_steps_end_the_round() -> None:
    assert [len(step) for step in order(10, training(batch=4, steps=4))] == [4, 4, 2, 4]
    assert order(0, training(batch=4)) == []


@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 3), st.integers(1, 12), st.integers(1, 4))
def test_every_epoch_is_a_permutation(rows: int, batch: int, accumulation: int, steps: int, epochs: int) -> None:
    config = training(batch, accumulation, steps, epochs)
    drawn = order(rows, config)
    per_epoch = -(-rows // (batch * accumulation))
    assert len(drawn) == min(steps, epochs * per_epoch)
    for start in range(0, len(drawn), per_epoch):
        epoch = list(chain(*drawn[start : start + per_epoch]))
        assert len(set(epoch)) == len(epoch)
        if start + per_epoch <= len(drawn):
            assert sorted(epoch) == list(range(rows))


def test_order_depends_on_seed_client_and_round_and_on_nothing_else() -> None:
    config = training(batch=5)
    base = order(40, config)
    np.random.seed(3)
    assert order(40, config) == base
    assert order(40, config, seed=2) != base
    assert order(40, config, partition=1) != base
    assert order(40, config, server_round=2) != base
    fixed = order(40, config, reshuffle=False)
    assert order(40, config, server_round=2, reshuffle=False) == fixed


def test_share_seen_counts_each_row_once() -> None:
    config = training(batch=2, steps=3)
    sizes = [10, 10, 20]
    # The template's fixed order draws the same 6 rows of client 0 in every round.
    visits = [(0, 1), (0, 2), (0, 3)]
    assert share_seen(sizes, visits, config, seed=1, reshuffle=False) == pytest.approx(6 / 40)
    drawn = {row for r in (1, 2, 3) for step in order(10, config, r) for row in step}
    assert share_seen(sizes, visits, config, seed=1, reshuffle=True) == pytest.approx(len(drawn) / 40)
    assert len(drawn) > 6
    assert share_seen(sizes, [(1, 1), (2, 1)], training(batch=7, steps=9), seed=1, reshuffle=True) == 30 / 40
    assert share_seen(sizes, [], config, seed=1, reshuffle=True) == 0.0
