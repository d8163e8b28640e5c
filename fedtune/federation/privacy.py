"""Client-level differential privacy of adapters: clipping, secret Gaussian noise, and what of the budget is spent.

What is bounded: how much anyone who sees every adapter of a run can tell about one client's data, all of its rows together.
Two federations are neighbours when one client's data is replaced by any other (replace-one). A client that does not reply
counts as an update of zero, and the average is divided by the number of clients that were asked, so that a failure moves the
average no further than any other update and the noise does not tell it.

Who took part is not held to be secret. Every client knows of itself, and clients may tell each other; therefore a client's
loss is composed over the rounds that it was asked in, without the discount that a hidden random sample would give. Flower's
accountant (`flwr.supercore.privacy_accounting`) is not used: without that discount it knows add-or-remove only, its Rényi
bound is above the closed form, which is exact for Gaussians, and it needs an extra, dp-accounting. It served to check this
file: see the tests.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, lru_cache

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedtune.config.schema import FedTuneConfig, PrivacyConfig
from fedtune.errors import ClientError
from fedtune.models.adapter import AdapterTensors
from fedtune.protocol.sampling import sample


def new_key() -> bytes:
    """Return a secret of 128 bits for the noise of one run; whoever has it can take the noise off again."""
    return os.urandom(16)


def clip_update(update: AdapterTensors, clip: float) -> AdapterTensors:
    """Return `update` · min(1, clip / ‖update‖) in float64, the norm taken over all tensors together.

    Source: Abadi et al. 2016, https://arxiv.org/abs/1607.00133; per client: McMahan et al. 2018, https://arxiv.org/abs/1710.06963

    Raises:
        ClientError: a value is not finite.
    """
    wide = {name: tensor.to(torch.float64) for name, tensor in update.items()}
    norm = math.sqrt(sum(float(wide[name].square().sum()) for name in sorted(wide)))
    if not math.isfinite(norm):
        raise ClientError("A client's update holds values that are not finite.")
    factor = min(1.0, clip / norm) if norm else 1.0
    return {name: tensor * factor for name, tensor in wide.items()}


def noisy_average(
    sent: AdapterTensors,
    replies: Mapping[int, AdapterTensors],
    privacy: PrivacyConfig,
    *,
    asked: int,
    key: bytes,
    server_round: int,
) -> AdapterTensors:
    """Return x + Σ clipped(yᵢ - x) / asked + N(0, (noise_multiplier · clip / asked)²), in float32.

    Central: the server calls it with the round's replies and puts the result in the place of each of them, so that a strategy
    sees nothing else and all that it computes is post-processing. Local: a client calls it with its own reply and asked = 1.

    Sensitivity: each clipped update has norm clip at most, and so has the zero of a client that failed; replacing one of them
    by another moves the sum by at most 2 · clip, and the average by at most 2 · clip / asked, whatever the other clients do.
    The weights are equal for that reason: a number of rows is itself a client's data.

    Noise: AES-256 in counter mode through the Box-Muller transform, its seed a keyed BLAKE2b hash of the round, of `sent`, of
    the deviation and of the very sum that is hidden. One key may serve any number of runs: were the deviation not in the hash,
    two runs that differ in it alone would get the same draws on two scales, whose difference tells the sum. The same round with
    the same bits gets the same noise: released twice it tells no more than once. A repeated round with other bits, as after a
    crash on a GPU or at a dishonest server's wish, gets independent noise: with the same noise twice, the difference of the two
    would be bare. Without the key the noise cannot be told from chance. This is no sampler hardened against attacks on the low
    bits of floating-point numbers (Mironov 2012, https://doi.org/10.1145/2382196.2382264).

    Args:
        sent: x, the tensors that clients train, as they were sent.
        replies: y by partition, with the names and shapes of `sent`; any order of either gives the same bits.
        privacy: holds `clip` and `noise_multiplier`.
        asked: clients that were asked, whether or not they replied.
        key: of `new_key`, kept by whoever adds the noise and sent to nobody.
        server_round: from 1.

    Raises:
        ClientError: a reply has other names or shapes, or a value that is not finite.
    """
    total = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in sent.items()}
    for partition in sorted(replies):
        reply = replies[partition]
        if _shapes(reply) != _shapes(sent):
            raise ClientError(f"The reply of client {partition} has other tensors than it was sent.")
        update = {name: tensor.to(torch.float64) - sent[name].to(torch.float64) for name, tensor in reply.items()}
        for name, tensor in clip_update(update, privacy.clip).items():
            total[name] += tensor
    deviation = privacy.noise_multiplier * privacy.clip / asked
    seed = _seed(key, server_round, sorted(replies), deviation, sent, total)
    return {
        name: (
            tensor.to(torch.float64) + total[name] / asked + deviation * _gaussian(seed, name, tuple(tensor.shape))
        ).to(torch.float32)
        for name, tensor in sent.items()
    }


class Accountant:
    """What of the budget is spent, as a function of the config and a count: nothing to save, so nothing lost in a crash.

    A release of one client has a Gaussian's trade-off with mu = 2 / noise_multiplier (sensitivity 2 · clip, noise
    noise_multiplier · clip), k of them have 2 · √k / noise_multiplier, exactly, also when each depends on those before
    (Dong, Roth, Su 2019, https://arxiv.org/abs/1905.02383, corollary 3.3). The same holds centrally and locally. Worked
    example: with a noise multiplier of 2, four participations have mu = 2, and epsilon = 10.0 at delta = 1e-5.
    """

    def __init__(self, config: FedTuneConfig) -> None:
        self.config = config

    def epsilon_after(self, participations: int) -> float:
        """Return epsilon at `privacy.delta` for a client that was asked so often."""
        privacy = self.config.privacy
        return gaussian_epsilon(2 * math.sqrt(participations) / privacy.noise_multiplier, privacy.delta)

    def participations(self, rounds: int) -> int:
        """Return how often the client that was asked most often has been asked after so many rounds."""
        return self._most_asked[rounds]

    def rounds_within(self) -> int:
        """Return how many of the run's rounds fit the budget: after so many, no client's epsilon is above it."""
        return bisect_right(self._most_asked, self.config.privacy.epsilon, key=self.epsilon_after) - 1

    def noise_needed(self) -> float:
        """Return the smallest noise multiplier, rounded up to a hundredth, with which all rounds fit the budget."""
        privacy, most = self.config.privacy, self.participations(self.config.federation.rounds)
        tail = math.sqrt(-2 * math.log(privacy.delta))
        enough = 2 * math.sqrt(most) / (math.sqrt(tail**2 + 2 * privacy.epsilon) - tail)
        least = _smallest(lambda noise: _delta(privacy.epsilon, 2 * math.sqrt(most) / noise) <= privacy.delta, enough)
        return math.ceil(100 * least) / 100

    @cached_property
    def _most_asked(self) -> list[int]:
        counts, most = [0] * self.config.federation.clients, [0]
        for server_round in range(1, self.config.federation.rounds + 1):
            for partition in sample(self.config, server_round):
                counts[partition] += 1
            most.append(max(counts))
        return most


def release_mu(privacy: PrivacyConfig) -> float:
    """Return the mu of one release: the sensitivity 2 · clip in standard deviations of the noise, noise_multiplier · clip."""
    return 2 / privacy.noise_multiplier


def composed_epsilon(mus: Iterable[float], delta: float) -> float:
    """Return epsilon at `delta` of releases of the given mu together, which are one of mu = √(Σ mu²) (see `Accountant`).

    Worked example: two releases of mu = 1 and two of mu = 2 have √10 together.
    """
    return gaussian_epsilon(math.sqrt(math.fsum(mu * mu for mu in mus)), delta)


def exceeds(epsilon: float, budget: float) -> bool:
    """Whether `epsilon` is above `budget` by more than what the order of a sum moves in its last digits."""
    return epsilon > budget * (1 + 1e-9)


@lru_cache(maxsize=4096)
def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the smallest epsilon at `delta` of telling N(0, 1) from N(mu, 1), to float precision and from above.

    Source: Balle, Wang 2018, https://arxiv.org/abs/1805.06530, theorem 8.
    """
    if mu == 0 or _delta(0.0, mu) <= delta:
        return 0.0
    enough = mu * mu / 2 + mu * math.sqrt(-2 * math.log(delta))  # there the first term alone is at most delta
    return _smallest(lambda epsilon: _delta(epsilon, mu) <= delta, enough)


def _delta(epsilon: float, mu: float) -> float:
    """Return Φ(a) - e^ε · Φ(-b) for a = mu/2 - ε/mu and b = mu/2 + ε/mu.

    ε is (b² - a²) / 2: with the scaled function erfcx(x) = e^(x²) · erfc(x) nothing overflows and no large numbers cancel.
    """
    a, b = mu / 2 - epsilon / mu, mu / 2 + epsilon / mu
    scaled = float(torch.special.erfcx(torch.tensor(b / math.sqrt(2), dtype=torch.float64)))
    return (math.erfc(-a / math.sqrt(2)) - math.exp(-a * a / 2) * scaled) / 2


def _smallest(holds: Callable[[float], bool], high: float) -> float:
    """Return the smallest value in (0, high] for which `holds`, given that it does for `high` and all above the smallest."""
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _shapes(tensors: AdapterTensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _seed(
    key: bytes,
    server_round: int,
    partitions: list[int],
    deviation: float,
    sent: AdapterTensors,
    total: Mapping[str, torch.Tensor],
) -> bytes:
    """Return 256 bits that depend on everything that the noise is added to."""
    names = sorted(sent)
    digest = hashlib.blake2b(key=key, digest_size=32, person=b"fedtune noise")
    shapes = [[name, *sent[name].shape] for name in names]
    digest.update(json.dumps([server_round, partitions, deviation, shapes]).encode() + b"\n")
    for name in names:
        for tensor in (sent[name].to(torch.float64), total[name]):
            digest.update(tensor.numpy().tobytes())
    return digest.digest()


def _gaussian(seed: bytes, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return independent draws from N(0, 1) in float64, a function of seed, name and shape."""
    count = math.prod(shape)
    pairs = (count + 1) // 2
    key = hashlib.blake2b(name.encode(), key=seed, digest_size=32).digest()
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(16 * pairs))
    uniform = _uniform(np.frombuffer(stream, "<u8"))
    radius, angle = np.sqrt(-2 * np.log(uniform[:pairs])), 2 * np.pi * uniform[pairs:]
    draws = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return torch.from_numpy(draws.reshape(shape))


def _uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return one number in (0, 1] for each word of 64 bits; above 0, so that its logarithm is finite."""
    return np.asarray(((words >> 11) + 0.5) * 2.0**-53)
