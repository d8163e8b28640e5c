"""RoLoRA: B and A in turn, each round's average of the products exact; what travels; and a real run."""

from pathlib import Path

import numpy as np
import torch

from fedtune.budget.plan import plan
from fedtune.config.load import load_config
from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.base import A, B
from fedtune.federation.reply_validator import Accepted, Client
from fedtune.federation.strategies import build_algorithm
from fedtune.federation.train import train
from fedtune.models.adapter import AdapterTensors, initial_tensors, read_adapter
from fedtune.protocol.messages import TrainReply
from fedtune.protocol.wire_format import wire_bytes

M = "base_model.model.q_proj"
SHAPES = {M + A: (2, 5), M + B: (4, 2)}


def config_of(name: str = "rolora", *more: str) -> FedTuneConfig:
    return load_config(settings=[f"strategy.name={name}", *more]).config


def reply(partition: int, examples: int, tensors: AdapterTensors) -> Accepted:
    return Accepted(Client(partition + 2, partition, 100), tensors, TrainReply(1, examples, 1.0))


def test_by_hand() -> None:
    """The docstring's example."""
    algorithm = build_algorithm(config_of(), {M + A: (1, 1), M + B: (1, 1)})
    adapter = {M + A: torch.tensor([[2.0]]), M + B: torch.tensor([[0.0]])}
    for server_round, part in ((1, B), (2, A)):
        replies = [reply(p, 5, {M + part: torch.tensor([[value]])}) for p, value in enumerate((1.0, 3.0))]
        adapter = algorithm.aggregate(server_round, adapter, replies)
    assert (adapter[M + A].item(), adapter[M + B].item()) == (2.0, 2.0)


def test_every_round_is_the_average_of_the_products() -> None:
    """sum p_i · B_i · A, then sum p_i · B · A_i, in float64, over four rounds."""
    draw = np.random.default_rng(0)
    algorithm, adapter = build_algorithm(config_of(), SHAPES), initial_tensors(SHAPES, seed=42)
    weights = [1 / 6, 2 / 6, 3 / 6]
    for server_round in range(1, 5):
        part = M + (B if server_round % 2 else A)
        found = [torch.tensor(draw.normal(size=SHAPES[part])).float() for _ in range(3)]
        products = [
            (each.double() @ adapter[M + A].double()) if part == M + B else (adapter[M + B].double() @ each.double())
            for each in found
        ]
        exact = sum(w * product for w, product in zip(weights, products, strict=True))
        other = ({M + A, M + B} - {part}).pop()
        before = adapter[other]
        adapter = algorithm.aggregate(server_round, adapter, [reply(p, p + 1, {part: found[p]}) for p in range(3)])
        torch.testing.assert_close(adapter[M + B].double() @ adapter[M + A].double(), exact, rtol=1e-5, atol=1e-6)
        assert torch.equal(adapter[other], before)


def test_what_travels() -> None:
    """Both factors down, as a client may not have been there; B comes back in odd rounds and A in even ones."""
    config = config_of("rolora", "federation.rounds=3", "federation.clients=2", "federation.fraction=1.0")
    shapes = {**SHAPES, "lm_head.weight": (9, 3)}
    for server_round, missing in ((1, M + A), (2, M + B), (3, M + A)):
        assert config.strategy.down_shapes(config, shapes, server_round, 0) == shapes
        assert config.strategy.up_shapes(config, shapes, server_round, 1) == {
            k: v for k, v in shapes.items() if k != missing
        }
    of_a, of_b = (wire_bytes({name: SHAPES[name]}, "float32") for name in (M + A, M + B))
    planned = plan(config, SHAPES)
    assert planned.down_bytes == 2 * 3 * (of_a + of_b)
    assert planned.up_bytes == 2 * (2 * of_b + of_a)
    assert planned.varies


def test_a_run_trains_b_and_a_in_turn(tmp_path: Path) -> None:
    small = ["federation.fraction=0.25", "training.max_steps=2", "training.batch_size=2", "checkpoint.save_every=1"]
    settings = ["strategy.name=rolora", "federation.rounds=2", *small]
    config = load_config(challenge="tiny", settings=settings).config
    run = train(config, out=tmp_path).run
    first, second = (read_adapter(run / f"peft_{number}").tensors for number in (1, 2))
    start = initial_tensors({name: tuple(tensor.shape) for name, tensor in first.items()}, config.seed)
    for name in start:
        assert torch.equal(first[name], start[name]) == name.endswith(A)
        assert torch.equal(second[name], first[name]) == name.endswith(B)
