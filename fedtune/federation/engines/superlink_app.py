"""What the superlink engine runs on the SuperLink's machine: fedtune's ServerApp, going on from the run's last state there.

The run directory is `$FEDTUNE_SERVER_RUNS/<name>`, or else `~/.fedtune/runs/<name>`; what happens, and the files, are sent to
who submitted the run (see `mirror.py`).
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from fedtune.errors import FedTuneError, UsageError
from fedtune.federation.engines.run_sync import Mirror, read_copies
from fedtune.federation.events import RunOpened, listening, tell
from fedtune.federation.flower.compat import SUPERLINK_NODE_ID, HttpGrid, runtime_pb2, set_source, task_pb2
from fedtune.federation.server import prepared
from fedtune.federation.workspace import config_json_of, workspace_of
from fedtune.runs.atomic import write_json
from fedtune.runs.directory import RunDirectory
from fedtune.runs.log import forwarded_records, run_log

_LOCK_WAIT_S = 60.0
"""So long may the ServerApp of an interrupted run take to let go of its run directory."""

_POLL_S = 0.5

app = ServerApp()
log = logging.getLogger(__name__)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the context's run config describes, from the last committed round of the run `run-name` on."""
    assert isinstance(grid, HttpGrid)
    config_json = config_json_of(context)
    run = server_run(str(context.run_config["run-name"]))
    run.path.mkdir(parents=True, exist_ok=True)
    mirror = Mirror(run, read_copies(str(context.run_config["fedtune-have"])), _Sender(grid))
    try:
        theirs, ours = str(context.run_config["fedtune-version"]), version("fedtune")
        if theirs != ours:
            raise UsageError(f"fedtune is {ours} here, and the run was submitted by fedtune {theirs}.")
        with (
            _patient_lock(run),
            run_log(run.log_file),
            forwarded_records(lambda record: mirror(replace(record, trace="")), level=logging.WARNING),
            listening(mirror),
        ):
            write_json(run.config_file, workspace_of(config_json).config.model_dump(mode="json"))
            state = run.last_state()
            tell(RunOpened(run.path, int(state.name.removeprefix("round-")) if state else 0))
            try:
                rounds = prepared(PromptGrid(grid), config_json, run)
                mirror.sync()
                rounds.run_rounds()
            except Exception:
                log.debug("The server ended with an error.", exc_info=True)
                raise
            finally:
                with suppress(Exception):  # the error that is on its way says more
                    mirror.sync()
    except FedTuneError as error:
        mirror.fail(error)
        raise


def server_run(name: str) -> RunDirectory:
    """Return the directory of a submitted run on this machine.

    Raises:
        UsageError: the name is none for a folder.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", name):
        raise UsageError(f"{name!r} is no name for a run.")
    root = os.environ.get("FEDTUNE_SERVER_RUNS")
    return RunDirectory((Path(root) if root else Path.home() / ".fedtune" / "runs") / name)


class _Sender:
    """Sends JSON objects to who follows the run, as events of this task."""

    def __init__(self, grid: HttpGrid) -> None:
        self._grid = grid

    def __call__(self, text: str) -> None:
        self._grid._runtime_client.PushTaskEvents(
            runtime_pb2.PushTaskEventsRequest(events=[task_pb2.TaskEvent(event="fedtune", data=text)])
        )


class PromptGrid(Grid):
    """Flower's grid, whose replies are yielded as they come, and whose errors name the node that they are about.

    Flower's own looks every three seconds and returns all replies at the end; and for a node that is gone it is the SuperLink
    that replies, under its own id.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run: object) -> None:
        """Refused: Flower has set it."""
        raise NotImplementedError("the run is set")

    @property
    def run(self):  # type: ignore[no-untyped-def]
        """The run."""
        return self._grid.run

    def create_message(self, *args: object, **kwargs: object) -> Message:
        """Refused: messages are made without a grid."""
        raise NotImplementedError("make a Message")

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes that are connected."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; returns their ids."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have come to the messages of the given ids."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send all messages, and yield each reply as soon as it is there, until `timeout` seconds are over."""
        sent = list(messages)
        nodes = dict(zip(self.push_messages(sent), (message.metadata.dst_node_id for message in sent), strict=True))
        until = None if timeout is None else time.monotonic() + timeout
        while nodes and (until is None or time.monotonic() < until):
            replies = list(self.pull_messages(set(nodes)))
            for reply in replies:
                node = nodes.pop(reply.metadata.reply_to_message_id, None)
                if node is not None and reply.has_error() and reply.metadata.src_node_id == SUPERLINK_NODE_ID:
                    set_source(reply, node)
                yield reply
            if not replies:
                time.sleep(_POLL_S)


@contextmanager
def _patient_lock(run: RunDirectory) -> Iterator[None]:
    """Hold the run, waiting for an ending ServerApp to let go of it."""
    deadline = time.monotonic() + _LOCK_WAIT_S
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(run.lock())
                break
            except UsageError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)
        yield
