"""The ray engine: same bits as in process, clients that die or hang, a Ray cluster, and no process left behind."""

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from flwr.app import Context, Message, RecordDict
from support.ports import free_port

from fedtune.config.load import load_config
from fedtune.config.schema import FedTuneConfig
from fedtune.errors import ClientError, ConfigError, FederationError, MissingError, UsageError
from fedtune.federation.engines import ray as engine
from fedtune.federation.engines.ray import ClientActor, Ended, Loaded, Machine
from fedtune.federation.events import AdapterSaved, Event, ReplyArrived, RoundDone, RoundStarted, StepDone
from fedtune.federation.train import train
from fedtune.runs.atomic import read_json_lines
from fedtune.runs.directory import RunDirectory
from fedtune.runs.log import Logged, run_log

SMALL = ("federation.fraction=0.5", "training.max_steps=2", "federation.rounds=2")

needs_ray = pytest.mark.skipif(not engine.find_spec("ray"), reason="needs the extra: pip install fedtune[ray]")


def config_of(*settings: str) -> FedTuneConfig:
    return load_config(challenge="tiny", settings=[*SMALL, *settings]).config


# --- dividing the machines


@pytest.mark.parametrize(
    ("settings", "machines", "actors", "client_cpus", "client_gpus"),
    [
        ((), [(2, 0)], 2, 1, 0.0),  # two cores, four clients a round
        ((), [(1, 0)], 1, 1, 0.0),
        ((), [(64, 0)], 4, 16, 0.0),  # no more copies of the base than clients that train at once
        ((), [(16, 2)], 2, 8, 1.0),  # one GPU an actor
        (("client_gpus=0.5",), [(16, 1)], 2, 8, 0.5),
        (("client_gpus=0.6",), [(16, 2)], 2, 8, 0.6),  # a part of a GPU lies on one GPU
        ((), [(16, 8)], 4, 4, 1.0),
        (("client_gpus=0.0",), [(8, 1)], 4, 2, 0.0),
        (("client_cpus=3",), [(8, 0)], 2, 3, 0.0),
        (("client_cpus=8", "client_gpus=0.25"), [(8, 1)], 1, 8, 0.25),
        ((), [(1, 0), (1, 0)], 2, 1, 0.0),
        ((), [(3, 0), (3, 0)], 4, 1, 0.0),  # three on one machine and one on the other would leave cores idle
        (("fraction=0.25",), [(1, 0), (3, 0)], 2, 1, 0.0),  # two cores each do not fit the first machine twice
        (("fraction=0.25",), [(1, 0), (8, 0)], 2, 4, 0.0),  # both on the larger machine
        ((), [(8, 0), (16, 2)], 2, 8, 1.0),  # a machine without GPUs runs no client that needs one
    ],
)
def test_actors_fit_the_machines(
    settings: tuple[str, ...], machines: list[tuple[int, int]], actors: int, client_cpus: int, client_gpus: float
) -> None:
    federation = config_of(*(f"federation.{setting}" for setting in settings)).federation
    resources = engine.divide(federation, [Machine(*machine) for machine in machines])
    assert resources == engine.Resources(actors, client_cpus, client_gpus)
    assert resources.actors * resources.client_cpus <= sum(cpus for cpus, _ in machines)
    assert resources.actors * resources.client_gpus <= sum(gpus for _, gpus in machines)


@pytest.mark.parametrize(
    ("settings", "machines", "paths"),
    [
        (("client_gpus=0.5", "client_cpus=4"), [(2, 0)], ["federation.client_gpus", "federation.client_cpus"]),
        (("client_cpus=4",), [(2, 0), (3, 0)], ["federation.client_cpus"]),  # no machine has them, both together do
        (("client_cpus=4", "client_gpus=1.0"), [(8, 0), (2, 1)], ["federation.client_cpus"]),
    ],
)
def test_more_than_a_machine_has_is_refused(
    settings: tuple[str, ...], machines: list[tuple[int, int]], paths: list[str]
) -> None:
    federation = config_of(*(f"federation.{setting}" for setting in settings)).federation
    with pytest.raises(ConfigError) as refused:
        engine.divide(federation, [Machine(*machine) for machine in machines])
    assert [problem.path for problem in refused.value.problems] == paths


# --- refusals before anything starts


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"fedtune\[ray\]"):
        engine.RayEngine().check(config_of())


@needs_ray
def test_a_cluster_that_does_not_answer_is_refused(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    config = config_of("federation.engine=ray", f"federation.ray_address={address}")
    with pytest.raises(MissingError, match=f"No Ray cluster answers at {address}"):
        train(config, out=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["head", "ray://head:10001", "head:port"])
def test_an_address_without_host_and_port_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"federation\.ray_address"):
        config_of(f"federation.ray_address={address}")


def test_the_private_ray_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("long" * 20)))
    monkeypatch.setenv("RAY_TMPDIR", "before")
    with engine._ray_folder() as folder:
        assert Path(folder).stat().st_mode & 0o077 == 0
        assert len(f"{folder}/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store") <= 103
        with engine._environment(engine._private(Path(folder))):
            assert os.environ["RAY_TMPDIR"] == folder
            assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
            assert os.environ.get("RAY_AUTH_TOKEN", "") == engine._token()
    assert not Path(folder).exists()
    assert os.environ["RAY_TMPDIR"] == "before"
    assert "RAY_AUTH_TOKEN" not in os.environ


# --- what an actor says, without Ray


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(what: object, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.05)


def actor_says(run: Path, app: object, config: FedTuneConfig | None = None, version: str = "") -> list[object]:
    """Return all that an actor yields for one message to client 3."""
    actor = ClientActor()
    actor.app = app or actor.app  # type: ignore[assignment]
    run_config = {"fedtune-config": (config or config_of()).model_dump_json(), "run-dir": str(run)}
    context = Context(1, 5, {"partition-id": 3, "num-partitions": 8, "errors-pass": True}, RecordDict(), run_config)
    return list(actor.deliver(Message(RecordDict(), 5, "query"), context, version or engine.version("fedtune")))


@pytest.mark.usefixtures("flower_identity")
def test_an_actor_loads_the_base_before_the_clients_time_begins(tmp_path: Path) -> None:
    def app(message: Message, context: Context) -> Message:
        engine.tell(StepDone(3, 1, 2, 0.5, 10, 0.1))
        return Message(RecordDict(), reply_to=message)

    loaded, step, ended = actor_says(tmp_path, app)
    assert (loaded, step) == (Loaded(), StepDone(3, 1, 2, 0.5, 10, 0.1))
    assert isinstance(ended, Ended)
    assert ended.reply is not None
    assert not ended.reply.has_error()


@pytest.mark.usefixtures("flower_identity")
@pytest.mark.parametrize(
    ("raised", "reason"), [(MemoryError("17 secrets"), "MemoryError"), (ClientError("No rows."), "No rows.")]
)
def test_a_clients_error_costs_the_client(tmp_path: Path, raised: Exception, reason: str) -> None:
    def fail(*_: object) -> Message:
        raise raised

    ended = actor_says(tmp_path, fail)[-1]
    assert isinstance(ended, Ended)
    assert ended.reply is not None
    assert (ended.reply.error.reason, ended.error) == (reason, None)
    logged = (tmp_path / "debug.log").read_text()
    assert "Client 3 failed." in logged
    assert f"{type(raised).__name__}: {raised}" in logged
    assert "in fail" in logged


@pytest.mark.usefixtures("flower_identity")
def test_a_full_disk_and_data_that_is_not_there_end_the_run(tmp_path: Path) -> None:
    def fail(*_: object) -> Message:
        raise ValueError("safetensors: I/O error: os error 28") from OSError(errno.ENOSPC, "No space left on device")

    full = actor_says(tmp_path, fail)[-1]
    assert isinstance(full, Ended)
    assert isinstance(full.error, OSError)
    assert full.error.errno == errno.ENOSPC
    missing = actor_says(tmp_path, None, config_of("data.source=nowhere.jsonl"))[-1]
    assert isinstance(missing, Ended)
    assert isinstance(missing.error, MissingError)
    assert "nowhere" in str(missing.error)


@pytest.mark.usefixtures("flower_identity")
def test_an_actor_on_an_unfit_machine_of_a_cluster_ends_the_run(tmp_path: Path) -> None:
    other = actor_says(tmp_path, None, version="0.0.1")[-1]
    assert isinstance(other, Ended)
    assert isinstance(other.error, UsageError)
    assert str(other.error).startswith("fedtune is 0.0.1 on this machine")
    elsewhere = actor_says(tmp_path / "not-shared", None)[-1]
    assert isinstance(elsewhere, Ended)
    assert isinstance(elsewhere.error, MissingError)
    assert "not-shared" in str(elsewhere.error)


@pytest.mark.usefixtures("flower_identity")
def test_records_of_actors_reach_the_user_and_are_written_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning in an actor is one line in the run's log and one record in the process whose user follows the run."""

    def warn(message: Message, context: Context) -> Message:
        try:
            raise KeyError("row")
        except KeyError:
            logging.getLogger("fedtune.models").warning("The base is %s.", "odd", exc_info=True)
        logging.getLogger("transformers").warning("advice")
        return Message(RecordDict(), reply_to=message)

    (logged,) = [step for step in actor_says(tmp_path, warn) if isinstance(step, Logged) and "odd" in step.text]
    caplog.clear()
    with run_log(tmp_path / "debug.log"):
        logged.log_here(written=True)
    (record,) = caplog.records
    assert (record.name, record.levelno, record.getMessage()) == ("fedtune.models", logging.WARNING, "The base is odd.")
    assert "KeyError: 'row'" in str(record.exc_text)
    text = (tmp_path / "debug.log").read_text()
    assert (text.count("The base is odd."), text.count("advice")) == (1, 1)


# --- actors in a private Ray


class ProbeActor(ClientActor):
    """An actor that does what its message says, and tells which process it is."""

    def __init__(self) -> None:
        super().__init__()
        self.app = ProbeApp()  # type: ignore[assignment]


class ProbeApp:
    def __call__(self, message: Message, context: Context) -> Message:
        from flwr.app import ConfigRecord

        match message.content["config"]["do"]:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(600)
            case "raise":
                raise ValueError("client")
            case "full":
                raise OSError(errno.ENOSPC, "No space left on device", "/full")
            case "missing":
                raise MissingError("No data.", hint="Find it.")
            case "log":
                logging.getLogger("fedtune.probe").warning("In %s.", context.run_config["run-dir"])
        return Message(RecordDict({"config": ConfigRecord({"pid": os.getpid()})}), reply_to=message)


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_actors_that_die_or_hang_are_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, flower_identity: None
) -> None:
    """A dead and a hanging actor get an error reply and are replaced; one whose client raised is kept."""
    from flwr.app import ConfigRecord

    def ask(what: str) -> Message:
        (reply,) = grid.send_and_receive([Message(RecordDict({"config": ConfigRecord({"do": what})}), 2, "train")])
        assert reply.metadata.src_node_id == 2
        return reply

    def pid() -> int:
        return int(ask("work").content["config"]["pid"])

    config = config_of("federation.client_timeout_s=0.5", "federation.clients=1", "federation.fraction=1.0")
    run = RunDirectory(tmp_path)
    monkeypatch.setattr(engine, "GRACE_S", 0.5)
    monkeypatch.setattr(engine, "ClientActor", ProbeActor)
    monkeypatch.setattr(engine, "_cores", lambda: 1)
    before = set(psutil.Process().children(recursive=True))
    handler = signal.getsignal(signal.SIGTERM)
    with engine.connected("") as servers:
        sys.modules["ray"].cloudpickle.register_pickle_by_value(
            sys.modules[__name__]
        )  # an actor cannot import the tests
        assert signal.getsignal(signal.SIGTERM) == handler
        started = set(psutil.Process().children(recursive=True)) - before
        listening_on = {
            connection.laddr.ip
            for process in (psutil.Process(), *started)
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert {address.removeprefix("::ffff:") for address in listening_on} == {"127.0.0.1"}
        actors = engine.Actors(engine.divide(config.federation, engine.machines()), servers)
        grid = engine.RayGrid(actors, config.federation, run, engine.run_config_of(config, run))
        first = pid()
        assert ask("raise").error.reason == "ValueError"
        assert pid() == first
        assert ask("die").error.reason == "its process ended: killed, or out of memory"
        second = pid()
        assert second != first
        assert ask("hang").error.reason == "no reply within 0.5 s"
        wait_for(lambda: not lives(second))
        assert pid() not in (first, second)
        ask("log")
        assert [record.getMessage() for record in caplog.records if record.name == "fedtune.probe"] == [
            f"In {tmp_path}."
        ]
        with pytest.raises(OSError, match="No space") as full:
            ask("full")
        assert (full.value.errno, full.value.filename) == (errno.ENOSPC, "/full")
        with pytest.raises(MissingError) as missing:
            ask("missing")
        assert (missing.value.message, missing.value.hint) == ("No data.", "Find it.")
        servers[0].kill()
        with pytest.raises(FederationError, match="Ray ended before the run did"):
            ask("work")
        started |= set(psutil.Process().children(recursive=True)) - before
    assert not [process for process in started if lives(process.pid)]


# --- real runs


def adapter_of(run: Path, server_round: int = 2) -> bytes:
    return (run / f"peft_{server_round}" / "adapter_model.safetensors").read_bytes()


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_same_bits_and_same_events_as_in_process(tmp_path: Path) -> None:
    """Float32 on the CPU with as many threads: actors end with the very adapter of the in-process engine."""
    told: dict[str, list[Event]] = {"in-process": [], "ray": []}
    runs = {
        name: train(config_of(f"federation.engine={name}"), out=tmp_path / name, listener=told[name].append).run
        for name in told
    }
    assert adapter_of(runs["ray"]) == adapter_of(runs["in-process"])

    def of(name: str, kind: type[Event]) -> list[Event]:
        return [event for event in told[name] if isinstance(event, kind)]

    assert of("ray", RoundStarted) == of("in-process", RoundStarted)
    for kind in (StepDone, ReplyArrived, RoundDone, AdapterSaved):
        assert len(of("ray", kind)) == len(of("in-process", kind))
    saved = of("ray", AdapterSaved)[0]
    assert isinstance(saved, AdapterSaved)
    assert saved.path == runs["ray"] / "peft_2"
    ours, theirs = (read_json_lines(runs[name] / "ledger.jsonl") for name in told)
    assert sorted(map(str, ours)) == sorted(map(str, theirs))


class Command:
    """A running `fedtune train --engine ray`."""

    def __init__(self, folder: Path, *words: str, **environment: str) -> None:
        self.out, self.said = folder / "runs", folder / f"said-{time.monotonic_ns()}"
        with self.said.open("wb") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fedtune.cli.app", "train", "--out", str(self.out), "--engine", "ray", *words],
                env={**os.environ, **environment},
                cwd=folder,
                stdout=sink,
                stderr=subprocess.STDOUT,
                # A shell starts background jobs with SIGINT ignored, and so would this be if the tests are one.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
            )

    @property
    def text(self) -> str:
        return self.said.read_text()

    @property
    def run(self) -> Path:
        return next(self.out.iterdir())

    def started(self, words: str = "") -> list[psutil.Process]:
        """Return all living processes that came of the command; with `words`, those whose command line holds them."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if words in " ".join(process.cmdline()):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return found

    def until_round(self, server_round: int) -> None:
        """Wait until a round is done and an actor is training in the next one."""
        wait_for(lambda: f"round {server_round}/" in self.text or self.process.poll() is not None, 400)
        assert self.process.poll() is None, self.text
        wait_for(lambda: self.started("ray::ClientActor.deliver"))

    def end(self, seconds: float = 300) -> int:
        return self.process.wait(seconds)


@contextmanager
def command(folder: Path, *words: str, **environment: str) -> Iterator[Command]:
    """Run the command in the block, and at most as long."""
    running = Command(folder, *words, **environment)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


def tiny(*settings: str) -> list[str]:
    return ["--challenge", "tiny", *(word for setting in (*SMALL, *settings) for word in ("--set", setting))]


@needs_ray
@pytest.mark.slow
def test_a_killed_and_a_stopped_actor_cost_their_clients_and_not_the_run(tmp_path: Path) -> None:
    """kill -9 in round 2; in round 3 SIGSTOP, after which a process neither works nor notices its time limit."""
    settings = tiny("federation.rounds=4", "training.max_steps=20", "federation.client_timeout_s=15.0")
    with command(tmp_path, *settings) as running:
        running.until_round(1)
        running.started("ray::ClientActor.deliver")[0].kill()
        running.until_round(2)
        running.started("ray::ClientActor.deliver")[0].suspend()
        pids = [process.pid for process in running.started()]
        assert running.end() == 0, running.text
        wait_for(lambda: not any(map(lives, pids)), 15)
    reasons = [line["reason"] for line in read_json_lines(running.run / "metrics.jsonl") if line["status"] != "ok"]
    assert reasons == ["its process ended: killed, or out of memory", "no reply within 15 s"]
    assert (running.run / "peft_4").is_dir()


@needs_ray
@pytest.mark.slow
def test_interrupted_it_leaves_no_process_and_resumes_with_the_same_bits(tmp_path: Path) -> None:
    whole = train(config_of("federation.rounds=3"), out=tmp_path / "whole").run
    with command(tmp_path, *tiny("federation.rounds=3")) as running:
        running.until_round(1)
        pids = [process.pid for process in running.started()]
        assert len(pids) > 5
        # Other users of this machine cannot use the private Ray: it asks for a secret.
        (raylet,) = [process for process in running.started() if process.name() == "raylet"]
        assert (raylet.environ()["RAY_AUTH_MODE"], len(raylet.environ()["RAY_AUTH_TOKEN"])) == ("token", 64)
        running.process.send_signal(signal.SIGINT)
        assert running.end(30) == 130, running.text
        assert not any(map(lives, pids))
        assert "fedtune train --resume" in running.text
    with command(tmp_path, "--resume", str(running.run)) as again:
        assert again.end() == 0, again.text
    assert adapter_of(running.run, 3) == adapter_of(whole, 3)


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("victim", ["fedtune.cli.app", "raylet", "gcs_server"])
def test_a_killed_process_ends_the_run_and_all_others(tmp_path: Path, victim: str) -> None:
    """The end of this process leaves nothing; the end of one of Ray's own is noticed, and the exit code is 4."""
    with command(tmp_path, *tiny("federation.rounds=50")) as running:
        running.until_round(1)
        pids = [process.pid for process in running.started()]
        killed = time.monotonic()
        if victim == "fedtune.cli.app":
            running.process.kill()
            assert running.end(10) == -signal.SIGKILL
        else:
            next(process for process in running.started() if process.name() == victim).kill()
            assert running.end(20) == 4, running.text
            assert f"fedtune train --resume {running.run}" in running.text
        wait_for(lambda: not any(map(lives, pids)), 15)
        assert time.monotonic() - killed < 20


@needs_ray
@pytest.mark.slow
def test_actors_out_of_memory_fail_the_round(tmp_path: Path) -> None:
    """Ray's memory monitor, told that any use is too much, ends every actor: exit code 4, and no process."""
    with command(tmp_path, *tiny(), RAY_memory_usage_threshold="0.001", RAY_memory_monitor_refresh_ms="100") as running:
        assert running.end() == 4, running.text
    assert "out of memory" in running.text


# --- a Ray cluster


@contextmanager
def ray_cluster(folder: Path, nodes: int) -> Iterator[str]:
    """Start a Ray cluster of `nodes` nodes with one core each, each with a loopback address, and end it by its pids."""
    scripts = Path(sys.executable).parent
    address = f"127.0.0.2:{free_port()}"
    environment = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    memory = ["--object-store-memory", str(100 * 2**20)]
    processes = []
    with (folder / "cluster.log").open("ab") as log:
        try:
            for node in range(nodes):
                role = ["--head", "--port", address.split(":")[1]] if node == 0 else ["--address", address]
                role += ["--temp-dir", str(folder / "ray")] if node == 0 else []
                words = [
                    str(scripts / "ray"),
                    "start",
                    *role,
                    "--num-cpus",
                    "1",
                    *memory,
                    "--block",
                    "--disable-usage-stats",
                ]
                words += ["--include-dashboard", "false"] if node == 0 else []
                words += ["--node-ip-address", f"127.0.0.{node + 2}"]  # Ray takes 127.0.0.1 for the machine's address
                processes.append(
                    subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                )
                wait_for(lambda: (folder / "cluster.log").read_text().count("Ray runtime started.") > node, 120)  # noqa: B023
            yield address
        finally:
            started = [psutil.Process(process.pid) for process in processes]
            started += [child for process in tuple(started) for child in process.children(recursive=True)]
            for process in started:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            for process in processes:
                process.wait(30)


@needs_ray
@pytest.mark.slow
def test_a_cluster_of_two_nodes_gives_the_same_bits(tmp_path: Path) -> None:
    whole = train(config_of(), out=tmp_path / "whole").run
    short = Path(tempfile.mkdtemp(dir="/tmp", prefix="ray-"))
    try:
        with ray_cluster(short, nodes=2) as address:
            with command(tmp_path, *tiny(f"federation.ray_address={address}")) as running:
                assert running.end(500) == 0, running.text
            # The cluster goes on: an actor of the run is gone, and another run could begin.
            assert not [each for each in psutil.process_iter() if "ray::ClientActor" in each.name()]
    finally:
        shutil.rmtree(short, ignore_errors=True)
    assert adapter_of(running.run) == adapter_of(whole)
    workers = {
        line.split("[")[1].split("]")[0]
        for line in (running.run / "debug.log").read_text().splitlines()
        if "fedtune.training" in line
    }
    assert len(workers) == 2
