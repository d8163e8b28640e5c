"""Every private name of Flower that fedtune uses, in one place.

`from fedtune.federation.flower.compat import Fab` imports the module of Flower only when the name is used. Names that Flower
documents (flwr.app, flwr.clientapp, flwr.serverapp) are imported where they are used. A contract test checks each name here, so
that a change in Flower fails with the name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.cli.build import build_fab_from_files as build_fab_from_files
    from flwr.cli.constant import FLOWER_CONFIG_FILE as FLOWER_CONFIG_FILE
    from flwr.cli.flower_config import read_superlink_connection as read_superlink_connection
    from flwr.cli.typing import SuperLinkConnection as SuperLinkConnection
    from flwr.cli.utils import init_http_client_from_connection as init_http_client_from_connection
    from flwr.common.config import get_fab_config as get_fab_config
    from flwr.common.constant import SUPERLINK_NODE_ID as SUPERLINK_NODE_ID
    from flwr.common.constant import ErrorCode as ErrorCode
    from flwr.common.constant import Status as Status
    from flwr.common.constant import SubStatus as SubStatus
    from flwr.common.serde import fab_to_proto as fab_to_proto
    from flwr.common.serde import user_config_to_proto as user_config_to_proto
    from flwr.common.serde_utils import metadata_to_proto as metadata_to_proto
    from flwr.proto import control_pb2 as control_pb2
    from flwr.proto import message_pb2 as message_pb2
    from flwr.proto import run_pb2 as run_pb2
    from flwr.proto import runtime_pb2 as runtime_pb2
    from flwr.proto import task_pb2 as task_pb2
    from flwr.supercore import interceptors as interceptors
    from flwr.supercore.address import parse_address as parse_address
    from flwr.supercore.app_utils import start_parent_process_monitor as start_parent_process_monitor
    from flwr.supercore.constant import TaskType as TaskType
    from flwr.supercore.control import ControlHttpClient as ControlHttpClient
    from flwr.supercore.error import ApiErrorCode as ApiErrorCode
    from flwr.supercore.error import FlowerError as FlowerError
    from flwr.supercore.fab import Fab as Fab
    from flwr.supercore.heartbeat import HeartbeatSender as HeartbeatSender
    from flwr.supercore.protobuf.client import ProtobufClientInterceptor as ProtobufClientInterceptor
    from flwr.supercore.run import Run as Run
    from flwr.supercore.runtime import RuntimeHttpClient as RuntimeHttpClient
    from flwr.supercore.task_identity import TaskIdentity as TaskIdentity
    from flwr.supercore.utils import get_flwr_home as get_flwr_home
    from flwr.superlink.grid import HttpGrid as HttpGrid
    from flwr.supernode import start_client_internal as start_client_internal
    from flwr.supernode.cli.flower_supernode import flower_supernode as flower_supernode
    from flwr.supernode.runtime.run_clientapp import pull_task_input as pull_task_input
    from flwr.supernode.runtime.run_clientapp import push_message as push_message
    from flwr.supernode.runtime.run_clientapp import push_task_output as push_task_output

NAMES = {
    "build_fab_from_files": "flwr.cli.build",
    "FLOWER_CONFIG_FILE": "flwr.cli.constant",
    "read_superlink_connection": "flwr.cli.flower_config",
    "SuperLinkConnection": "flwr.cli.typing",
    "init_http_client_from_connection": "flwr.cli.utils",
    "get_fab_config": "flwr.common.config",
    "SUPERLINK_NODE_ID": "flwr.common.constant",
    "ErrorCode": "flwr.common.constant",
    "Status": "flwr.common.constant",
    "SubStatus": "flwr.common.constant",
    "fab_to_proto": "flwr.common.serde",
    "user_config_to_proto": "flwr.common.serde",
    "metadata_to_proto": "flwr.common.serde_utils",
    "control_pb2": "flwr.proto",
    "message_pb2": "flwr.proto",
    "run_pb2": "flwr.proto",
    "runtime_pb2": "flwr.proto",
    "task_pb2": "flwr.proto",
    "interceptors": "flwr.supercore",
    "parse_address": "flwr.supercore.address",
    "start_parent_process_monitor": "flwr.supercore.app_utils",
    "TaskType": "flwr.supercore.constant",
    "ControlHttpClient": "flwr.supercore.control",
    "ApiErrorCode": "flwr.supercore.error",
    "FlowerError": "flwr.supercore.error",
    "Fab": "flwr.supercore.fab",
    "HeartbeatSender": "flwr.supercore.heartbeat",
    "ProtobufClientInterceptor": "flwr.supercore.protobuf.client",
    "Run": "flwr.supercore.run",
    "RuntimeHttpClient": "flwr.supercore.runtime",
    "TaskIdentity": "flwr.supercore.task_identity",
    "get_flwr_home": "flwr.supercore.utils",
    "HttpGrid": "flwr.superlink.grid",
    "start_client_internal": "flwr.supernode",
    "flower_supernode": "flwr.supernode.cli.flower_supernode",
    "pull_task_input": "flwr.supernode.runtime.run_clientapp",
    "push_message": "flwr.supernode.runtime.run_clientapp",
    "push_task_output": "flwr.supernode.runtime.run_clientapp",
}
"""Each name and the module of Flower's that holds it."""


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(name)
    holder = import_module(NAMES[name])
    return getattr(holder, name) if hasattr(holder, name) else import_module(f"{NAMES[name]}.{name}")


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message an id, which Flower leaves to the code that sends it."""
    message.metadata.__dict__["_message_id"] = message_id


def set_source(message: Message, node_id: int) -> None:
    """Name the node that a reply comes from, which Flower leaves to the node that sends it."""
    message.metadata.__dict__["_src_node_id"] = node_id


@contextmanager
def identity(run_id: int, node_id: int) -> Iterator[None]:
    """Tell Flower who this process is: a message takes its run and source from there. Flower's own engines do the same."""
    identity: Any = __getattr__("TaskIdentity")
    before = identity._run_id, identity._node_id, identity._task_id
    identity.run_id, identity.node_id, identity.task_id = run_id, node_id, 0
    try:
        yield
    finally:
        identity._run_id, identity._node_id, identity._task_id = before
