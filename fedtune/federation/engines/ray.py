"""The ray engine: clients run at the same time in Ray actors, on several GPUs, many cores, or the machines of a Ray cluster.

The ServerApp runs in this process, as in the in-process engine; only messages to clients go to other processes. Each actor is
one process with one resident base. Which actor runs a client changes no bit of the result, because a client's work is a
function of (seed, round, partition) and its state is in the run directory.
"""

from __future__ import annotations

import gc
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import psutil  # type: ignore[import-untyped]
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fedtune.config.schema import FederationConfig, FedTuneConfig
from fedtune.errors import ConfigError, FederationError, FedTuneError, MissingError, Problem, UsageError
from fedtune.federation.engines.base import Engine
from fedtune.federation.engines.in_process import InProcessGrid, identity, run_client, run_config_of, run_server
from fedtune.federation.events import Event, listening, tell
from fedtune.federation.flower.compat import ErrorCode
from fedtune.runs.atomic import os_error_in
from fedtune.runs.directory import RunDirectory
from fedtune.runs.log import Logged, forwarded_records, run_log

log = logging.getLogger(__name__)

LOADING_S = 1800.0
"""The longest that an actor may take to start and to load the base, which does not count as the client's time."""

GRACE_S = 5.0
"""The time in which a client can notice itself that its time limit is over; after that its process is killed."""

_CONNECT_S = 5.0
_POLL_S = 0.2
_LONGEST_FOLDER = 40
"""Ray's Unix sockets are in its folder, and such a name has at most 107 bytes (103 on macOS)."""

_OBJECT_STORE_BYTES = 2**30
"""Shared memory for messages on their way; what does not fit goes to the disk."""


@dataclass(frozen=True)
class Machine:
    """What Ray may use of one machine."""

    cpus: int
    gpus: int = 0


@dataclass(frozen=True)
class Resources:
    """How the machines are divided among actors."""

    actors: int
    """Processes that run clients, each with its own copy of the base."""
    client_cpus: int
    client_gpus: float
    """The part of a GPU that an actor gets."""


def divide(federation: FederationConfig, machines: Sequence[Machine]) -> Resources:
    """Return as many actors as there are clients to run at once and as fit the machines, and what each of them gets.

    With GPUs an actor gets a whole one; without, the cores are divided evenly. Values in the config take precedence.

    Raises:
        ConfigError: the config asks for more than any machine has.
    """
    cpus = max(machine.cpus for machine in machines)
    gpus = max(machine.gpus for machine in machines)
    wanted_cpus = federation.client_cpus or 1
    wanted_gpus = federation.client_gpus if federation.client_gpus is not None else float(min(gpus, 1))

    def fitting(client_cpus: int) -> int:
        slots = [
            min(
                machine.cpus // client_cpus,
                # A part of a GPU cannot be spread over two.
                machine.gpus * int(1 / wanted_gpus + 1e-9) if wanted_gpus else machine.cpus,
            )
            for machine in machines
        ]
        return sum(slots)

    where = "this machine" if len(machines) == 1 else "the largest machine of the Ray cluster"
    problems = []
    if wanted_gpus > gpus:
        problems.append(Problem("federation.client_gpus", f"is {wanted_gpus:g}, and {where} has no GPU"))
    if wanted_cpus > cpus:
        problems.append(Problem("federation.client_cpus", f"is {federation.client_cpus}, and {where} has {cpus} cores"))
    if not problems and not fitting(wanted_cpus):
        problems.append(
            Problem("federation.client_cpus", f"no machine of the Ray cluster has {wanted_cpus} cores beside a GPU")
        )
    if problems:
        raise ConfigError(problems)
    actors = min(federation.clients_per_round, fitting(wanted_cpus))
    client_cpus = federation.client_cpus or max(each for each in range(1, cpus + 1) if fitting(each) >= actors)
    return Resources(actors, client_cpus, wanted_gpus)


class RayEngine(Engine, name="ray"):
    """Runs the clients of a round at the same time in Ray actors."""

    def check(self, config: FedTuneConfig) -> None:
        """Make sure that Ray is installed and that the cluster, if one is named, can be reached.

        Raises:
            MissingError: it is not.
        """
        if find_spec("ray") is None:
            raise MissingError("The engine ray needs Ray.", hint="pip install 'fedtune[ray]'")
        if address := config.federation.ray_address:
            host, _, port = address.rpartition(":")
            try:
                socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
            except (OSError, OverflowError) as error:
                raise MissingError(
                    f"No Ray cluster answers at {address} ({type(error).__name__}).",
                    hint="Check federation.ray_address, and that `ray status` shows the cluster.",
                ) from None

    @contextmanager
    def prepare(self, config: FedTuneConfig) -> Iterator[None]:
        """Start a private Ray or connect to the cluster, and start the actors, which import what they need meanwhile."""
        with connected(config.federation.ray_address) as servers:
            self._actors = Actors(divide(config.federation, machines()), servers)
            yield

    def run(self, config: FedTuneConfig, run: RunDirectory) -> None:
        """Run the remaining rounds.

        Raises:
            FederationError: too few usable replies in a round, or Ray ended before the run did.
            CapError: the communication cap would be passed.
        """
        run_config = run_config_of(config, run)
        _release_base(run_config["fedtune-config"])
        grid = RayGrid(self._actors, config.federation, run, run_config)
        run_server(grid, run_config)


# --- Ray itself


@contextmanager
def connected(address: str) -> Iterator[Sequence[psutil.Process]]:
    """Connect this process to the Ray cluster at `address`, or to a private Ray that ends with the block.

    A private Ray listens on the loopback interface only, starts no dashboard and sends no usage statistics.

    Yields:
        The processes without which a private Ray cannot go on; none of a cluster.

    Raises:
        UsageError: this process is connected to a Ray already, or has imported Ray in a way that opens it to the network.
        FederationError: the private Ray did not start.
        MissingError: the cluster cannot be used.
    """
    with ExitStack() as stack:
        if address:
            options: dict[str, Any] = {"address": address}
        else:
            folder = Path(stack.enter_context(_ray_folder()))
            stack.enter_context(_environment(_private(folder)))
            options = {
                "address": "local",
                "num_cpus": _cores(),
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
            }
        import ray

        if ray.is_initialized():
            raise UsageError("This process is already connected to Ray.", hint="Call ray.shutdown() first.")
        stack.callback(ray.shutdown)
        try:
            with warnings.catch_warnings(), _own_signals():
                warnings.simplefilter("ignore")  # about later versions of Ray
                ray.init(**options, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            reason = str(error).strip().split("\n")[0].rstrip(".")
            if address:
                raise MissingError(
                    f"The Ray cluster at {address} cannot be used: {reason}.",
                    hint="fedtune must run on one of its machines, with the Ray and Python versions of the cluster.",
                ) from error
            raise FederationError(f"Ray did not start: {reason}.") from error
        if not address and not ip_address(_nodes()[0]["NodeManagerAddress"]).is_loopback:
            raise UsageError(
                "Something has imported Ray in this process already, and others could reach the Ray that fedtune starts.",
                hint="Start a new process, or import Ray after the run.",
            )
        yield [each for each in psutil.Process().children() if _name(each) in ("gcs_server", "raylet")]


@contextmanager
def _ray_folder() -> Iterator[str]:
    """Make a folder for what Ray writes, with a short name. After the block it is removed, and all processes of Ray with it."""
    root = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="fedtune-ray-", dir=root if len(root) <= _LONGEST_FOLDER else "/tmp")
    with subprocess.Popen(
        # -P: a file in the current folder cannot take the place of a module of Python's.
        [sys.executable, "-P", "-m", "fedtune.federation.engines.ray_cleanup", folder],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for this process to handle
    ):
        yield folder


def _private(folder: Path) -> Mapping[str, str]:
    """Return the environment variables of a private Ray in `folder`."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _token()} if _token() else {}
    return {
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray would give clients less of a busy machine than this process gets
        # Without clusters, which is the default on Windows and macOS, Ray listens on the loopback interface only.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        **token,
    }


@cache
def _token() -> str:
    """Return the secret with which other users of this machine cannot use this process's private Ray.

    Ray reads it once, when it is imported; it is empty where something else has imported Ray before.
    """
    return "" if "ray" in sys.modules else secrets.token_hex(32)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, which processes started in the block inherit."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's handler of SIGTERM, which `ray.init` replaces."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.NoSuchProcess:
        return ""


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machines() -> list[Machine]:
    """Return the machines of the Ray that this process is connected to."""
    resources = [node["Resources"] for node in _nodes()]
    return [Machine(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in resources]


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _release_base(config_json: str) -> None:
    """Free the base that this process has loaded to check it: the memory is the actors'. It is loaded again where needed."""
    import torch

    from fedtune.federation.workspace import workspace_of

    for part in ("adapted", "base"):
        vars(workspace_of(config_json)).pop(part, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- what an actor does


@dataclass(frozen=True)
class Loaded:
    """The base is in memory, and the client's time begins."""


@dataclass(frozen=True)
class Ended:
    """The client's reply, or the error that ends the run."""

    reply: Message | None
    error: Exception | None = None


class ClientActor:
    """A process that runs clients one after another on one resident base."""

    def __init__(self) -> None:
        from fedtune.federation import client  # takes seconds, in which the driver reads data and base

        self.app: ClientApp = client.app

    def deliver(self, message: Message, context: Context, driver_version: str) -> Iterator[Event | Loaded | Ended]:
        """Run one client; yield what happens as it happens, and lastly `Ended`."""
        steps: SimpleQueue[Event | Loaded | Ended] = SimpleQueue()

        def work() -> None:
            run = RunDirectory(Path(str(context.run_config["run-dir"])))
            try:
                _check_machine(run, driver_version)
                with identity(), run_log(run.log_file), forwarded_records(steps.put), listening(steps.put):
                    # The base is loaded by `run_client`, so that its errors become what a client's errors become.
                    loading = LoadingApp(self.app, steps)
                    steps.put(Ended(run_client(loading, message, context)))  # type: ignore[arg-type]
            except Exception as error:
                with run_log(run.log_file):
                    log.debug("The actor cannot run clients.", exc_info=True)
                steps.put(Ended(None, error if isinstance(error, FedTuneError) else os_error_in(error) or error))

        threading.Thread(target=work, daemon=True).start()
        while not isinstance(step := steps.get(), Ended):
            yield step
        yield step


@dataclass(frozen=True)
class LoadingApp:
    """The ClientApp, with the base loaded before the client's time begins."""

    app: ClientApp
    steps: SimpleQueue[Event | Loaded | Ended]

    def __call__(self, message: Message, context: Context) -> Message:
        """Load the base and run the client."""
        from fedtune.federation.workspace import config_json_of, workspace_of

        workspace_of(config_json_of(context)).adapted  # noqa: B018
        self.steps.put(Loaded())
        return self.app(message, context)


def _check_machine(run: RunDirectory, driver_version: str) -> None:
    """Make sure that this machine of a cluster has the driver's fedtune and files.

    Raises:
        UsageError: another version of fedtune is installed here.
        MissingError: the run directory is not here.
    """
    if (here := version("fedtune")) != driver_version:
        raise UsageError(f"fedtune is {driver_version} on this machine, and {here} on {socket.gethostname()}.")
    if not run.path.is_dir():
        raise MissingError(
            f"The run directory {run.path} is not on the cluster's machine {socket.gethostname()}.",
            hint="Keep runs and data in a folder that all machines of the cluster share: fedtune train --runs FOLDER",
        )


# --- what the driver does


class Actors:
    """As many actors as there are at the start, at any time: those that end or hang are replaced."""

    def __init__(self, resources: Resources, servers: Sequence[psutil.Process]) -> None:
        import ray

        self._resources = resources
        self._servers = servers
        self._make = ray.remote(
            num_cpus=resources.client_cpus, num_gpus=resources.client_gpus, max_restarts=0, max_task_retries=0
        )(ClientActor).remote
        self.idle: list[Any] = [self._make() for _ in range(resources.actors)]

    def replace(self, actor: Any) -> None:
        """Kill an actor and start another in its place."""
        import ray

        ray.kill(actor)
        self.idle.append(self._make())

    def check(self, run: RunDirectory) -> None:
        """Make sure that Ray still works.

        Raises:
            FederationError: one of its own processes has ended.
        """
        if not all(map(_lives, self._servers)):
            raise FederationError(
                "Ray ended before the run did: one of its processes was killed.",
                hint=f"fedtune train --resume {run.path}",
            )


@dataclass
class Job:
    """A message that an actor is working on."""

    actor: Any
    message: Message
    deadline: float
    reason: str
    """What is said of a client that has not replied at the deadline."""


class RayGrid(InProcessGrid):
    """A Grid whose nodes are clients in Ray actors."""

    def __init__(
        self, actors: Actors, federation: FederationConfig, run: RunDirectory, run_config: dict[str, str]
    ) -> None:
        super().__init__(ClientApp(), federation.clients, {**run_config, "run-dir": str(run.path.resolve())})
        self._actors = actors
        self._timeout_s = federation.client_timeout_s
        self._run_directory = run

    def send_and_receive(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,  # noqa: ARG002
    ) -> Iterator[Message]:
        """Yield each client's reply as soon as it is there. The time limit is that of each client, not of all in a queue.

        Raises:
            FedTuneError, OSError: what an actor's client met allows no client to go on.
            FederationError: Ray ended.
        """
        import ray

        waiting, jobs = deque(messages), dict[Any, Job]()
        while waiting or jobs:
            while waiting and self._actors.idle:
                steps, job = self._start(self._actors.idle.pop(0), waiting.popleft())
                jobs[steps] = job
            ready, _ = ray.wait([*jobs], timeout=_POLL_S)
            self._actors.check(self._run_directory)
            late = [steps for steps, job in jobs.items() if steps not in ready and job.deadline < time.monotonic()]
            for steps in (*ready, *late):
                job = jobs[steps]
                reply = self._fail(job, job.reason) if steps in late else self._next(steps, job)
                if reply is not None:
                    del jobs[steps]
                    yield self._from_node(reply, job.message)

    def _start(self, actor: Any, message: Message) -> tuple[Any, Job]:
        context = self._accept(message)
        steps = actor.deliver.options(num_returns="streaming").remote(message, context, version("fedtune"))
        reason = f"its process did not load the base within {LOADING_S:g} s"
        return steps, Job(actor, message, time.monotonic() + LOADING_S, reason)

    def _next(self, steps: Any, job: Job) -> Message | None:
        """Take in what an actor has said next; return the reply if it was that."""
        import ray

        try:
            step = ray.get(next(steps))
        except ray.exceptions.RayTaskError as error:
            raise FedTuneError(f"Internal error in an actor of the engine ray: {error}") from error
        except ray.exceptions.RayError:
            log.debug("An actor has ended.", exc_info=True)
            return self._fail(job, "its process ended: killed, or out of memory")
        match step:
            case Loaded():
                job.deadline = time.monotonic() + self._timeout_s + GRACE_S
                job.reason = f"no reply within {self._timeout_s:g} s"
            case Ended():
                self._actors.idle.append(job.actor)
                if step.error is not None:
                    raise step.error
                return step.reply
            case Logged():
                # The path as the user wrote it; the actor has written the record to the run's log itself.
                path = self._run_directory.path
                replace(step, text=step.text.replace(str(path.resolve()), str(path))).log_here(written=True)
            case event:
                tell(event)
        return None

    def _fail(self, job: Job, reason: str) -> Message:
        """Replace a client's actor, and return the error reply of the client."""
        self._actors.replace(job.actor)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=job.message)
