"""SCAFFOLD against the paper's algorithm 1 with option II, in float64, and the invariant that a real run keeps."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file

from fedtune.config.load import load_config
from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.scaffold import CONTROL
from fedtune.federation.reply_validator import Accepted, Client
from fedtune.federation.strategies import build_algorithm
from fedtune.federation.strategies.scaffold import Control, Scaffold, client_part
from fedtune.federation.train import train
from fedtune.models.adapter import AdapterTensors
from fedtune.protocol.messages import TrainReply

SHAPES = {"m.q.lora_B.weight": (1, 2), "m.k.lora_A.weight": (2, 1)}
"""Not in alphabetical order."""

Vector = npt.NDArray[np.float64]


def config_of(*more: str, asked: int = 2) -> FedTuneConfig:
    defaults = ["strategy.name=scaffold", "federation.clients=4", f"federation.fraction={asked / 4}"]
    return load_config(settings=[*defaults, *more]).config


def algorithm_of(*more: str) -> Scaffold:
    algorithm = build_algorithm(config_of(*more), SHAPES)
    assert isinstance(algorithm, Scaffold)
    return algorithm


def reply(partition: int, tensors: AdapterTensors, examples: int = 1) -> Accepted:
    return Accepted(Client(partition + 2, partition, 100), tensors, TrainReply(1, examples, 1.0))


def filled(value: float, prefix: str = "") -> AdapterTensors:
    return {prefix + name: torch.full(shape, value) for name, shape in SHAPES.items()}


def test_by_hand() -> None:
    """The docstring's example; numbers of examples do not count, in the paper all clients do the same."""
    control = Control(filled(1.0), filled(0.0))
    parameter = {name: torch.nn.Parameter(tensor) for name, tensor in filled(0.0).items()}
    for gradient, corrected in ((2.0, 3.0), (4.0, 5.0)):
        for each in parameter.values():
            each.grad = torch.full_like(each, gradient)
        control(parameter)
        assert {float(x) for each in parameter.values() for x in each.grad.flatten()} == {corrected}  # type: ignore[union-attr]
    assert {float(x) for each in control.changes().values() for x in each.flatten()} == {3.0}
    algorithm = algorithm_of("strategy.server_learning_rate=0.5")
    algorithm.restore(filled(1.0))
    replies = [reply(0, filled(4.0) | filled(3.0, CONTROL), 1), reply(3, filled(8.0) | filled(1.0, CONTROL), 9)]
    after = algorithm.aggregate(1, filled(2.0), replies)
    assert {float(x) for each in after.values() for x in each.flatten()} == {2.0 + 0.5 * 4.0}
    assert {float(x) for each in algorithm.state().values() for x in each.flatten()} == {2.0}


class Quadratics:
    """Clients with the losses 1/2 · h_i · ||y - t_i||², whose common optimum is sum h_i · t_i / sum h_i."""

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.h, self.t = draw.uniform(0.2, 2, size=4), draw.normal(size=(4, 4))
        self.rate, self.steps = 0.2, 5

    @property
    def optimum(self) -> Vector:
        found: Vector = self.h @ self.t / self.h.sum()
        return found

    def gradient(self, client: int, y: Vector) -> Vector:
        found: Vector = self.h[client] * (y - self.t[client])
        return found

    def paper(self, rounds: list[list[int]], corrected: bool = True) -> list[Vector]:
        """Algorithm 1 with option II: x after each round."""
        x, c, own = np.zeros(4), np.zeros(4), np.zeros((4, 4))
        found = []
        for clients in rounds:
            moves, changes = [], []
            for i in clients:
                y = x.copy()
                for _ in range(self.steps):
                    y -= self.rate * (self.gradient(i, y) + corrected * (c - own[i]))
                new = own[i] - c + (x - y) / (self.steps * self.rate)
                moves.append(y - x)
                changes.append(new - own[i])
                own[i] = new
            x = x + np.mean(moves, axis=0)
            c = c + len(clients) / 4 * np.mean(changes, axis=0)
            found.append(x)
        return found

    def ours(self, rounds: list[list[int]]) -> list[Vector]:
        """The same with the code of server and client, the steps being plain SGD."""
        algorithm, adapter = algorithm_of(), filled(0.0)
        kept: dict[int, AdapterTensors] = {client: {} for client in range(4)}
        found = []
        for server_round, clients in enumerate(rounds, start=1):
            asked = [Client(each + 2, each, 100) for each in clients]
            replies = []
            for sent in algorithm.outgoing(server_round, adapter, asked):
                client = sent.client.partition
                control = client_part(dict(sent.tensors), kept[client])
                parameters = {name: torch.nn.Parameter(sent.tensors[name].clone()) for name in SHAPES}
                optimizer = torch.optim.SGD(parameters.values(), lr=self.rate)
                for _ in range(self.steps):
                    gradient = torch.tensor(self.gradient(client, vector(parameters))).float()
                    for part, each in zip(gradient.split(2), parameters.values(), strict=True):
                        each.grad = part.reshape(each.shape)
                    control(parameters)
                    optimizer.step()
                kept[client] = control.kept()
                outcome = {name: each.detach() for name, each in parameters.items()}
                replies.append(reply(client, outcome | control.changes(), examples=client + 1))
            adapter = algorithm.aggregate(server_round, adapter, replies)
            found.append(vector(adapter))
        return found


def vector(tensors: dict[str, torch.nn.Parameter] | AdapterTensors) -> Vector:
    return np.concatenate([tensors[name].detach().double().numpy().ravel() for name in SHAPES])


def sampled(seed: int, rounds: int) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [sorted(draw.choice(4, 2, replace=False).tolist()) for _ in range(rounds)]


@pytest.mark.parametrize("seed", range(3))
def test_the_papers_algorithm(seed: int) -> None:
    problem, rounds = Quadratics(seed), sampled(seed, 12)
    for ours, paper in zip(problem.ours(rounds), problem.paper(rounds), strict=True):
        np.testing.assert_allclose(ours, paper, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_it_reaches_the_optimum_that_client_drift_keeps_fedavg_from(seed: int) -> None:
    problem, rounds = Quadratics(seed), sampled(seed, 60)
    everyone = [list(range(4))] * 60
    assert np.abs(problem.ours(rounds)[-1] - problem.optimum).max() < 1e-3
    assert np.abs(problem.paper(everyone, corrected=False)[-1] - problem.optimum).max() > 0.03


def test_the_control_variate_is_sent_in_the_order_that_is_agreed_on() -> None:
    """Whatever order a file has left its tensors in: packed messages have no names."""
    draw = torch.Generator().manual_seed(0)
    control = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    algorithm, config = algorithm_of(), config_of()
    algorithm.restore(dict(sorted(control.items())))
    (sent,) = algorithm.outgoing(3, dict(sorted(filled(1.0).items())), [Client(2, 0, 10)])
    assert (
        list(sent.tensors)
        == list(config.strategy.down_shapes(config, SHAPES, 3, 0))
        == list(config.strategy.up_shapes(config, SHAPES, 3, 0))
    )
    assert all(torch.equal(sent.tensors[CONTROL + name], control[name]) for name in SHAPES)
    assert set(algorithm.reference(3, sent.tensors)) == set(SHAPES), "changes of control variates come whole"


def test_c_is_the_mean_of_what_the_clients_keep(tmp_path: Path) -> None:
    """A real run with two of eight clients a round; who was not drawn yet has c_i = 0."""
    small = ["federation.rounds=3", "federation.fraction=0.25", "training.max_steps=2", "training.batch_size=2"]
    run = train(load_config(challenge="tiny", settings=["strategy.name=scaffold", *small]).config, out=tmp_path).run
    shared = load_file(run / "state" / "round-0003" / "algorithm.safetensors")
    latest = [max(folder.glob("round-*")) for folder in (run / "state" / "clients").iterdir()]
    assert len(latest) > 2
    own = [load_file(path) for path in latest]
    for name, tensor in shared.items():
        mean = sum(each[f"own_control.{name}"] for each in own) / 8
        torch.testing.assert_close(tensor, mean, rtol=1e-4, atol=1e-6)
    assert max(float(tensor.abs().max()) for tensor in shared.values()) > 0
