"""SCAFFOLD: clients correct their gradients by how their own differ from the others'.

Karimireddy et al., https://arxiv.org/abs/1910.06378. Client i adds c - c_i to every gradient, where c_i is the mean of its own
gradients when it last took part and c the mean of all clients' c_i. With plain SGD that mean is the paper's option II,
c_i - c + (x - y_i) / (K · eta); as a mean of gradients it also holds under Adam and clipping. The server steps along the clients'
mean update and moves c by the mean change of the c_i times |S| / N.

Example: c = 1, c_i = 0, gradients 2 and 4: the steps use 3 and 5, the new c_i is (2 + 4) / 2 = 3, its change 3. With two of four
clients, whose changes are 3 and 1, c becomes 1 + (2 / 4) · 2 = 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.base import Shapes
from fedtune.config.strategies.scaffold import CONTROL
from fedtune.config.strategies.scaffold import Scaffold as Options
from fedtune.federation.reply_validator import Accepted, Client
from fedtune.federation.strategies.base import Algorithm, Outgoing, weighted_mean
from fedtune.models.adapter import AdapterTensors

_OWN = "own_control."


class Scaffold(Algorithm):
    """The server's part: the control variate c."""

    def __init__(self, config: FedTuneConfig, shapes: Shapes, options: Options) -> None:
        """Set up with c = 0."""
        super().__init__(config, shapes)
        self.step = options.server_learning_rate
        self.control = {name: torch.zeros(shape) for name, shape in shapes.items()}

    def outgoing(self, server_round: int, adapter: AdapterTensors, clients: Sequence[Client]) -> list[Outgoing]:
        """Send the adapter and c."""
        held = adapter | {CONTROL + name: tensor for name, tensor in self.control.items()}
        wanted = self.config.strategy.down_shapes(self.config, self.shapes, server_round, clients[0].partition)
        tensors = {name: held[name] for name in wanted}  # packed messages have no names: the order is what counts
        return [Outgoing(client, tensors) for client in clients]

    def reference(self, server_round: int, read: AdapterTensors) -> AdapterTensors:  # noqa: ARG002
        """Changes of control variates come whole."""
        return {name: read[name] for name in self.shapes}

    def aggregate(
        self,
        server_round: int,  # noqa: ARG002
        adapter: AdapterTensors,
        replies: Sequence[Accepted],
    ) -> AdapterTensors:
        """Step along the mean update, every client counting the same, and move c."""
        found, equal = [reply.tensors for reply in replies], [1 / len(replies)] * len(replies)
        mean = weighted_mean(found, equal, self.shapes)
        changes = weighted_mean(found, equal, [CONTROL + name for name in self.shapes])
        share = len(replies) / self.config.federation.clients
        self.control = {name: tensor + share * changes[CONTROL + name] for name, tensor in self.control.items()}
        return {name: tensor + self.step * (mean[name] - tensor) for name, tensor in adapter.items()}

    def state(self) -> AdapterTensors:
        """Return c."""
        return self.control

    def restore(self, state: AdapterTensors) -> None:
        """Take up c."""
        self.control = state


class Control:
    """A client's part in one round: corrects every step's gradient, and averages the gradients for its new c_i."""

    def __init__(self, shared: AdapterTensors, own: AdapterTensors) -> None:
        """Set up with c and c_i by the adapter's names."""
        self.shared, self.own = shared, own
        self.sums: dict[str, torch.Tensor] = {}
        self.steps = 0

    @torch.no_grad()
    def __call__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Take note of the parameters' gradients, and add c - c_i to them."""
        self.steps += 1
        for name, parameter in parameters.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self.sums[name] = gradient.clone() if name not in self.sums else self.sums[name].add_(gradient)
            correction = (self.shared[name] - self.own[name]).to(parameter.device)
            parameter.grad = gradient + correction

    def changes(self) -> AdapterTensors:
        """Return the change of c_i under the names that it travels by."""
        return {CONTROL + name: tensor - self.own[name] for name, tensor in self._new().items()}

    def kept(self) -> AdapterTensors:
        """Return the new c_i under the names of the client's state."""
        return {_OWN + name: tensor for name, tensor in self._new().items()}

    def _new(self) -> AdapterTensors:
        return {name: (tensor / self.steps).cpu() for name, tensor in self.sums.items()}


def client_part(received: AdapterTensors, kept: AdapterTensors) -> Control:
    """Return the client's part; c_i is 0 for a client that takes part for the first time."""
    shared = {name.removeprefix(CONTROL): each for name, each in received.items() if name.startswith(CONTROL)}
    own = {name: kept.get(_OWN + name, torch.zeros_like(tensor)) for name, tensor in shared.items()}
    return Control(shared, own)


def build(config: FedTuneConfig, shapes: Shapes) -> Algorithm:
    """Return SCAFFOLD with the config's server learning rate."""
    assert isinstance(config.strategy, Options)
    return Scaffold(config, shapes, config.strategy)
