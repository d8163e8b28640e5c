"""What a client keeps between rounds: the rounding errors of its codec, its control variate.

One safetensors file a round, so that a resumed run finds the state as it was before the round that it repeats: a client takes
up the newest state of an earlier round. On the machine of the run the files lie in the run directory, on a data owner's node
where the owner says; elsewhere Flower keeps them with the node, for as long as the run lasts.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from flwr.app import ArrayRecord, Context
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedtune.federation.node.policy import NODE_KEY, NodeSettings
from fedtune.models.adapter import AdapterTensors
from fedtune.protocol.arrays import decode, encode
from fedtune.runs.atomic import remove_leftovers, write_bytes
from fedtune.runs.directory import RunDirectory

_KEPT = 3
"""The last round may be undone, and the state before it be damaged."""
_KEY = "fedtune-round-"


class ClientState:
    """One client's state in one run."""

    def __init__(self, context: Context, partition: int) -> None:
        """Find where the state of `partition` is kept."""
        self.context = context
        self.folder = _folder(context, partition)

    def before(self, server_round: int) -> AdapterTensors:
        """Return the newest state of a round before `server_round`, empty where there is none."""
        for number in sorted((number for number in self._rounds() if number < server_round), reverse=True):
            if self.folder is None:
                record = self.context.state.array_records[f"{_KEY}{number}"]
                return decode(record, {name: tuple(array.shape) for name, array in record.items()}, "float32")
            try:
                tensors: AdapterTensors = load((self.folder / f"round-{number:04d}.safetensors").read_bytes())
                return tensors
            except (SafetensorError, OSError):  # damaged: the one before it is closer to the truth than none
                continue
        return {}

    def keep(self, server_round: int, tensors: AdapterTensors) -> None:
        """Keep `tensors` as the state after `server_round`, whole or not at all; later rounds, if there are any, are undone."""
        if self.folder is None:
            self.context.state[f"{_KEY}{server_round}"] = encode(tensors, "float32")
        else:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # it follows from the client's data
            remove_leftovers(self.folder)
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            write_bytes(self.folder / f"round-{server_round:04d}.safetensors", save(contiguous))
        rounds = self._rounds()
        for number in {*rounds} - {*sorted(number for number in rounds if number <= server_round)[-_KEPT:]}:
            if self.folder is None:
                del self.context.state[f"{_KEY}{number}"]
            else:
                (self.folder / f"round-{number:04d}.safetensors").unlink(missing_ok=True)

    def _rounds(self) -> list[int]:
        if self.folder is not None:
            return [int(path.stem.removeprefix("round-")) for path in self.folder.glob("round-*.safetensors")]
        return [
            int(name.removeprefix(_KEY))
            for name, record in self.context.state.items()
            if name.startswith(_KEY) and isinstance(record, ArrayRecord)
        ]


def state_of_node(context: Context) -> Path | None:
    """Return the folder of state that a data owner's node was given; None where there is none, or no such node."""
    settings = context.node_config.get(NODE_KEY)
    state = None if settings is None else NodeSettings.from_json(str(settings)).state
    return None if state is None else Path(state)


def _folder(context: Context, partition: int) -> Path | None:
    if NODE_KEY in context.node_config:
        # The server names the run; what it writes there decides no path on a node. Nodes of several clients may share a folder.
        run = str(context.run_config.get("run-name") or context.run_id)
        name = hashlib.sha256(json.dumps([run, partition]).encode()).hexdigest()[:32]
        root = state_of_node(context)
        return None if root is None else root / name
    run_dir = str(context.run_config.get("run-dir", ""))
    return RunDirectory(Path(run_dir)).client_state(partition) if run_dir else None
