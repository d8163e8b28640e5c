"""Flower's strategies on adapters: the papers' formulas in float64, what they withstand, and their state across a crash."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest
import torch
from arithmetic import SHAPES as SMALL
from arithmetic import Tamper, client_app
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from fedtune.config.load import load_config
from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.robust import FedTrimmedAvg
from fedtune.errors import ConfigError, FederationError
from fedtune.federation.engines.in_process import InProcessGrid, identity
from fedtune.federation.reply_validator import Accepted, Client
from fedtune.federation.rounds import Rounds
from fedtune.federation.strategies import build_algorithm
from fedtune.federation.strategies.flower import OnFlower, server_rates
from fedtune.models.adapter import AdapterTensors
from fedtune.protocol.messages import ARRAYS, METRICS, TrainReply
from fedtune.runs.directory import RunDirectory


@pytest.fixture(autouse=True, scope="module")
def _flower() -> Iterator[None]:
    """Flower needs to know who makes messages; its Bulyan collects garbage for every reply, which takes long beside torch."""
    with identity(), patch("flwr.app.message.arrayrecord.gc.collect"):
        yield


SHAPES = {f"m.{module}.lora_{x}.weight": shape for module in "qk" for x, shape in (("A", (2, 3)), ("B", (3, 2)))}
"""Not in alphabetical order: what is paired by position would be paired wrongly after a file has reordered it."""

Vector = npt.NDArray[np.float64]

OPTIMISERS = ("fedavgm", "fedadam", "fedyogi", "fedadagrad")
ROBUST = ("fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan")
OPTIONS: dict[str, tuple[str, ...]] = {
    "fedavgm": ("strategy.server_learning_rate=0.7", "strategy.server_momentum=0.4"),
    "fedadam": ("strategy.eta=0.1", "strategy.beta_1=0.8", "strategy.beta_2=0.9", "strategy.tau=0.01"),
    "fedyogi": ("strategy.eta=0.1", "strategy.beta_1=0.8", "strategy.beta_2=0.9", "strategy.tau=0.01"),
    "fedadagrad": ("strategy.eta=0.1", "strategy.tau=0.01"),
    "fedtrimmedavg": ("strategy.beta=0.3",),
    "multikrum": ("strategy.selected=3",),
}


def config_of(name: str, *more: str, clients: int = 7) -> FedTuneConfig:
    defaults = [f"strategy.name={name}", f"federation.clients={clients}", "federation.fraction=1.0"]
    return load_config(settings=[*defaults, "checkpoint.save_every=100", *more]).config


def reply(partition: int, examples: int, tensors: AdapterTensors) -> Accepted:
    return Accepted(Client(partition + 2, partition, 100), tensors, TrainReply(1, examples, 1.0))


def adapter_of(value: float) -> AdapterTensors:
    return {name: torch.full(shape, value) for name, shape in SHAPES.items()}


def random_adapter(draw: np.random.Generator, centre: float = 0.0) -> AdapterTensors:
    return {name: torch.tensor(draw.normal(centre, size=shape)).float() for name, shape in SHAPES.items()}


def random_replies(draw: np.random.Generator, clients: int = 7) -> list[Accepted]:
    return [reply(partition, int(draw.integers(1, 9)), random_adapter(draw)) for partition in range(clients)]


def flat(tensors: AdapterTensors) -> Vector:
    return np.concatenate([tensors[name].double().numpy().ravel() for name in SHAPES])


BY_HAND: dict[str, tuple[str, tuple[str, ...], list[float], float]] = {
    "fedavgm": ("fedavgm", ("strategy.server_learning_rate=1.0",), [2.0], 2.0),
    "fedadam": ("fedadam", ("strategy.beta_2=0.75",), [3.0], 0.1 * 1.5 / (3**0.5 + 1)),
    "fedyogi": ("fedyogi", ("strategy.beta_2=0.75",), [2.0], 0.1 * 1 / (2**0.5 + 1)),
    "fedadagrad": ("fedadagrad", (), [3.0], 0.1 * 3 / (10**0.5 + 1)),
    "fedmedian": ("fedmedian", (), [1.0, 2.0, 1000.0], 2.0),
    "the median of four": ("fedmedian", (), [1.0, 2.0, 4.0, 1000.0], 3.0),
    "fedtrimmedavg": ("fedtrimmedavg", (), [-1000.0, 1.0, 2.0, 6.0, 9000.0], 3.0),
    "krum": ("krum", (), [0.0, 1.0, 2.5, 3.0, 100.0], 2.5),
    "multikrum": ("multikrum", (), [0.0, 1.0, 2.5, 3.0, 100.0], 1.75),
    "multikrum of three": ("multikrum", ("strategy.selected=3",), [0.0, 1.0, 2.5, 3.0, 100.0], 6.5 / 3),
    "bulyan": ("bulyan", (), [0.0, 1.0, 5.0, 9.0, 10.0, 12.0, 100.0], 5.0),
}
"""The examples of the docstrings."""


@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case: str) -> None:
    name, more, values, expected = BY_HAND[case]
    if name in ("fedadam", "fedyogi"):
        more += ("strategy.beta_1=0.5",)
    if name in ("fedadam", "fedyogi", "fedadagrad"):
        more += ("strategy.eta=0.1", "strategy.tau=1.0")
    algorithm = build_algorithm(config_of(name, *more), {"w": (1, 1)})
    replies = [reply(p, 1, {"w": torch.tensor([[value]])}) for p, value in enumerate(values)]
    after = algorithm.aggregate(1, {"w": torch.zeros(1, 1)}, replies)
    assert after["w"].item() == pytest.approx(expected, rel=1e-6)
    if case == "fedavgm":
        assert algorithm.aggregate(2, after, [reply(0, 1, {"w": torch.tensor([[3.0]])})])["w"].item() == 4.0


def test_rates_that_are_left_open_follow_the_clients() -> None:
    """Three steps at 0.02 move a value by 0.06 at most: eta is a tenth of it, or half, and tau a tenth of eta."""
    clients = ("training.learning_rate_max=0.02", "training.max_steps=3")
    for name, more, expected in (
        ("fedadam", (), (0.006, 0.0006)),
        ("fedyogi", (), (0.006, 0.0006)),
        ("fedadagrad", (), (0.03, 0.003)),
        ("fedadam", ("strategy.eta=0.1",), (0.1, 0.01)),
        ("fedyogi", ("strategy.eta=0.1", "strategy.tau=0.5"), (0.1, 0.5)),
        ("fedadagrad", ("strategy.tau=0.5",), (0.03, 0.5)),
    ):
        config = config_of(name, *clients, *more)
        assert server_rates(config, config.strategy) == pytest.approx(expected)  # type: ignore[arg-type]
        algorithm = build_algorithm(config, {"w": (1, 1)})
        assert algorithm.state()["v_t.w"].item() == pytest.approx(expected[1] ** 2)


# The papers' formulas, in float64, on the whole adapter as one vector.


def average(replies: Sequence[Accepted]) -> Vector:
    examples = np.array([float(each.report.examples) for each in replies])
    mean: Vector = examples @ np.stack([flat(each.tensors) for each in replies]) / examples.sum()
    return mean


def krum_scores(vectors: Sequence[Vector], hostile: int) -> list[float]:
    neighbours = max(1, len(vectors) - hostile - 2)
    return [
        sum(sorted(float(((one - other) ** 2).sum()) for other in vectors if other is not one)[:neighbours])
        for one in vectors
    ]


def krum_order(vectors: Sequence[Vector], hostile: int) -> list[int]:
    return [int(index) for index in np.argsort(krum_scores(vectors, hostile), kind="stable")]


def bulyan(vectors: Sequence[Vector], hostile: int) -> Vector:
    left, chosen = list(vectors), []
    while len(chosen) < len(vectors) - 2 * hostile:
        chosen.append(left.pop(krum_order(left, hostile)[0]))
    rows = np.stack(chosen)
    nearest = np.argsort(np.abs(rows - np.median(rows, axis=0)), axis=0)[: len(vectors) - 4 * hostile]
    return np.take_along_axis(rows, nearest, axis=0).mean(axis=0)  # type: ignore[no-any-return]


class Oracle:
    """One strategy, its memory included."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.m: Vector | float = 0.0
        self.v: Vector | float = 0.01**2

    def step(self, before: Vector, replies: Sequence[Accepted]) -> Vector:
        delta = average(replies) - before
        vectors = [flat(each.tensors) for each in replies]
        match self.name:
            case "fedavgm":
                self.m = 0.4 * self.m + delta
                return before + 0.7 * self.m
            case "fedadagrad":
                self.v = self.v + delta**2
                return before + 0.1 * delta / (np.sqrt(self.v) + 0.01)
            case "fedadam" | "fedyogi":
                self.m = 0.8 * self.m + 0.2 * delta
                adam = 0.9 * self.v + 0.1 * delta**2
                self.v = adam if self.name == "fedadam" else self.v - 0.1 * delta**2 * np.sign(self.v - delta**2)
                return before + 0.1 * self.m / (np.sqrt(self.v) + 0.01)
            case "fedmedian":
                return np.median(np.stack(vectors), axis=0)  # type: ignore[no-any-return]
            case "fedtrimmedavg":  # 0.3 · 7 = 2.1
                return np.sort(np.stack(vectors), axis=0)[2:-2].mean(axis=0)  # type: ignore[no-any-return]
            case "krum":
                return vectors[krum_order(vectors, 1)[0]]
            case "multikrum":
                return np.mean([vectors[index] for index in krum_order(vectors, 1)[:3]], axis=0)  # type: ignore[no-any-return]
            case _:
                return bulyan(vectors, 1)


@pytest.mark.parametrize("name", OPTIMISERS + ROBUST)
def test_the_papers_formula(name: str) -> None:
    """Four rounds of seven clients, several times; the optimisers' memory shows from the second round on."""
    for seed in range(5):
        draw = np.random.default_rng(seed)
        algorithm, oracle = build_algorithm(config_of(name, *OPTIONS.get(name, ())), SHAPES), Oracle(name)
        adapter = random_adapter(draw)
        expected = flat(adapter)
        for server_round in range(1, 5):
            replies = random_replies(draw)
            expected = oracle.step(expected, replies)
            adapter = algorithm.aggregate(server_round, adapter, replies)
            np.testing.assert_allclose(flat(adapter), expected, rtol=1e-5, atol=1e-6)
            assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}


@pytest.mark.parametrize("name", OPTIMISERS + ROBUST)
def test_it_is_not_fedavg(name: str) -> None:
    """Nor in the second round, which memory has a part in."""
    draw = np.random.default_rng(1)
    start, replies = random_adapter(draw), [random_replies(draw) for _ in range(2)]
    after = []
    for each in ("fedavg", name):
        algorithm = build_algorithm(config_of(each), SHAPES)
        after.append(flat(algorithm.aggregate(2, algorithm.aggregate(1, start, replies[0]), replies[1])))
    assert np.abs(after[1] - after[0]).max() > 0.01


def test_fedavgm_without_momentum_is_fedavg() -> None:
    draw = np.random.default_rng(2)
    adapter, replies = random_adapter(draw), random_replies(draw)
    plain = build_algorithm(config_of("fedavg"), SHAPES).aggregate(1, adapter, replies)
    config = config_of("fedavgm", "strategy.server_momentum=0.0", "strategy.server_learning_rate=1.0")
    after = build_algorithm(config, SHAPES).aggregate(1, adapter, replies)
    assert np.array_equal(flat(after), flat(plain))


# What they withstand.


@given(st.sampled_from(ROBUST), st.floats(-1e30, 1e30) | st.floats(-5, 5), st.integers(0, 6), st.integers(0, 2**32 - 1))
def test_one_hostile_client_of_seven_moves_no_value_far(name: str, value: float, hostile: int, seed: int) -> None:
    """Not out of the range of the honest ones' values; those that choose clients may choose it where it lies among them."""
    draw = np.random.default_rng(seed)
    replies = random_replies(draw)
    honest = np.stack([flat(each.tensors) for each in replies if each.client.partition != hostile])
    replies[hostile] = reply(hostile, 100, adapter_of(float(np.float32(value))))
    after = flat(build_algorithm(config_of(name), SHAPES).aggregate(1, random_adapter(draw), replies))
    distance = np.sqrt(((honest[:, None] - honest[None]) ** 2).sum(axis=2)).max()
    among_them = name in ("krum", "multikrum", "bulyan") and abs(value) < 2 * distance
    more = distance if among_them else 1e-5
    assert (after >= honest.min(axis=0) - more).all()
    assert (after <= honest.max(axis=0) + more).all()


def test_fedavg_withstands_nobody() -> None:
    draw = np.random.default_rng(3)
    replies = [*random_replies(draw)[:6], reply(6, 9, adapter_of(1e6))]
    assert (
        np.abs(flat(build_algorithm(config_of("fedavg"), SHAPES).aggregate(1, random_adapter(draw), replies))).max()
        > 1e4
    )


@pytest.mark.parametrize("name", ROBUST)
def test_claimed_examples_do_not_count(name: str) -> None:
    draw = np.random.default_rng(4)
    adapter, replies = random_adapter(draw), random_replies(draw)
    algorithm = build_algorithm(config_of(name), SHAPES)
    claimed = [reply(each.client.partition, 1 + 99 * (p == 2), each.tensors) for p, each in enumerate(replies)]
    assert np.array_equal(
        flat(algorithm.aggregate(1, adapter, replies)), flat(algorithm.aggregate(1, adapter, claimed))
    )


@pytest.mark.parametrize("name", ["krum", "multikrum", "bulyan"])
def test_distances_of_adapters_that_are_nearly_the_same(name: str) -> None:
    """All values are near 1000 and differ by about 0.001: squares of float32 would be rounded to 0.06."""
    for seed in range(10):
        draw = np.random.default_rng(seed)
        adapter = random_adapter(draw, centre=1000.0)
        replies = []
        for partition in range(7):
            moved = {
                key: (each + torch.tensor(draw.normal(0, 1e-3, each.shape))).float() for key, each in adapter.items()
            }
            replies.append(reply(partition, 1, moved))
        after = build_algorithm(config_of(name, *OPTIONS.get(name, ())), SHAPES).aggregate(1, adapter, replies)
        expected = Oracle(name).step(flat(adapter), replies)
        np.testing.assert_allclose(flat(after), expected, rtol=0, atol=1e-4)  # float32 has steps of 6e-5 there
        if name == "krum":
            assert any(np.array_equal(flat(after), flat(each.tensors)) for each in replies), "not a bit is lost"


@pytest.mark.parametrize("name", OPTIMISERS + ROBUST)
def test_tensors_are_paired_by_name(name: str) -> None:
    """Two rounds with the adapter and every second reply in another order."""

    def turned(tensors: AdapterTensors) -> AdapterTensors:
        return dict(reversed(tensors.items()))

    draw = np.random.default_rng(5)
    one, two = (build_algorithm(config_of(name), SHAPES) for _ in range(2))
    straight = mixed = random_adapter(draw)
    for server_round in (1, 2):
        replies = random_replies(draw)
        straight = one.aggregate(server_round, straight, replies)
        replies[1::2] = [replace(each, tensors=turned(each.tensors)) for each in replies[1::2]]
        mixed = two.aggregate(server_round, turned(mixed), replies)
    assert list(mixed) == list(SHAPES)
    assert np.array_equal(flat(straight), flat(mixed))


def test_messages_carry_the_adapter_in_its_own_order() -> None:
    """Whatever order a file has left it in: packed messages have no names."""
    algorithm = build_algorithm(config_of("fedmedian", clients=3), SHAPES)
    adapter = random_adapter(np.random.default_rng(6))
    clients = [Client(node, node - 2, 10) for node in (4, 2, 3)]
    found = algorithm.outgoing(1, dict(sorted(adapter.items())), clients)
    assert [each.client.partition for each in found] == [0, 1, 2]
    for each in found:
        assert list(each.tensors) == list(SHAPES)
        assert all(torch.equal(each.tensors[name], adapter[name]) for name in SHAPES)


# Too few replies.


def test_replies_needed_by_hand() -> None:
    needed = {
        ("fedavg",): 1,
        ("fedmedian",): 3,
        ("fedtrimmedavg",): 5,
        ("fedtrimmedavg", "strategy.beta=0.34"): 3,
        ("krum",): 5,
        ("krum", "strategy.malicious=0"): 3,
        ("multikrum", "strategy.malicious=2"): 7,
        ("multikrum", "strategy.selected=6"): 7,
        ("bulyan",): 7,
        ("bulyan", "strategy.malicious=2"): 11,
    }
    for (name, *more), replies in needed.items():
        assert config_of(name, *more, clients=20).strategy.replies_needed == replies
        config_of(name, *more, clients=replies)
        if replies > 1:
            with pytest.raises(ConfigError, match=f"{name} needs {replies} clients a round, and {replies - 1} are"):
                config_of(name, *more, clients=replies - 1)


@given(st.floats(0.001, 0.5, exclude_max=True))
def test_a_trimmed_mean_needs_as_many_as_make_it_cut_one(beta: float) -> None:
    needed = FedTrimmedAvg(name="fedtrimmedavg", beta=beta).replies_needed
    assert (int(beta * needed), int(beta * (needed - 1))) == (1, 0)


def noisy(partition: int, server_round: int, content: RecordDict) -> RecordDict:
    """Replies that differ by client and round in every value."""
    draw = np.random.default_rng([partition, server_round])
    arrays = {name: Array(draw.normal(size=shape).astype("float32")) for name, shape in SMALL.items()}
    return RecordDict({ARRAYS: ArrayRecord(arrays), METRICS: content[METRICS]})


def without(*places: tuple[int, int]) -> Tamper:
    """Clients fail in rounds: (partition, round)."""
    return lambda partition, server_round, content: (
        None if (partition, server_round) in places else noisy(partition, server_round, content)
    )


def rounds_of(folder: Path, config: FedTuneConfig, tamper: Tamper = noisy) -> Rounds:
    folder.mkdir(exist_ok=True)
    return Rounds(
        InProcessGrid(client_app(tamper), config.federation.clients, {}),
        config,
        RunDirectory(folder),
        initial={name: torch.zeros(shape) for name, shape in SMALL.items()},
        target_modules=["q_proj"],
        revision=None,
    )


@pytest.mark.parametrize("name", ROBUST)
def test_a_round_with_too_few_replies_fails_the_run_and_can_be_repeated(tmp_path: Path, name: str) -> None:
    needed = config_of(name, clients=20).strategy.replies_needed
    config = config_of(name, "federation.rounds=2", clients=needed)
    with pytest.raises(FederationError, match=f"Round 2 has {needed - 1} usable .* {name} needs {needed}") as caught:
        rounds_of(tmp_path / "run", config, without((0, 2))).run_rounds()
    assert caught.value.exit_code == 4
    assert "--resume" in caught.value.hint
    again = rounds_of(tmp_path / "run", config)
    assert again.done == 1
    again.run_rounds()
    whole = rounds_of(tmp_path / "whole", config)
    whole.run_rounds()
    assert all(torch.equal(again.tensors[key], whole.tensors[key]) for key in SMALL)


# The state.


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_state_is_tensors_by_name_and_a_file_may_reorder_them(name: str) -> None:
    """Two rounds, a file, two more rounds: the same bits as four rounds, and not those of rounds without the state."""
    draw = np.random.default_rng(7)
    start, replies = random_adapter(draw), [random_replies(draw) for _ in range(4)]
    config = config_of(name, *OPTIONS[name])
    algorithm = build_algorithm(config, SHAPES)
    after = [start]
    states = []
    for number, of_round in enumerate(replies, start=1):
        after.append(algorithm.aggregate(number, after[-1], of_round))
        states.append(save(algorithm.state()))
    assert {key.removeprefix("m_t.").removeprefix("v_t.") for key in load(states[1])} == set(SHAPES)
    resumed, forgetful = (build_algorithm(config, SHAPES) for _ in range(2))
    assert isinstance(resumed, OnFlower)
    resumed.restore(dict(sorted(load(states[1]).items())))
    adapter = dict(sorted(after[2].items()))
    third = resumed.aggregate(3, adapter, replies[2])
    fourth = resumed.aggregate(4, third, replies[3])
    assert np.array_equal(flat(fourth), flat(after[4]))
    assert not np.array_equal(flat(forgetful.aggregate(3, adapter, replies[2])), flat(third))


@pytest.mark.parametrize("name", OPTIMISERS + ROBUST)
def test_a_run_that_broke_off_ends_with_the_same_bits(tmp_path: Path, name: str) -> None:
    config = config_of(name, "federation.rounds=4")
    whole = rounds_of(tmp_path / "whole", config)
    whole.run_rounds()
    with pytest.raises(FederationError, match="All 7 clients of round 3"):
        rounds_of(tmp_path / "run", config, without(*((p, 3) for p in range(7)))).run_rounds()
    kept = tmp_path / "run" / "state" / "round-0002" / "algorithm.safetensors"
    assert kept.is_file() == (name in OPTIMISERS)
    again = rounds_of(tmp_path / "run", config)
    assert again.done == 2
    again.run_rounds()
    assert all(torch.equal(again.tensors[key], whole.tensors[key]) for key in SMALL)
    adapters = [(tmp_path / run / "peft_4" / "adapter_model.safetensors").read_bytes() for run in ("run", "whole")]
    assert adapters[0] == adapters[1]
