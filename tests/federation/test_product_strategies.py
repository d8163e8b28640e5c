"""FlexLoRA, FLoRA and FedEx-LoRA against the average of the products, in float64; their state, and what clients make of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config.load import load_config
from fedtune.config.schema import AdapterConfig, FedTuneConfig, ModelConfig
from fedtune.config.strategies.base import A, B
from fedtune.config.strategies.base_delta import DELTA, DELTA_A, DELTA_B, delta_shapes
from fedtune.errors import ConfigError
from fedtune.federation.base_delta import BaseDeltaAlgorithm, product_of, split
from fedtune.federation.client import _filled
from fedtune.federation.reply_validator import Accepted, Client
from fedtune.federation.strategies import build_algorithm
from fedtune.models.adapter import AdapterTensors, attach, attach_saved, initial_tensors, read_adapter, write_adapter
from fedtune.models.base import load_base
from fedtune.protocol.messages import TrainReply

M = "base_model.model.q_proj"


def config_of(name: str, *more: str, rank: int = 1, alpha: int = 1) -> FedTuneConfig:
    settings_ = [f"strategy.name={name}", f"adapter.rank={rank}", f"adapter.alpha={alpha}", "federation.clients=4"]
    return load_config(settings=[*settings_, "federation.fraction=1.0", *more]).config


def shapes_of(out: int, inner: int, rank: int) -> dict[str, tuple[int, ...]]:
    return {M + A: (rank, inner), M + B: (out, rank)}


def reply(partition: int, examples: int, a: list[list[float]], b: list[list[float]]) -> Accepted:
    tensors = {M + A: torch.tensor(a), M + B: torch.tensor(b)}
    return Accepted(Client(partition + 2, partition, 100), tensors, TrainReply(1, examples, 1.0))


def random_replies(seed: int, out: int, inner: int, ranks: list[int]) -> list[Accepted]:
    draw = np.random.default_rng(seed)
    return [
        reply(p, int(draw.integers(1, 9)), draw.normal(size=(r, inner)).tolist(), draw.normal(size=(out, r)).tolist())
        for p, r in enumerate(ranks)
    ]


def average_product(replies: list[Accepted]) -> torch.Tensor:
    """The papers' exact average, sum n_i / n · B_i · A_i, in float64."""
    examples = [float(each.report.examples) for each in replies]
    return sum(  # type: ignore[return-value]
        n / sum(examples) * each.tensors[M + B].double() @ each.tensors[M + A].double()
        for n, each in zip(examples, replies, strict=True)
    )


def start(rank: int, out: int, inner: int) -> AdapterTensors:
    return initial_tensors(shapes_of(out, inner, rank), seed=42)


EXAMPLE = [reply(0, 5, [[1.0]], [[2.0]]), reply(1, 5, [[3.0]], [[4.0]])]
"""The example of the docstrings: the products are 2 and 12, their average 7; FedAvg has 2 · 3 = 6."""


@pytest.mark.usefixtures("flower_identity")
def test_fedavg_misses_the_average_of_the_products() -> None:
    after = build_algorithm(config_of("fedavg"), shapes_of(1, 1, 1)).aggregate(1, start(1, 1, 1), EXAMPLE)
    assert (after[M + B] @ after[M + A]).item() == 6


def test_flexlora_by_hand() -> None:
    after = build_algorithm(config_of("flexlora"), shapes_of(1, 1, 1)).aggregate(1, start(1, 1, 1), EXAMPLE)
    assert (after[M + B] @ after[M + A]).item() == pytest.approx(7)
    assert abs(after[M + A].item()) == pytest.approx(1)


def test_flora_by_hand() -> None:
    algorithm = build_algorithm(config_of("flora", alpha=2), shapes_of(1, 1, 1))
    after = algorithm.aggregate(1, start(1, 1, 1), EXAMPLE)
    assert isinstance(algorithm, BaseDeltaAlgorithm)
    assert algorithm.delta[M + DELTA].item() == 2 * 7  # alpha / rank
    assert after[M + B].item() == 0, "a fresh adapter"
    assert after[M + A].item() != start(1, 1, 1)[M + A].item()
    assert algorithm.rank == 2


def test_fedex_by_hand() -> None:
    algorithm = build_algorithm(config_of("fedex-lora"), shapes_of(1, 1, 1))
    after = algorithm.aggregate(1, start(1, 1, 1), EXAMPLE)
    assert isinstance(algorithm, BaseDeltaAlgorithm)
    assert (after[M + A].item(), after[M + B].item()) == (2, 3)
    assert algorithm.delta[M + DELTA].item() == 1


@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), rounds=st.integers(1, 3), out=st.integers(1, 24), inner=st.integers(1, 24))
def test_exact_over_rounds(name: str, seed: int, rounds: int, out: int, inner: int) -> None:
    """After every round, base plus adapter has moved by exactly the average of the clients' products."""
    config = config_of(name, rank=2, alpha=6)
    algorithm = build_algorithm(config, shapes_of(out, inner, 2))
    assert isinstance(algorithm, BaseDeltaAlgorithm)
    adapter, moved = start(2, out, inner), torch.zeros(out, inner, dtype=torch.float64)
    for number in range(1, rounds + 1):
        replies = random_replies(seed + number, out, inner, [2, 2, 2])
        before = torch.zeros_like(moved) if algorithm.rank == 0 else total(algorithm, {})
        adapter = algorithm.aggregate(number, adapter, replies)
        moved = before + config.adapter.scale * average_product(replies)
        assert torch.allclose(total(algorithm, adapter), moved, atol=1e-4, rtol=1e-4)
        found = {key: tuple(tensor.shape) for key, tensor in algorithm.delta.items()}
        assert found == delta_shapes(shapes_of(out, inner, 2), algorithm.rank)
        published, kept_settings = algorithm.published(adapter)
        assert kept_settings.scale == 1
        assert tuple(published[M + A].shape) == (kept_settings.rank, inner)
        assert kept_settings.rank <= algorithm.rank + 2
        product = published[M + B].double() @ published[M + A].double()
        assert torch.allclose(product, moved, atol=1e-4, rtol=1e-4)


def total(algorithm: BaseDeltaAlgorithm, adapter: AdapterTensors) -> torch.Tensor:
    held = product_of(algorithm.delta, M)
    assert held is not None
    found = held[0].double() @ held[1].double()
    if adapter:
        found = found + algorithm.config.adapter.scale * (adapter[M + B].double() @ adapter[M + A].double())
    return found


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    ranks=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    out=st.integers(1, 9),
    inner=st.integers(1, 9),
)
def test_flexlora_is_the_best_adapter_of_its_rank(seed: int, ranks: list[int], out: int, inner: int) -> None:
    """U·S and V^T of the averaged product, cut to the rank: no product of that rank is nearer to it (Eckart and Young)."""
    config = config_of("flexlora", rank=3)
    replies = random_replies(seed, out, inner, ranks)
    after = build_algorithm(config, shapes_of(out, inner, 3)).aggregate(1, start(3, out, inner), replies)
    wanted = average_product(replies)
    u, s, vt = torch.linalg.svd(wanted, full_matrices=False)
    best = u[:, :3] * s[:3] @ vt[:3]
    assert torch.allclose(after[M + B].double() @ after[M + A].double(), best, atol=1e-4)
    assert (after[M + A].norm(dim=1) > 0).all(), "every direction can still learn"


def test_flexlora_sends_each_client_its_rank() -> None:
    config = config_of("flexlora", "strategy.ranks=[1, 3]", rank=3)
    algorithm = build_algorithm(config, shapes_of(4, 5, 3))
    clients = [Client(node=partition + 2, partition=partition, rows=9) for partition in range(4)]
    adapter = start(3, 4, 5)
    outgoing = algorithm.outgoing(1, adapter, clients)
    assert [tuple(each.tensors[M + A].shape) for each in outgoing] == [(1, 5), (3, 5), (1, 5), (3, 5)]
    assert outgoing[0].tensors is outgoing[2].tensors
    assert torch.equal(outgoing[0].tensors[M + A], adapter[M + A][:1])
    assert config.strategy.up_shapes(config, shapes_of(4, 5, 3), 1, 2) == shapes_of(4, 5, 1)
    with pytest.raises(ConfigError, match=r"strategy\.ranks goes above adapter\.rank"):
        config_of("flexlora", "strategy.ranks=[4]", rank=3)


def test_a_split_without_the_product() -> None:
    left, right = torch.randn(7, 4), torch.randn(4, 5)
    found = split(left, right, 6)
    assert [tuple(each.shape) for each in found] == [(7, 6), (6, 5)]
    assert torch.allclose(found[0] @ found[1], left @ right, atol=1e-5)
    assert torch.equal(found[1][5:], torch.zeros(1, 5))


@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
def test_the_state_survives(name: str) -> None:
    shapes = shapes_of(40, 40, 2)
    one, other = (build_algorithm(config_of(name, rank=2), shapes) for _ in range(2))
    adapter = one.aggregate(1, start(2, 40, 40), random_replies(1, 40, 40, [2, 2]))
    assert set(one.state()) == {M + DELTA_A, M + DELTA_B, "offset_rank"}
    other.restore(one.state())
    for algorithm in (one, other):
        algorithm.aggregate(2, dict(adapter), random_replies(2, 40, 40, [2, 2]))
    assert one.state().keys() == other.state().keys()
    assert all(torch.equal(one.state()[key], other.state()[key]) for key in one.state())


@pytest.mark.parametrize("rank", [2, 100])
def test_the_model_computes_with_the_offset_as_with_the_published_adapter(tmp_path: Path, rank: int) -> None:
    """What clients train on (base, offset by hooks, adapter) and what the file holds give the same logits."""
    base = load_base(ModelConfig(base="builtin:tiny", quantization="none"))
    settings_ = AdapterConfig(rank=4, alpha=8, targets="all-linear")
    adapted = attach(base, settings_)
    config = config_of("fedex-lora", "adapter.targets=all-linear", rank=4, alpha=8)
    algorithm = build_algorithm(config, adapted.shapes)
    assert isinstance(algorithm, BaseDeltaAlgorithm)
    draw = torch.Generator().manual_seed(0)
    adapter = {k: t + 0.05 * torch.randn(t.shape, generator=draw) for k, t in initial_tensors(adapted, 1).items()}
    factors = {}
    for module in {name.removesuffix(A) for name in adapted.shapes if name.endswith(A)}:
        out, inner = adapted.shapes[module + B][0], adapted.shapes[module + A][1]
        factors[module] = tuple(0.05 * torch.randn(shape, generator=draw) for shape in ((out, rank), (rank, inner)))
    algorithm.add(factors)  # type: ignore[arg-type]
    assert any(DELTA_A in name for name in algorithm.delta) == (rank == 2)
    adapted.load(adapter)
    ids = torch.arange(2, 26).reshape(2, 12)
    with torch.no_grad():
        bare = adapted.model(ids).logits
        adapted.set_base_delta(algorithm.delta)
        expected = adapted.model(ids).logits
        adapted.set_base_delta({})
        assert torch.equal(adapted.model(ids).logits, bare)
    assert (expected - bare).abs().max() > 1e-2
    tensors, found = algorithm.published(adapter)
    targets = adapted.target_modules
    adapted.detach()
    write_adapter(tmp_path / "peft_1", tensors, found, base_name="x", revision=None, target_modules=targets)
    saved = read_adapter(tmp_path / "peft_1")
    again = attach_saved(base, saved)
    again.load(saved.tensors)
    with torch.no_grad():
        assert torch.allclose(again.model(ids).logits, expected, atol=1e-4)
    again.detach()


def test_an_adapter_of_a_lower_rank_trains_alone_in_a_larger_one() -> None:
    """Zeros that fill an adapter up get no gradient: what a client of rank 1 trains is what it would train by itself."""
    filled = _filled(torch.ones(1, 3), (2, 3))
    assert torch.equal(filled, torch.tensor([[1.0, 1, 1], [0, 0, 0]]))
    a, b = filled.clone().requires_grad_(), _filled(torch.ones(4, 1), (4, 2)).clone().requires_grad_()
    ((b @ a @ torch.randn(3)) ** 2).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad[0].abs().sum() > 0
    assert a.grad[1].abs().sum() == 0
    assert b.grad[:, 1].abs().sum() == 0


@pytest.mark.parametrize("name", ["flexlora", "flora", "fedex-lora"])
def test_dora_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"does not go with adapter\.dora"):
        config_of(name, "adapter.dora=true")


def test_offset_names_are_told_apart() -> None:
    assert DELTA_A.startswith(DELTA)
    assert DELTA_B.startswith(DELTA)
