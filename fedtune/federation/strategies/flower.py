"""An algorithm that is one of Flower's strategies: its public methods make the messages and aggregate the replies.

Sampling is not the strategy's business: it is shown a grid with this round's clients only, and takes all of them. It gets its
arrays in the adapter's order, so that strategies which pair arrays by position pair them by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypedDict

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.serverapp.strategy.fedopt import FedOpt

from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.averages import FedAdagrad, FedAdam, FedYogi
from fedtune.config.strategies.base import Shapes
from fedtune.errors import FederationError
from fedtune.federation.reply_validator import Accepted, Client
from fedtune.federation.strategies.base import Algorithm, Outgoing
from fedtune.models.adapter import AdapterTensors
from fedtune.protocol.arrays import decode, encode
from fedtune.protocol.messages import ARRAYS, CONFIG, METRICS


class Everyone(TypedDict):
    """Settings of Flower's sampling that make a strategy take every node that it is shown."""

    fraction_train: float
    min_train_nodes: int
    min_available_nodes: int


EVERYONE = Everyone(fraction_train=1.0, min_train_nodes=1, min_available_nodes=1)


class OnFlower(Algorithm):
    """An algorithm on a Flower strategy."""

    def __init__(self, config: FedTuneConfig, shapes: Shapes, strategy: Strategy) -> None:
        """Set up on `strategy`."""
        super().__init__(config, shapes)
        self.strategy = strategy

    def outgoing(self, server_round: int, adapter: AdapterTensors, clients: Sequence[Client]) -> list[Outgoing]:
        """Let the strategy make its messages, and take from them what it sends."""
        by_node = {client.node: client for client in clients}
        messages = self.strategy.configure_train(
            server_round, self.record(adapter), ConfigRecord(), NodesOfRound(list(by_node))
        )
        sent: dict[int, AdapterTensors] = {}
        found = []
        for message in messages:
            arrays = message.content.array_records[ARRAYS]
            tensors = sent.setdefault(id(arrays), decode(arrays, self.shapes, "float32"))
            values = {
                key: value for key, value in message.content.config_records[CONFIG].items() if key != "server-round"
            }
            found.append(Outgoing(by_node[message.metadata.dst_node_id], tensors, values))  # type: ignore[arg-type]
        return sorted(found, key=lambda each: each.client.partition)

    def aggregate(self, server_round: int, adapter: AdapterTensors, replies: Sequence[Accepted]) -> AdapterTensors:
        """Let the strategy aggregate the replies; some compute in float64, the result is float32 again.

        Raises:
            FederationError: there are too few replies for the strategy to withstand whom it says it does.
        """
        name, needed = self.config.strategy.name, self.config.strategy.replies_needed
        if len(replies) < needed:
            raise FederationError(
                f"Round {server_round} has {len(replies)} usable replies, and strategy.name = {name} needs {needed}. "
                f"The state after round {server_round - 1} is saved.",
                hint="Once the clients are back: fedtune train --resume",
            )
        messages = [self.message(reply, adapter) for reply in replies]
        arrays, _ = self.strategy.aggregate_train(server_round, messages)
        if arrays is None:
            raise FederationError(f"The strategy aggregated nothing in round {server_round}.")
        return {name: self.tensor(name, arrays, adapter) for name in self.shapes}

    def record(self, tensors: AdapterTensors) -> ArrayRecord:
        """Return the tensors as a strategy wants them: float32 arrays in the adapter's order."""
        return encode({name: tensors[name] for name in self.shapes}, "float32")

    def message(self, reply: Accepted, adapter: AdapterTensors) -> Message:  # noqa: ARG002
        """Return the reply as the strategy wants it."""
        return _message(reply.client.node, self.record(reply.tensors), float(reply.report.examples))

    def tensor(self, name: str, arrays: ArrayRecord, adapter: AdapterTensors) -> torch.Tensor:  # noqa: ARG002
        """Return a tensor of the next adapter from the strategy's result."""
        return torch.from_numpy(arrays[name].numpy()).to(torch.float32)


class OnComparison(OnFlower):
    """On a strategy that compares clients with each other: it is shown their differences from the adapter, in float64.

    Flower has ||x - y||² as ||x||² + ||y||² - 2x·y, which in float32 leaves nothing of the distances between adapters that are
    nearly the same. What a client says of its number of examples is not passed on: a hostile one would claim the most.
    """

    def message(self, reply: Accepted, adapter: AdapterTensors) -> Message:
        """Return the reply's differences from the adapter."""
        differences = {name: reply.tensors[name].double() - adapter[name].double() for name in self.shapes}
        record = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in differences.items()})
        return _message(reply.client.node, record, 1.0)

    def tensor(self, name: str, arrays: ArrayRecord, adapter: AdapterTensors) -> torch.Tensor:
        """Return the adapter's tensor, moved by the strategy's result."""
        return (adapter[name].double() + torch.from_numpy(arrays[name].numpy())).to(torch.float32)


def server_rates(config: FedTuneConfig, options: FedAdam | FedYogi | FedAdagrad) -> tuple[float, float]:
    """Return eta and tau; those that are left open follow what clients do. FedAdagrad's steps shrink, and start larger."""
    share = 1 / 2 if isinstance(options, FedAdagrad) else 1 / 10
    eta = options.eta or config.training.learning_rate_max * config.training.max_steps * share
    return eta, options.tau or eta / 10


class OnMoments(OnFlower):
    """On one of Flower's adaptive optimisers, whose moments are the state; v starts at tau², as the paper has it."""

    strategy: FedOpt

    def __init__(self, config: FedTuneConfig, shapes: Shapes, strategy: FedOpt) -> None:
        """Set up on `strategy`."""
        super().__init__(config, shapes, strategy)
        zero = {name: torch.zeros(shape) for name, shape in shapes.items()}
        strategy.m_t = {name: tensor.numpy() for name, tensor in zero.items()}
        strategy.v_t = {name: (tensor + strategy.tau**2).numpy() for name, tensor in zero.items()}

    def aggregate(self, server_round: int, adapter: AdapterTensors, replies: Sequence[Accepted]) -> AdapterTensors:
        """Step from `adapter` along the first moment, divided by the root of the second."""
        self.strategy.current_arrays = {name: adapter[name].numpy() for name in self.shapes}
        return super().aggregate(server_round, adapter, replies)

    def state(self) -> AdapterTensors:
        """Return both moments by the adapter's names."""
        return {
            f"{moment}.{name}": torch.from_numpy(values)
            for moment in ("m_t", "v_t")
            for name, values in getattr(self.strategy, moment).items()
        }

    def restore(self, state: AdapterTensors) -> None:
        """Take up both moments."""
        for moment in ("m_t", "v_t"):
            setattr(self.strategy, moment, {name: state[f"{moment}.{name}"].numpy() for name in self.shapes})


class NodesOfRound(Grid):
    """The grid as a strategy sees it: this round's clients, nobody else, and no way to send past the ledger."""

    def __init__(self, nodes: Sequence[int]) -> None:
        self._nodes = list(nodes)

    def get_node_ids(self) -> Iterable[int]:
        """Return this round's clients."""
        return list(self._nodes)

    def set_run(self, run: object) -> None:
        """Refused: the run is the engine's business."""
        raise NotImplementedError("a strategy does not set the run")

    @property
    def run(self):  # type: ignore[no-untyped-def]
        """Refused: the run is the engine's business."""
        raise NotImplementedError("a strategy does not need the run")

    def create_message(self, *args: object, **kwargs: object) -> Message:
        """Refused: strategies make their messages themselves."""
        raise NotImplementedError("a strategy makes its messages itself")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Refused: messages go through the ledger."""
        raise NotImplementedError("a strategy sends nothing itself")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Refused: messages go through the ledger."""
        raise NotImplementedError("a strategy receives nothing itself")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Refused: messages go through the ledger."""
        raise NotImplementedError("a strategy sends nothing itself")


def _message(node: int, arrays: ArrayRecord, examples: float) -> Message:
    """Return a reply with what strategies look at."""
    metrics = MetricRecord({"num-examples": examples})
    content = RecordDict({ARRAYS: arrays, METRICS: metrics})
    return Message(content, reply_to=Message(RecordDict(), node, MessageType.TRAIN))
