"""FFA-LoRA: the average of the products, in float64; what travels; and a real run whose A never moves."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.budget.ledger import read_ledger
from fedtune.budget.plan import plan
from fedtune.config.load import load_config
from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.base import A, B
from fedtune.federation.reply_validator import Accepted, Client
from fedtune.federation.strategies import build_algorithm
from fedtune.federation.train import train
from fedtune.models.adapter import AdapterTensors, initial_tensors, read_adapter
from fedtune.protocol.messages import TrainReply

M = "base_model.model.q_proj"
SMALL = ("federation.rounds=1", "federation.fraction=0.25", "training.max_steps=2", "training.batch_size=2")


def config_of(name: str = "ffa-lora", *more: str) -> FedTuneConfig:
    return load_config(settings=[f"strategy.name={name}", *more]).config


def reply(partition: int, examples: int, tensors: AdapterTensors) -> Accepted:
    return Accepted(Client(partition + 2, partition, 100), tensors, TrainReply(1, examples, 1.0))


def test_by_hand() -> None:
    """The docstring's example."""
    adapter = {M + A: torch.tensor([[2.0]]), M + B: torch.tensor([[0.0]])}
    replies = [reply(0, 1, {M + B: torch.tensor([[0.0]])}), reply(1, 3, {M + B: torch.tensor([[4.0]])})]
    after = build_algorithm(config_of(), {M + A: (1, 1), M + B: (1, 1)}).aggregate(1, adapter, replies)
    assert (after[M + A].item(), after[M + B].item()) == (2.0, 3.0)


@pytest.mark.usefixtures("flower_identity")
def test_the_product_of_the_average_is_the_average_of_the_products() -> None:
    """sum p_i · B_i · A, in float64; FedAvg, whose clients train A too, has another product."""
    draw = np.random.default_rng(0)
    shapes = {M + A: (2, 5), M + B: (4, 2)}
    start = initial_tensors(shapes, seed=42)
    b = [torch.tensor(draw.normal(size=(4, 2))).float() for _ in range(3)]
    a = [start[M + A] + torch.tensor(draw.normal(size=(2, 5))).float() for _ in range(3)]
    weights = [1 / 6, 2 / 6, 3 / 6]

    after = build_algorithm(config_of(), shapes).aggregate(1, start, [reply(p, p + 1, {M + B: b[p]}) for p in range(3)])
    exact = sum(w * each.double() @ start[M + A].double() for w, each in zip(weights, b, strict=True))
    torch.testing.assert_close(after[M + B].double() @ after[M + A].double(), exact, rtol=1e-6, atol=1e-6)

    whole = [reply(p, p + 1, {M + A: a[p], M + B: b[p]}) for p in range(3)]
    average = build_algorithm(config_of("fedavg"), shapes).aggregate(1, start, whole)
    products = sum(w * each.double() @ other.double() for w, each, other in zip(weights, b, a, strict=True))
    assert (average[M + B].double() @ average[M + A].double() - products).abs().max() > 0.1


def test_what_travels() -> None:
    """All but A, both ways: less than half of the bytes where queries are grouped."""
    config = config_of()
    shapes = {"q" + A: (8, 64), "q" + B: (16, 8), "q.lora_magnitude_vector": (16,), "lm_head.weight": (9, 3)}
    expected = {name: shape for name, shape in shapes.items() if name != "q" + A}
    assert (
        config.strategy.down_shapes(config, shapes, 1, 0) == config.strategy.up_shapes(config, shapes, 2, 5) == expected
    )
    medical = load_config(recipe="aloe-8b-medical", settings=["strategy.name=ffa-lora"]).config
    assert plan(medical).total_bytes < plan(load_config(recipe="aloe-8b-medical").config).total_bytes / 2


@pytest.mark.parametrize("dora", ["false", "true"])
def test_a_run_trains_b_and_leaves_a_as_the_seed_has_made_it(tmp_path: Path, dora: str) -> None:
    config = load_config(challenge="tiny", settings=["strategy.name=ffa-lora", f"adapter.dora={dora}", *SMALL]).config
    result = train(config, out=tmp_path)
    adapter = read_adapter(result.adapter).tensors
    names = {name for name in adapter if name.endswith(A)}
    start = initial_tensors({name: tuple(adapter[name].shape) for name in names}, config.seed)
    assert names
    assert all(torch.equal(adapter[name], start[name]) for name in names)
    assert all(adapter[name].abs().max() > 0 for name in adapter if name.endswith(B))
    assert any(name.endswith("lora_magnitude_vector") for name in adapter) == (dora == "true")
    entries = [entry for entry in read_ledger(result.run / "ledger.jsonl") if entry.kind == "train"]
    assert sum(entry.bytes for entry in entries) == plan(config).total_bytes
