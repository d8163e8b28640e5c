"""What a client keeps between rounds: the rounding errors that its codec still owes, its control variate, its secret key.

One safetensors file a round, so that a resumed run finds the state as it was before the round that it repeats: a client takes
up the newest state of an earlier round. On the machine of the run the files lie in the run directory, on a data owner's node
where the owner says; elsewhere Flower keeps them with the node, for as long as the run lasts.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from flwr.app import ArrayRecord, Context
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedtune.federation.node import NODE_KEY, NodeSettings
from fedtune.federation.wire import decode, encode
from fedtune.models.adapter import AdapterTensors
from fedtune.runs.atomic import remove_leftovers, write_bytes

_KEPT = 3
"""The last round may be undone, and the state before it be damaged."""
_KEY = "fedtune-round-"


class ClientState:
    """One client's state in one run."""

    def __init__(self, context: Context, partition: int) -> None:
        """Find where the state of `partition` is kept."""
        self.context = context
        self.folder = _folder(context, partition)

    def newest(self) -> AdapterTensors:
        """Return the state after the last round that this client has answered, whichever round comes now."""
        return self.before(max(self._rounds(), default=0) + 1)

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
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # it may hold a key
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


def _folder(context: Context, partition: int) -> Path | None:
    settings, run_dir = context.node_config.get(NODE_KEY), str(context.run_config.get("run-dir", ""))
    if settings is not None:
        # The server names the run; what it writes there decides no path on a node.
        name = hashlib.sha256(str(context.run_config.get("run-name") or context.run_id).encode()).hexdigest()[:32]
        root = NodeSettings.from_json(str(settings)).state
        return Path(root) / name if root else None
    return Path(run_dir) / "state" / "clients" / str(partition) if run_dir else None
