"""Bulyan: Krum chooses clients one after another, and of each value those nearest to their median are averaged.

El Mhamdi et al., https://arxiv.org/abs/1802.07927. With f of n clients hostile, n of at least 4f + 3: Krum chooses a client,
which is taken out, until n - 2f are chosen; the new value is the mean of the n - 4f chosen values nearest to their median.
Example: f = 1, seven clients reply 0.0, 1.0, 5.0, 9.0, 10.0, 12.0 and 100.0: Krum chooses 5.0, 9.0, 1.0, 10.0 and 0.0, whose
median is 5.0; nearest to it are 5.0, 1.0 and 9.0, and the new value is 5.0.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp.strategy import Bulyan

from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.base import Shapes
from fedtune.config.strategies.robust import Bulyan as Options
from fedtune.federation.strategies.base import Algorithm
from fedtune.federation.strategies.flower import EVERYONE, OnComparison
from fedtune.protocol.messages import ARRAYS


def one_by_one(contents: list[RecordDict], malicious: int, wanted: int) -> list[RecordDict]:
    """Return the `wanted` replies that Krum chooses, each from those that the choices before it have left.

    Flower's own rule takes them all at once, by their scores among all clients. Towards the end a score is one distance, which
    two clients share: distances are symmetric to the last bit, and the first client is chosen.
    """
    vectors = [np.concatenate(content.array_records[ARRAYS].to_numpy_ndarrays(), axis=None) for content in contents]
    distances = np.zeros((len(vectors), len(vectors)))
    for one, other in combinations(range(len(vectors)), 2):
        distances[one, other] = distances[other, one] = np.square(vectors[one] - vectors[other]).sum()
    left = list(range(len(vectors)))
    chosen: list[RecordDict] = []
    while len(chosen) < wanted:
        neighbours = max(1, len(left) - malicious - 2)
        scores = np.sort(distances[np.ix_(left, left)], axis=1)[:, 1 : neighbours + 1].sum(axis=1)
        chosen.append(contents[left.pop(int(scores.argmin()))])
    return chosen


def build(config: FedTuneConfig, shapes: Shapes) -> Algorithm:
    """Return Flower's Bulyan against the config's number of hostile clients."""
    options = config.strategy
    assert isinstance(options, Options)
    strategy = Bulyan(**EVERYONE, num_malicious_nodes=options.malicious, selection_rule=one_by_one)
    return OnComparison(config, shapes, strategy)
