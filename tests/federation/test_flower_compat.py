"""Every private name of Flower that fedtune uses is there, and does what fedtune relies on."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
from flwr.app import Message, MessageType, RecordDict

from fedtune.federation.flower import compat

PACKAGE = Path(compat.__file__).parents[2]
PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp")
FIELDS = {
    "ErrorCode": ("CLIENT_APP_RAISED_EXCEPTION", "CLIENT_APP_CRASHED", "NODE_UNAVAILABLE", "MESSAGE_UNAVAILABLE"),
    "Status": ("FINISHED",),
    "SubStatus": ("COMPLETED", "FAILED", "STOPPED"),
    "TaskIdentity": ("_run_id", "_node_id", "_task_id", "run_id", "node_id", "task_id"),
    "Run": ("create_empty",),
}
"""Attributes that fedtune uses."""
PARAMETERS = {
    "parse_address": 1,
    "fab_to_proto": 1,
    "user_config_to_proto": 1,
    "metadata_to_proto": 1,
    "get_flwr_home": 0,
    "get_fab_config": 1,
}
"""Positional arguments with which fedtune calls a function."""


@pytest.mark.parametrize("name", compat.NAMES)
def test_the_name_is_there(name: str) -> None:
    found = getattr(compat, name)
    for attribute in FIELDS.get(name, ()):
        assert attribute in {*dir(found), *dir(type(found))}, f"{name}.{attribute}"
    if name in PARAMETERS:
        inspect.signature(found).bind(*[None] * PARAMETERS[name])


@pytest.mark.usefixtures("flower_identity")
def test_ids_that_are_set_are_what_flower_reads() -> None:
    message = Message(RecordDict(), 5, MessageType.TRAIN)
    compat.set_message_id(message, "an id")
    compat.set_source(message, 7)
    assert (message.metadata.message_id, message.metadata.src_node_id) == ("an id", 7)


def test_a_message_takes_run_and_source_from_the_identity() -> None:
    with compat.identity(3, 4):
        message = Message(RecordDict(), 5, MessageType.TRAIN)
        assert (message.metadata.run_id, message.metadata.src_node_id) == (3, 4)


def test_no_other_module_imports_a_private_name() -> None:
    found = []
    for path in PACKAGE.rglob("*.py"):
        if path == Path(compat.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [
                f"{path.relative_to(PACKAGE)}: {module}"
                for module in modules
                if module.split(".")[0] == "flwr" and not module.startswith(PUBLIC)
            ]
    assert found == []
