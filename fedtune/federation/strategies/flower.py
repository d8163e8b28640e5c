"""An algorithm that is one of Flower's strategies: its public methods make the messages and aggregate the replies.

Sampling is not the strategy's business: it is shown a grid with this round's clients only, and takes all of them. It gets its
arrays in the adapter's order, so that strategies which pair arrays by position pair them by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypedDict

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedtune.budget.count import Shapes
from fedtune.config.schema import FedTuneConfig
from fedtune.errors import FederationError
from fedtune.federation.screen import ARRAYS, CONFIG, METRICS, Accepted, Client
from fedtune.federation.strategies.base import Algorithm, Outgoing
from fedtune.federation.wire import decode, encode
from fedtune.models.adapter import AdapterTensors


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
        """Let the strategy make its messages, and take from them what it orders."""
        by_node = {client.node: client for client in clients}
        messages = self.strategy.configure_train(
            server_round, encode(adapter, "float32"), ConfigRecord(), NodesOfRound(list(by_node))
        )
        sent: dict[int, AdapterTensors] = {}
        found = []
        for message in messages:
            arrays = message.content.array_records[ARRAYS]
            tensors = sent.setdefault(id(arrays), decode(arrays, self.shapes, "float32"))
            orders = {
                key: value for key, value in message.content.config_records[CONFIG].items() if key != "server-round"
            }
            found.append(Outgoing(by_node[message.metadata.dst_node_id], tensors, orders))  # type: ignore[arg-type]
        return sorted(found, key=lambda each: each.client.partition)

    def aggregate(
        self,
        server_round: int,
        adapter: AdapterTensors,  # noqa: ARG002
        replies: Sequence[Accepted],
    ) -> AdapterTensors:
        """Let the strategy aggregate the replies; some compute in float64, the result is float32 again."""
        arrays, _ = self.strategy.aggregate_train(server_round, [_message_of(reply) for reply in replies])
        if arrays is None:
            raise FederationError(f"The strategy aggregated nothing in round {server_round}.")
        float32 = ArrayRecord({name: Array(array.numpy().astype("<f4", copy=False)) for name, array in arrays.items()})
        return decode(float32, self.shapes, "float32")


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


def _message_of(reply: Accepted) -> Message:
    """Return the reply as a strategy wants it: float32 arrays, and of the metrics only those that are averaged."""
    metrics = {"num-examples": reply.metrics["num-examples"], "train-loss": reply.metrics.get("train-loss", 0.0)}
    content = RecordDict({ARRAYS: encode(reply.tensors, "float32"), METRICS: MetricRecord(metrics)})
    answer = Message(content, reply_to=Message(RecordDict(), reply.client.node, MessageType.TRAIN))
    answer.metadata.__dict__["_src_node_id"] = reply.client.node
    return answer
