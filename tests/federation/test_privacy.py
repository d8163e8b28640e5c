"""Privacy: updates are clipped as counted by hand, the noise is Gaussian and secret, and epsilon is what others compute too."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config.schema import FederationConfig, FedTuneConfig, PrivacyConfig
from fedtune.errors import ClientError
from fedtune.federation.privacy import (
    Accountant,
    _uniform,
    clip_update,
    gaussian_epsilon,
    new_key,
    noisy_average,
)
from fedtune.protocol.messages import TrainReply
from fedtune.protocol.sampling import sample

KEY = bytes(range(16))
FAINT = 1e-30
"""A noise multiplier whose noise is below float32's last bit: what is left is the clipped average alone."""
Update = dict[str, torch.Tensor]


def average(replies: dict[int, Update], *, sent: Update | None = None, key: bytes = KEY, **options: float) -> Update:
    """`noisy_average` from zero, with clip 1 and the noise multiplier 1 where nothing else is said."""
    sent = sent or {name: torch.zeros_like(tensor) for name, tensor in next(iter(replies.values())).items()}
    asked, server_round = int(options.pop("asked", len(replies))), int(options.pop("server_round", 1))
    privacy = PrivacyConfig(mode="central", **options)  # type: ignore[arg-type]
    return noisy_average(sent, replies, privacy, asked=asked, key=key, server_round=server_round)


def same(one: Update, other: Update) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_clipping_by_hand() -> None:
    """(3, 4) and 12 have norm 13 together; at a clip of 6.5 all is halved, at 13 and above nothing changes."""
    update = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[12.0]])}
    halved = clip_update(update, 6.5)
    assert halved["a"].tolist() == [1.5, 2.0]
    assert halved["b"].tolist() == [[6.0]]
    for clip in (13.0, 100.0):
        assert clip_update(update, clip)["b"].tolist() == [[12.0]]
    assert clip_update({"a": torch.zeros(2)}, 1.0)["a"].tolist() == [0.0, 0.0]


def test_an_average_by_hand() -> None:
    """From x = 10, updates 8 (clipped to 4), -2, and a client that failed: x + (4 - 2 + 0) / 4, for 4 were asked."""
    sent = {"a": torch.tensor([10.0])}
    replies = {0: {"a": torch.tensor([18.0])}, 2: {"a": torch.tensor([8.0])}, 3: {"a": torch.tensor([10.0])}}
    moved = average(replies, sent=sent, asked=4, clip=4.0, noise_multiplier=FAINT)
    assert moved["a"].tolist() == [10.5]
    assert moved["a"].dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_does_not_pass(bad: float) -> None:
    """Flower's own wrappers clip NaN to NaN."""
    update = {"a": torch.tensor([1.0, bad])}
    with pytest.raises(ClientError, match="not finite"):
        clip_update(update, 1.0)
    with pytest.raises(ClientError, match="not finite"):
        average({0: {"a": torch.zeros(2)}, 1: update})


def test_the_largest_floats_are_clipped_like_others() -> None:
    """Squares of float32's largest overflow float32, and would make the norm infinite and the update zero."""
    huge = torch.finfo(torch.float32).max
    clipped = clip_update({"a": torch.tensor([huge, -huge])}, 1.0)["a"]
    assert clipped.tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)])


@pytest.mark.parametrize(
    "reply", [{"b": torch.zeros(2, 3)}, {"a": torch.zeros(3)}, {}, {"a": torch.zeros(2, 3), "b": torch.zeros(1)}]
)
def test_other_tensors_are_refused(reply: Update) -> None:
    """A shape that merely broadcasts would count several times."""
    with pytest.raises(ClientError, match="client 5 has other tensors"):
        average({5: reply}, sent={"a": torch.zeros(2, 3)})


def test_order_does_not_matter() -> None:
    """Tensors are found by name and clients by number, down to the last bit of the norm, the sum and the noise."""
    generator = torch.Generator().manual_seed(3)
    names = [f"layer.{index}" for index in range(7)]
    sent = {name: torch.randn(3, 5, generator=generator) for name in names}
    replies = {i: {name: torch.randn(3, 5, generator=generator) for name in names} for i in range(4)}
    shuffled = {i: {name: replies[i][name] for name in reversed(names)} for i in (2, 0, 3, 1)}
    turned = {name: sent[name] for name in reversed(names)}
    once, again = average(replies, sent=sent), average(shuffled, sent=turned)
    assert same(once, again)
    assert list(once) == names
    assert list(again) == names[::-1]


def test_the_noise_is_gaussian() -> None:
    """Its deviation is noise_multiplier · clip / asked; moments, tails and neighbours are those of independent draws.

    The key is fixed, so this never fails by chance; bounds are at least four standard errors wide.
    """
    count = 200_001
    noise = average({0: {"a": torch.zeros(count)}}, asked=5, clip=2.0, noise_multiplier=3.0)["a"].double() / (3 * 2 / 5)
    assert abs(float(noise.mean())) < 4 / math.sqrt(count)
    assert float(noise.square().mean()) == pytest.approx(1, abs=4 * math.sqrt(2 / count))
    assert float(noise.pow(4).mean()) == pytest.approx(3, abs=4 * math.sqrt(96 / count))
    for threshold in (0.0, 1.0, 2.0, 3.0):
        share = math.erfc(threshold / math.sqrt(2)) / 2
        bound = 4 * math.sqrt(share * (1 - share) / count)
        assert float((noise > threshold).double().mean()) == pytest.approx(share, abs=bound)
        assert float((noise < -threshold).double().mean()) == pytest.approx(share, abs=bound)
    half = count // 2
    for left, right in ((noise[1:], noise[:-1]), (noise[:half], noise[-half:]), (noise[:half], noise[half : 2 * half])):
        assert abs(float((left * right).mean())) < 4 / math.sqrt(half)


def test_no_word_gives_a_draw_that_is_not_finite() -> None:
    """Box-Muller takes a logarithm: 0 would give infinite noise, once in 2^53 draws."""
    words = np.array([0, 1, 2**11 - 1, 2**11, 2**63, 2**64 - 1], dtype="<u8")
    half = 2.0**-54
    assert _uniform(words).tolist() == [half, half, half, 3 * half, 0.5 + half, 1.0]


def test_same_key_same_bits_and_anything_else_other_noise() -> None:
    """What is the same released twice tells nothing new; with the same noise on two sums their difference would be bare."""
    base = {0: {"a": torch.zeros(50), "b": torch.zeros(50)}}
    noise = average(base)
    assert same(noise, average(base))
    assert not torch.equal(noise["a"], noise["b"])
    bit = {0: {"a": torch.zeros(50), "b": torch.zeros(50).index_fill(0, torch.tensor([0]), 1e-3)}}
    ones = {name: torch.ones(50) for name in ("a", "b")}
    others = {
        "another key": average(base, key=KEY[::-1]),
        "another round": average(base, server_round=2),
        "another update, by one value": average(bit),
        "another adapter, the update the same": {
            name: tensor - 1 for name, tensor in average({0: ones}, sent=ones).items()
        },
        "another client": average({1: base[0]}),
        "a client more that did nothing": average({0: base[0], 1: base[0]}, asked=1),
    }
    for what, other in others.items():
        for name in ("a", "b"):
            near = torch.isclose(noise[name], other[name], atol=1e-2)
            assert near.double().mean() < 0.2, what


def test_noise_does_not_follow_the_configs_seed() -> None:
    """The seed travels to every client; keys are from the operating system."""
    assert len(new_key()) == 16
    assert len({new_key() for _ in range(50)}) == 50


VALUES = st.lists(st.floats(-50, 50, width=32), min_size=6, max_size=6)


@settings(max_examples=50, deadline=None)
@given(st.lists(VALUES, min_size=2, max_size=6), VALUES, st.floats(0.1, 20), st.integers(0, 3), st.integers(0, 5))
def test_one_client_moves_the_average_by_two_clips_at_most(
    updates: list[list[float]], other: list[float], clip: float, failed: int, who: int
) -> None:
    """Whatever one client sends, or when it fails, and whatever the others do: the bound that the noise is measured by."""
    asked = len(updates) + failed
    who %= len(updates)
    replies = {
        index: {"a": torch.tensor(values[:2]), "b": torch.tensor(values[2:])} for index, values in enumerate(updates)
    }
    before = average(replies, asked=asked, clip=clip, noise_multiplier=FAINT)
    replaced = {**replies, who: {"a": torch.tensor(other[:2]), "b": torch.tensor(other[2:])}}
    silent = {index: reply for index, reply in replies.items() if index != who}
    for neighbour, bound in ((replaced, 2 * clip), (silent, clip)):
        after = average(neighbour, asked=asked, clip=clip, noise_multiplier=FAINT)
        moved = math.sqrt(sum(float((after[name].double() - before[name].double()).square().sum()) for name in before))
        assert moved <= bound / asked * (1 + 1e-5) + 1e-6


def test_public_metrics_hold_nothing_of_the_data() -> None:
    assert TrainReply(7, examples=1).as_values() == {"server-round": 7, "num-examples": 1}


# from dp_accounting import GaussianDpEvent, pld, rdp          (dp-accounting 0.6.0)
# for accountant in (pld.PLDAccountant(), rdp.RdpAccountant()):
#     accountant.compose(GaussianDpEvent(noise_multiplier / 2), participations); accountant.get_epsilon(delta)
# The halves are the sensitivity of 2 · clip. Flower's accountant, which is the second of these, gives 8.193591349819492
# for the third line, asked as no-amplification and add-or-remove-one; it has no replace-one without amplification.
DP_ACCOUNTING = [
    (1, 1, 1e-5, 9.99725615024243, 10.725509696418232),
    (2, 1, 1e-5, 4.37717810002493, 4.728507067217623),
    (5, 16, 1e-5, 7.61919091107642, 8.193591349819492),
    (10, 16, 1e-5, 3.386933192859789, 3.6658774222584043),
    (8, 10, 1e-6, 3.747217996399201, 4.010376255051982),
    (1, 1, 1e-3, 7.581279926592959, 8.416496187447095),
    (20, 4, 1e-5, 0.7255217677404247, 0.794522032537103),
    (0.5, 3, 1e-5, 52.77062707681208, 55.60169282486775),
]


@pytest.mark.parametrize(("noise_multiplier", "participations", "delta", "tight", "renyi"), DP_ACCOUNTING)
def test_epsilon_against_dp_accounting(
    noise_multiplier: float, participations: int, delta: float, tight: float, renyi: float
) -> None:
    """The closed form agrees with Google's tight accountant, and lies below the Rényi bound that Flower's accountant takes."""
    epsilon = accountant(noise_multiplier=noise_multiplier, delta=delta).epsilon_after(participations)
    assert epsilon == pytest.approx(tight, rel=1e-6)
    assert epsilon <= tight
    assert epsilon < renyi


@settings(max_examples=50, deadline=None)
@given(st.floats(0.3, 30), st.integers(1, 300), st.sampled_from([1e-3, 1e-5, 1e-8]))
def test_epsilon_is_below_the_gaussians_renyi_bound(noise_multiplier: float, participations: int, delta: float) -> None:
    """alpha · mu² / 2 + log(1 / delta) / (alpha - 1) is smallest at alpha = 1 + √(2 log(1 / delta)) / mu."""
    mu = 2 * math.sqrt(participations) / noise_multiplier
    alpha = 1 + math.sqrt(2 * math.log(1 / delta)) / mu
    bound = alpha * mu * mu / 2 + math.log(1 / delta) / (alpha - 1)
    assert 0 < accountant(noise_multiplier=noise_multiplier, delta=delta).epsilon_after(participations) < bound


@settings(max_examples=50, deadline=None)
@given(st.floats(0.05, 12), st.sampled_from([1e-3, 1e-5, 1e-8]))
def test_epsilon_by_integration(mu: float, delta: float) -> None:
    """delta is the integral of max(0, p - e^epsilon · q) over two unit Gaussians that are mu apart."""
    epsilon = gaussian_epsilon(mu, delta)
    x = np.linspace(-12, mu + 12, 200_001)
    excess = np.exp(-((x - mu) ** 2) / 2) - np.exp(np.minimum(epsilon - x**2 / 2, 700))
    found = float(np.sum(np.maximum(excess, 0)) * (x[1] - x[0]) / math.sqrt(2 * math.pi))
    assert found == pytest.approx(delta, rel=1e-3) or (epsilon == 0 and found < delta)


def test_epsilon_is_monotone_and_nothing_costs_nothing() -> None:
    """More rounds and less noise cost more, more noise and a larger delta less; also far outside of what is useful."""
    by_rounds = [accountant(noise_multiplier=3.0).epsilon_after(k) for k in range(50)]
    assert by_rounds[0] == 0
    assert by_rounds == sorted(set(by_rounds))
    by_noise = [
        accountant(noise_multiplier=z).epsilon_after(9) for z in (1e4, 100, 10, 1, 0.1, 0.01, 1e-9, 1e-100, 1e-320)
    ]
    assert by_noise == sorted(set(by_noise))
    assert by_noise[-3] == pytest.approx(18 / 1e-18)  # mu² / 2: as good as none
    assert math.isinf(by_noise[-1])
    by_delta = [accountant(delta=delta).epsilon_after(9) for delta in (0.1, 1e-3, 1e-6, 1e-12)]
    assert by_delta == sorted(set(by_delta))
    assert gaussian_epsilon(1e-6, 0.1) == 0


def accountant(
    *, clients: int = 8, fraction: float = 1.0, rounds: int = 16, seed: int = 42, **privacy: float
) -> Accountant:
    federation = FederationConfig(clients=clients, fraction=fraction, rounds=rounds)
    settings = PrivacyConfig(mode="central", **privacy)  # type: ignore[arg-type]
    return Accountant(FedTuneConfig(federation=federation, privacy=settings, seed=seed))


def test_participations_are_those_of_the_client_asked_most() -> None:
    """Everyone every round: the rounds; a part: the most of any client in the draws that the rounds make."""
    assert [accountant().participations(rounds) for rounds in (0, 1, 16)] == [0, 1, 16]
    some = accountant(clients=10, fraction=0.2, rounds=30)
    for rounds in (0, 1, 7, 30):
        drawn = [client for index in range(1, rounds + 1) for client in sample(some.config, index)]
        assert some.participations(rounds) == max((drawn.count(client) for client in range(10)), default=0)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.5, 60), st.floats(0.1, 20), st.sampled_from([1.0, 0.5, 0.125]))
def test_the_budget_holds_and_is_used(noise_multiplier: float, epsilon: float, fraction: float) -> None:
    """The last round within the budget costs no more than it, the next one more, and the noise asked for lasts to the end."""
    some = accountant(fraction=fraction, noise_multiplier=noise_multiplier, epsilon=epsilon)
    rounds = some.rounds_within()
    assert some.epsilon_after(some.participations(rounds)) <= epsilon
    if rounds < 16:
        assert some.epsilon_after(some.participations(rounds + 1)) > epsilon
    needed = some.noise_needed()
    assert (needed <= noise_multiplier + 0.01) == (rounds == 16) or abs(needed - noise_multiplier) <= 0.01
    assert accountant(fraction=fraction, noise_multiplier=needed, epsilon=epsilon).rounds_within() == 16
    if needed > 0.03:
        assert accountant(fraction=fraction, noise_multiplier=needed - 0.02, epsilon=epsilon).rounds_within() < 16


def test_the_worked_example() -> None:
    """The number in the docstring."""
    assert f"{accountant(noise_multiplier=2.0).epsilon_after(4):.1f}" == "10.0"
