"""What the ray engine runs in Flower's processes: fedtune's own ServerApp and ClientApp, which tell it what happens.

They write to the engine's private Flower home, on the same disk: each event as a line, and at the end how the run ended.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import cast

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import InMemoryGrid

from fedtune.errors import ClientError, FedTuneError
from fedtune.federation import client, server
from fedtune.federation.engines import ray_pool  # noqa: F401  # puts its pool in the place of Flower's
from fedtune.federation.engines.ray import ACTORS, EVENTS, HOME, OUTCOME, SERVER, patience_s
from fedtune.federation.events import Event, listening
from fedtune.federation.node.policy import ERRORS_PASS, error_text
from fedtune.federation.workspace import config_json_of, workspace_of
from fedtune.runs.atomic import write_json
from fedtune.runs.directory import RunDirectory
from fedtune.runs.log import forwarded_records, run_log

log = logging.getLogger(__name__)


class PatientGrid(InMemoryGrid):
    """Flower's grid in memory; its time limit is one client's, not that of all in a queue, and it yields replies as they come."""

    def __init__(self, grid: InMemoryGrid, actors: int) -> None:
        self._run, self.state, self.node, self.pull_interval = grid._run, grid.state, grid.node, grid.pull_interval
        self._actors = actors

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send all messages, and yield each reply as soon as it is there."""
        waiting = set(self.push_messages(messages))
        until = None if timeout is None else monotonic() + patience_s(len(waiting), self._actors, timeout)
        while waiting and (until is None or monotonic() < until):
            replies = list(self.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in replies}
            yield from replies
            if not replies:
                sleep(self.pull_interval)


class LoadingClientApp(ClientApp):
    """The ClientApp; its errors leave it as they do in process, and its steps are told to the engine."""

    def load(self, message: None, context: Context) -> None:  # noqa: ARG002
        """Load what a client needs, once in an actor's life."""
        with _logged(context):
            try:
                workspace_of(config_json_of(context)).adapted  # noqa: B018
            except FedTuneError as error:
                log.debug("The base model could not be loaded.", exc_info=True)
                _write_outcome(_home(context), error)
                raise

    def __call__(self, message: Message, context: Context) -> Message:
        """Run one client."""
        context.node_config[ERRORS_PASS] = True
        with _logged(context), listening(partial(_write_event, _home(context))):
            try:
                return client.app(message, context)
            except Exception as error:
                log.debug("Client %s failed.", context.node_config["partition-id"], exc_info=True)
                if isinstance(error, FedTuneError) and not isinstance(error, ClientError):
                    _write_outcome(_home(context), error)  # no client's fault: no other would fare better
                    raise
                reason = error_text(error)
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


client_app = LoadingClientApp()
server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run fedtune's ServerApp, and leave behind how it ended."""
    home = _home(context)
    write_json(home / SERVER, {"pid": os.getpid()})
    try:
        with _logged(context), listening(partial(_write_event, home)):
            server.app(PatientGrid(cast(InMemoryGrid, grid), int(context.run_config[ACTORS])), context)
    except BaseException as error:
        _write_outcome(home, error)
        raise
    _write_outcome(home, None)


@contextmanager
def _logged(context: Context) -> Iterator[None]:
    """Log to the run's own file, and send fedtune's records to the process whose user follows the run."""
    file = RunDirectory(Path(str(context.run_config["run-dir"]))).log_file
    with run_log(file), forwarded_records(partial(_write_event, _home(context))):
        yield


def _home(context: Context) -> Path:
    return Path(str(context.run_config[HOME]))


def _write_event(home: Path, event: Event) -> None:
    line = json.dumps({"event": type(event).__name__, **asdict(event)}, default=str)
    with (home / EVENTS).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _write_outcome(home: Path, error: BaseException | None) -> None:
    """Leave behind how the run ended, unless that is known already."""
    if (home / OUTCOME).exists():
        return
    outcome = {"error": "", "message": "", "hint": ""}
    if error is not None:
        message, hint = (error.message, error.hint) if isinstance(error, FedTuneError) else (str(error), "")
        outcome = {"error": type(error).__name__, "message": message, "hint": hint}
    write_json(home / OUTCOME, outcome)
