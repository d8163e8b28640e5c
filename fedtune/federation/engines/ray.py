"""The ray engine: Flower's simulation, for several GPUs or many cores of one machine.

`flwr run` on a SuperLink of our own, with a private home and port. The ServerApp runs in a process of Flower's, the clients in
actors of Ray's, each with one resident base; the run directory is the same as in process, and so are the bits.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import time
from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from fedtune import errors
from fedtune.config.schema import FederationConfig, FedTuneConfig
from fedtune.errors import ConfigError, FederationError, FedTuneError, MissingError, Problem, UsageError
from fedtune.federation import events
from fedtune.federation.flower.home import CONNECTION, flower_home, free_port
from fedtune.runs.directory import RunDirectory
from fedtune.runs.log import Logged

HOME, ACTORS, TIMEOUT = "home", "actors", "client-timeout-s"
"""Keys of the run config, beside those of every engine."""

EVENTS, OUTCOME, SERVER = "events.jsonl", "outcome.json", "server.json"
"""Files in the home: what happens; how it ended; which process the server is."""

LOADING_S = 1800.0
"""How long a process may take to start and load the base, which is not the client's time."""

GRACE_S = 5.0
"""A client that notices itself that its time is over says so in this time; others are killed."""

_STARTING_S = 300.0
"""How long Flower may take until the ServerApp runs."""

_LOOK_EVERY_S = 0.1


@dataclass(frozen=True)
class Resources:
    """How the machine is shared out."""

    actors: int
    """Processes that run clients, each with its own copy of the base."""
    client_cpus: int
    client_gpus: float
    """The part of a GPU that an actor has."""


def share_out(federation: FederationConfig, *, cpus: int, gpus: int) -> Resources:
    """Return as many actors as have clients to run and fit the machine, and what each gets.

    With GPUs an actor has one to itself; without, the cores are shared out evenly. What the config says goes first.

    Raises:
        ConfigError: the config asks for more than the machine has.
    """
    problems = []
    wanted_gpus = federation.client_gpus if federation.client_gpus is not None else float(min(gpus, 1))
    if wanted_gpus > gpus:
        problems.append(Problem("federation.client_gpus", f"is {wanted_gpus:g}, and this machine has no GPU"))
    if (federation.client_cpus or 1) > cpus:
        problems.append(
            Problem("federation.client_cpus", f"is {federation.client_cpus}, and this machine has {cpus} cores")
        )
    if problems:
        raise ConfigError(problems)
    actors = min(federation.clients_per_round, cpus // (federation.client_cpus or 1))
    if wanted_gpus:
        actors = min(actors, gpus * int(1 / wanted_gpus + 1e-9))  # a part lies on one GPU
    return Resources(actors, federation.client_cpus or cpus // actors, wanted_gpus)


def run(config: FedTuneConfig, config_json: str, run: RunDirectory) -> None:
    """Run a federation on Flower's simulation; returns when the ServerApp does, raises what it raises.

    Raises:
        MissingError: Ray is not installed.
        ConfigError: `federation.client_cpus` or `client_gpus` do not fit the machine.
        FederationError: too few usable replies in a round, or Flower's processes ended before the run did.
        CapError: the communication cap would be passed.
    """
    if find_spec("ray") is None:
        raise MissingError("The engine ray needs Flower's simulation.", hint="pip install 'fedtune[ray]'")
    federation = config.federation
    resources = share_out(federation, cpus=_cores(), gpus=_gpus())
    _let_go_of_base(config_json)
    log = run.path / "engine.log"
    port = free_port()
    superlink = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    simulation = (
        f"num-supernodes={federation.clients} client-resources-num-cpus={resources.client_cpus} "
        f"client-resources-num-gpus={resources.client_gpus} init-args-num-cpus={resources.actors * resources.client_cpus}"
    )
    with flower_home(f"127.0.0.1:{port}") as home:
        app = home.write_app(
            "fedtune.federation.engines.ray_apps:server_app",
            "fedtune.federation.engines.ray_apps:client_app",
            {
                "fedtune-config": config_json,
                "run-dir": str(run.path.resolve()),
                HOME: str(home.path),
                ACTORS: resources.actors,
                TIMEOUT: federation.client_timeout_s,
            },
        )
        with home.owned(*superlink, log=log) as keeper:
            until = time.monotonic() + _STARTING_S
            while not _answers(port):
                if keeper.poll() is not None or time.monotonic() > until:
                    raise FederationError(f"Flower's SuperLink did not start; its log is {log}.")
                time.sleep(_LOOK_EVERY_S)
            submit = ["flwr", "run", str(app), CONNECTION, "--stream", "--federation-config", simulation]
            with home.owned(*submit, log=log) as stream:
                silence_s = LOADING_S + patience_s(federation.clients, resources.actors, federation.client_timeout_s)
                _follow(home.path, keeper, stream, silence_s, run, log)


def patience_s(messages: int, actors: int, timeout_s: float) -> float:
    """Return how long `messages` may take on `actors`; after that the engine is stuck, for its pool answers each in time."""
    return LOADING_S + ceil(messages / actors) * (timeout_s + 2 * GRACE_S)


def _follow(
    home: Path,
    superlink: subprocess.Popen[bytes],
    stream: subprocess.Popen[bytes],
    silence_s: float,
    run: RunDirectory,
    log: Path,
) -> None:
    """Tell what Flower's processes write until one has written how the run ended, or none can any more."""
    read_bytes, heard = 0, time.monotonic()
    while True:
        superlink_ended, stream_ended = superlink.poll() is not None, stream.poll() is not None
        server = _read(home / SERVER)
        ended = superlink_ended or (not _lives(int(server["pid"])) if server else stream_ended)
        outcome = _read(home / OUTCOME)
        # What was written before an end or an outcome was seen is read after it.
        if (told := _tell_from(home / EVENTS, read_bytes, run)) > read_bytes:
            read_bytes, heard = told, time.monotonic()
        if outcome:
            _raise(outcome, run.log_file)
            return
        if ended or time.monotonic() - heard > (silence_s if server else _STARTING_S):
            raise FederationError(
                f"Flower's processes {'ended before the run did' if ended else 'have stopped answering'}; their log is {log}.",
                hint=f"fedtune train --resume {run.path}",
            )
        time.sleep(_LOOK_EVERY_S)


def _read(path: Path) -> dict[str, str]:
    """Return the JSON object in a file that appears whole, nothing while it is not there."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _tell_from(path: Path, offset: int, run: RunDirectory) -> int:
    """Tell the events in `path` from byte `offset` on; return how far that is."""
    if not path.exists():
        return offset
    with path.open("rb") as file:
        file.seek(offset)
        lines = file.read().split(b"\n")[:-1]  # a line without its end is not whole yet
    for line in lines:
        record = json.loads(line)
        kind = getattr(events, record.pop("event"))
        if kind is Logged:
            # The path as the user wrote it.
            text = record.pop("text").replace(str(run.path.resolve()), str(run.path))
            Logged(text=text, **record).log_here(written=True)
            continue
        if kind is events.AdapterSaved:
            record["path"] = run.adapter_folder(record["round"])  # as the user wrote it
        events.tell(kind(**record))
    return offset + sum(len(line) + 1 for line in lines)


def _raise(outcome: dict[str, str], log: Path) -> None:
    """Raise the error that the run ended with, if it did; an internal error's traceback is in `log`."""
    kind = getattr(errors, outcome["error"] or "-", None)
    if kind is not None:
        raise (UsageError if kind is ConfigError else kind)(outcome["message"], hint=outcome["hint"])
    if outcome["error"]:
        text = f"Internal error in a process of the engine ray: {outcome['error']}: {outcome['message']}"
        raise FedTuneError(text, hint=f"Its traceback is in {log}.")


def _let_go_of_base(config_json: str) -> None:
    """Free the base that this process has loaded to check it: the memory is the actors'. Whoever asks again loads it again."""
    import torch

    from fedtune.federation.workspace import workspace_of

    for part in ("adapted", "base"):
        vars(workspace_of(config_json)).pop(part, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
