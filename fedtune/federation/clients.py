"""Which node is which client: nodes are asked as they come; where a client's node is gone, one that has come later may be it.

A node that joins again with its key is the node that it was. Without a key Flower takes it for a new one, with a new id.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedtune.config.schema import FederationConfig
from fedtune.errors import FederationError
from fedtune.federation.events import ClientsAwaited, ClientsMet, tell
from fedtune.federation.reply_validator import NO_ANSWER, Client, printable
from fedtune.protocol.messages import METRICS, ClientDescription, WireError

_POLL_S = 1.0
_AGAIN_S = 15.0
"""Nodes that are in each other's way, or nobody's, may be started again with other numbers, and are asked again after so long."""
_LATE_S = 60.0
"""A node that comes in the middle of a run may take so long to read its rows; after that it is asked again in the next round."""

Note = Callable[[int, Message, Message], None]
"""Called with a partition, the question that it was asked and its reply."""


class Roster:
    """The clients of a federation and the nodes that they are on."""

    def __init__(self, grid: Grid, federation: FederationConfig, note: Note) -> None:
        """Begin with nobody met.

        Args:
            grid: Where messages go.
            federation: How many clients there are, and how long they may take.
            note: Told of every question that was answered.
        """
        self._grid = grid
        self._wanted = range(federation.clients)
        self._timeout_s = federation.client_timeout_s
        self._note = note
        self._said: dict[int, Client | str] = {}
        """Which client each node says it is, or why it is none."""
        self._clients: dict[int, Client] = {}

    def wait_for_clients(self) -> None:
        """Wait until all clients are there.

        Raises:
            FederationError: they are not within the clients' time limit; or as many nodes are there as there are clients, and
                one of them cannot be any.
        """
        deadline = time.monotonic() + self._timeout_s
        again = time.monotonic() + _AGAIN_S
        told: ClientsAwaited | None = None
        while absent := self._absent(online := set(self._grid.get_node_ids()), deadline - time.monotonic()):
            unfit = [said for node, said in self._said.items() if node in online and isinstance(said, str)]
            late = time.monotonic() > deadline
            doubles = [f"two nodes say they are client {partition}" for partition in self._doubles(online)]
            awaited = ClientsAwaited(absent, len(self._wanted), "; ".join([*unfit[:1], *doubles[:1]]))
            if late or (unfit and len(online) >= len(self._wanted)):
                when = f" after {self._timeout_s:g} s" if late else ""
                raise FederationError(
                    f"Not all clients are there{when}: {awaited}.",
                    hint="Put that right, and go on: fedtune train --resume",
                )
            if awaited != told:
                tell(told := awaited)
            time.sleep(_POLL_S)
            if time.monotonic() > again:
                self._forget_doubtful()
                again = time.monotonic() + _AGAIN_S
        clients = [self._clients[partition] for partition in self._wanted]
        tell(ClientsMet([client.node for client in clients], [client.rows for client in clients]))

    def current(self) -> list[Client]:
        """Return the clients in partition order, each on the node that it is on by now; one that is gone stays on its last."""
        online = set(self._grid.get_node_ids())
        if any(client.node not in online for client in self._clients.values()):
            last = self._clients
            self._clients = dict(last)
            self._forget_doubtful()
            self._ask(online, min(_LATE_S, self._timeout_s))
            self._clients = {**last, **self._clients}
        return [self._clients[partition] for partition in self._wanted]

    def _absent(self, online: set[int], timeout_s: float) -> list[int]:
        """Ask who has come, and return the partitions that nobody is."""
        self._ask(online, max(0.0, timeout_s))
        return [partition for partition in self._wanted if partition not in self._clients]

    def _forget_doubtful(self) -> None:
        """Let nodes that cannot be clients, and those that say they are the same one, be asked again."""
        doubles = self._doubles(self._said.keys())
        self._said = {
            node: said
            for node, said in self._said.items()
            if isinstance(said, Client) and said.partition not in doubles
        }

    def _ask(self, online: set[int], timeout_s: float) -> None:
        """Ask the nodes that have not answered yet, and place the clients anew."""
        questions = {
            node: Message(RecordDict(), node, MessageType.QUERY) for node in sorted(online - self._said.keys())
        }
        for reply in self._grid.send_and_receive(questions.values(), timeout=timeout_s) if questions else ():
            node = reply.metadata.src_node_id
            if reply.has_error() and reply.error.code in NO_ANSWER:
                continue
            said = self._said[node] = self._read(node, reply)
            if isinstance(said, Client):
                # Only the answer says which client the question went to.
                self._note(said.partition, questions[node], reply)
        for partition, client in list(self._clients.items()):
            said_now = self._said.get(client.node, client)
            if client.node not in online or said_now != client:
                del self._clients[partition]
        for node, said in self._said.items():
            if node in online and isinstance(said, Client):
                self._clients.setdefault(said.partition, said)

    def _read(self, node: int, reply: Message) -> Client | str:
        """Return which client a node says it is, or why it is none."""
        if reply.has_error():
            return f"node {node}: {printable(reply.error.reason or 'an error without a reason')}"
        try:
            found = ClientDescription.from_record(reply.content.get(METRICS), len(self._wanted))
        except WireError as error:
            return f"node {node} {error}"
        return Client(node, found.partition, found.rows)

    def _doubles(self, nodes: Collection[int]) -> list[int]:
        """Return which clients more than one of the nodes says it is."""
        said = [self._said[node] for node in nodes if node in self._said]
        counts = Counter(one.partition for one in said if isinstance(one, Client))
        return sorted(partition for partition, count in counts.items() if count > 1)
