"""The in-process engine: a Flower Grid whose clients run one after another in this process, on one resident base.

It uses the same messages, ServerApp and ClientApp as every other engine, without Ray or sockets. A client's exception becomes
an error reply, as on a real node.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedtune.config.schema import FedTuneConfig
from fedtune.errors import ClientError, FedTuneError
from fedtune.federation.engines.base import Engine
from fedtune.federation.flower import compat
from fedtune.federation.flower.compat import ErrorCode, Run, set_message_id, set_source
from fedtune.federation.node.policy import ERRORS_PASS, error_text
from fedtune.runs.atomic import DISK_ERRORS, os_error_in
from fedtune.runs.directory import RunDirectory
from fedtune.runs.log import reroute_libraries

log = logging.getLogger(__name__)

_RUN_ID = 1
_SERVER_NODE = 1
_FIRST_CLIENT_NODE = 2


class InProcessGrid(Grid):
    """A Grid whose nodes are `clients` ClientApps in this process; a node's id is its partition id plus two."""

    def __init__(self, client_app: ClientApp, clients: int, run_config: dict[str, str]) -> None:
        self._app = client_app
        self._run = Run.create_empty(_RUN_ID)
        self._replies: dict[str, Message] = {}
        self._contexts = {
            partition + _FIRST_CLIENT_NODE: Context(
                run_id=_RUN_ID,
                node_id=partition + _FIRST_CLIENT_NODE,
                node_config={"partition-id": partition, "num-partitions": clients, ERRORS_PASS: True},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for partition in range(clients)
        }

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Create a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes; no node ever leaves."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run the clients that the messages are for, and keep their replies."""
        ids = []
        for reply in self.send_and_receive(messages):
            ids.append(reply.metadata.reply_to_message_id)
            self._replies[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to the messages of the given ids, each once."""
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,  # noqa: ARG002
    ) -> Iterator[Message]:
        """Yield each client's reply as soon as it is there; a client's own training loop keeps the time limit."""
        for message in messages:
            context = self._accept(message)
            yield self._from_node(run_client(self._app, message, context), message)

    def _accept(self, message: Message) -> Context:
        """Give a message its id, and return the context of the node that it is for."""
        set_message_id(message, uuid4().hex)
        return self._contexts[message.metadata.dst_node_id]

    def _from_node(self, reply: Message, message: Message) -> Message:
        """Return a reply with its source, which Flower leaves to the node that sends it."""
        set_source(reply, message.metadata.dst_node_id)
        return reply


def run_client(app: ClientApp, message: Message, context: Context) -> Message:
    """Run one client and return its reply; an exception of the client becomes an error reply.

    Raises:
        FedTuneError: the data or the base cannot be used. No other client would fare better.
        OSError, or what a library made of it: the disk that all clients write to is full or failing.
    """
    try:
        return app(message, context)
    except Exception as error:
        if isinstance(error, FedTuneError) and not isinstance(error, ClientError):
            raise
        if (trouble := os_error_in(error)) is not None and trouble.errno in DISK_ERRORS:
            raise
        log.debug("Client %s failed.", context.node_config["partition-id"], exc_info=True)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, error_text(error)), reply_to=message)


def identity() -> AbstractContextManager[None]:
    """Tell Flower that this process is the server of the in-process run."""
    return compat.identity(_RUN_ID, _SERVER_NODE)


def run_config_of(config: FedTuneConfig, run: RunDirectory) -> dict[str, str]:
    """Return the run config that the ServerApp and the ClientApp read."""
    return {"fedtune-config": config.model_dump_json(), "run-dir": str(run.path)}


def run_server(grid: Grid, run_config: dict[str, str]) -> None:
    """Run the ServerApp in this process; return when it does, raise what it raises."""
    from fedtune.federation import server

    context = Context(
        run_id=_RUN_ID, node_id=_SERVER_NODE, node_config={}, state=RecordDict(), run_config=dict(run_config)
    )
    with identity(), reroute_libraries():  # Flower has been imported by now, and prints lines of progress
        server.app(grid, context)


class InProcessEngine(Engine, name="in-process"):
    """Runs the clients of a round one after another in this process."""

    def run(self, config: FedTuneConfig, run: RunDirectory) -> None:
        """Run the remaining rounds."""
        from fedtune.federation import client

        run_config = run_config_of(config, run)
        run_server(InProcessGrid(client.app, config.federation.clients, run_config), run_config)
