"""A node: Flower's SuperNode as a child for the network, and this process for the training.

A SuperNode by itself unpacks the bundle that comes with a run and runs the code in it. Here it is told to leave the running to
somebody else (`--isolation process`), and that is this process: it answers every message with the ClientApp of the installed
fedtune, and never unpacks a bundle. The base model stays in memory from message to message.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import httpx
from flwr.app import Context, Error, Message

from fedtune.errors import ClientError, FederationError, MissingError
from fedtune.federation import client as clientapp
from fedtune.federation.account import AccountBook
from fedtune.federation.flower.compat import (
    ErrorCode,
    Fab,
    HeartbeatSender,
    ProtobufClientInterceptor,
    RuntimeHttpClient,
    SubStatus,
    TaskType,
    get_fab_config,
    interceptors,
    pull_task_input,
    push_message,
    push_task_output,
    runtime_pb2,
)
from fedtune.federation.node.policy import NODE_KEY, NodeSettings, error_text
from fedtune.runs.log import LOG_NAME, run_log

log = logging.getLogger(__name__)

CLIENT_APP = "fedtune.federation.client:app"
"""The one ClientApp that a node runs, and that a bundle must name."""

_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_POLL_S = 0.5
_REJOIN_S = 2.0
_END_S = 15.0
"""How long an ending SuperNode may take to say goodbye to its SuperLink."""

_CHILD = "fedtune.federation.node.process"


def run_node(
    settings: NodeSettings, *, superlink: str, partition: int, ca: Path | None, key: Path | None, insecure: bool
) -> None:
    """Take part in the runs of a SuperLink until interrupted.

    Args:
        settings: What the data's owner decided.
        superlink: Address of the SuperLink, `host:port`.
        partition: This client's number in the federation, from 0.
        ca: Certificate that signed the SuperLink's; None takes the system's.
        key: Private key that the SuperLink knows this node by; None lets the node register itself.
        insecure: Speak without TLS.

    Raises:
        FederationError: the SuperNode could not join, or failed.
        MissingError: the privacy account cannot be read, and the owner insists on local privacy.
    """
    _open_account(settings)
    with run_log(Path(settings.state) / LOG_NAME, mode=0o600) if settings.state else nullcontext():
        log.info("fedtune %s answers %s as client %d.", version("fedtune"), superlink, partition)
        _take_part(settings, superlink, partition, ca, key, insecure)


def _open_account(settings: NodeSettings) -> None:
    """Make or read the privacy account before the first run asks for it."""
    if settings.state is None:
        return
    try:
        AccountBook(Path(settings.state)).open()
    except MissingError as error:
        if settings.insists_on_local_privacy:
            raise
        log.warning("%s Until then this node refuses runs with local privacy.", error)


def _take_part(
    settings: NodeSettings, superlink: str, partition: int, ca: Path | None, key: Path | None, insecure: bool
) -> NoReturn:
    flags = ["--superlink", superlink, "--node-config", f"partition-id={partition}"]
    flags += ["--insecure"] if insecure else []
    flags += ["--root-certificates", str(ca)] if ca else []
    flags += ["--auth-supernode-private-key", str(key)] if key else []
    while True:
        secret, address = secrets.token_bytes(32), f"127.0.0.1:{_free_port()}"
        with _supernode(flags, address, secret) as child:
            _serve(address, secret, settings, child)
        if child.returncode:
            raise FederationError(
                f"The SuperNode ended with code {child.returncode}; its last lines above say why.",
                hint="Put that right, and run the same command again.",
            )
        # A SuperLink that was started anew no longer knows its nodes, and a SuperNode that is told so ends with 0.
        log.warning("The SuperLink no longer knows this node: joining it again.")
        time.sleep(_REJOIN_S)


def _free_port() -> int:
    """Return a TCP port of this machine on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def _supernode(flags: Sequence[str], address: str, secret: bytes) -> Iterator[subprocess.Popen[bytes]]:
    """Start a SuperNode whose tasks are handed out at `address` to who knows `secret`; end it on the way out."""
    host, port = address.split(":")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "secret"
        file.write_bytes(secret)
        runtime = ["--isolation", "process", "--host", host, "--port", port, "--superexec-auth-secret-file", str(file)]
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", _CHILD, str(os.getpid()), *flags, *runtime],
            stdin=subprocess.DEVNULL,
            # Nobody need know of a data owner's runs; who wants Flower's telemetry or its news sets these to otherwise.
            env={"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", **os.environ},
        )
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(_END_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _serve(address: str, secret: bytes, settings: NodeSettings, child: subprocess.Popen[bytes]) -> None:
    """Answer the SuperNode's messages one after another while it lives."""
    door = interceptors.SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=[_ACQUIRE])
    superexec = _client(address, door)
    request = runtime_pb2.AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
    try:
        while child.poll() is None:
            try:
                found = superexec.AcquireTask(request)
            except httpx.TransportError:  # the SuperNode is not up yet, or it has gone
                found = runtime_pb2.AcquireTaskResponse()
            if found.token:
                try:
                    _answer_task(address, found.token, settings)
                except Exception:  # without a heartbeat, the SuperNode answers it with an error of its own
                    log.exception("This message could not be answered:")
            else:
                time.sleep(_POLL_S)
    finally:
        superexec.close()


def _answer_task(address: str, token: str, settings: NodeSettings) -> None:
    """Fetch the message of one task, answer it, and hand the answer to the SuperNode."""
    client = _client(address, interceptors.RuntimeTokenHttpInterceptor(token))

    def beat() -> bool:
        try:
            client.SendTaskHeartbeat(runtime_pb2.SendTaskHeartbeatRequest())
        except httpx.HTTPError:
            return False
        return True

    heart = HeartbeatSender(beat)
    heart.start()
    try:
        message, context, _, fab = pull_task_input(client)
        reply = answer(message, context, fab, settings)
        push_message(client, reply, context)
        push_task_output(client, context, SubStatus.COMPLETED, "")
    finally:
        heart.stop()
        client.close()


def answer(message: Message, context: Context, fab: Fab, settings: NodeSettings) -> Message:
    """Return the ClientApp's reply to a message, or an error reply that holds nothing of the node's.

    Args:
        message: What the server sent.
        context: The run as the SuperNode knows it.
        fab: The run's bundle; only its name of a ClientApp is read.
        settings: What the data's owner decided.
    """
    context.node_config[NODE_KEY] = settings.to_json()
    try:
        named = get_fab_config(fab.content)["tool"]["flwr"]["app"]["components"].get("clientapp")
        if named != CLIENT_APP:
            raise ClientError("The run's bundle is of another app than fedtune, and this node runs nothing else.")
        return clientapp.app(message, context)
    except Exception as error:
        if isinstance(error, ClientError):
            log.error("Not done: %s", error.__cause__ or error)
        else:
            log.exception("Not done, and the server is told no more than %s:", type(error).__name__)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, error_text(error)), reply_to=message)


def _client(address: str, interceptor: ProtobufClientInterceptor) -> RuntimeHttpClient:
    """Return a client for the SuperNode's own door, which is on this machine and without TLS."""
    version = interceptors.RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
    return RuntimeHttpClient.from_server_address(address, True, None, [version, interceptor])
