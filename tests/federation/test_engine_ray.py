"""The ray engine: same bits as in process, clients that die or hang, and no process left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fedtune.config.load import load_config
from fedtune.config.schema import FedTuneConfig
from fedtune.errors import (
    CapError,
    ClientError,
    ConfigError,
    FederationError,
    FedTuneError,
    MissingError,
    Problem,
    UsageError,
)
from fedtune.federation.engines import ray as engine
from fedtune.federation.events import AdapterSaved, Event, ReplyArrived, RoundDone, RoundStarted, StepDone, listening
from fedtune.federation.flower.home import flower_home
from fedtune.federation.train import train
from fedtune.runs.atomic import read_json_lines
from fedtune.runs.directory import RunDirectory

SMALL = ("federation.fraction=0.5", "training.max_steps=2", "federation.rounds=2")

needs_ray = pytest.mark.skipif(not engine.find_spec("ray"), reason="needs the extra: pip install fedtune[ray]")


def config_of(*settings: str) -> FedTuneConfig:
    return load_config(challenge="tiny", settings=[*SMALL, *settings]).config


# --- sharing out the machine


@pytest.mark.parametrize(
    ("settings", "cpus", "gpus", "actors", "client_cpus", "client_gpus"),
    [
        ((), 2, 0, 2, 1, 0.0),  # two cores, four clients a round
        ((), 1, 0, 1, 1, 0.0),
        ((), 64, 0, 4, 16, 0.0),  # no more copies of the base than clients that train at once
        ((), 16, 2, 2, 8, 1.0),  # one GPU an actor
        (("client_gpus=0.5",), 16, 1, 2, 8, 0.5),
        (("client_gpus=0.6",), 16, 2, 2, 8, 0.6),  # a part of a GPU lies on one GPU
        ((), 16, 8, 4, 4, 1.0),
        (("client_gpus=0.0",), 8, 1, 4, 2, 0.0),
        (("client_cpus=3",), 8, 0, 2, 3, 0.0),
        (("client_cpus=8", "client_gpus=0.25"), 8, 1, 1, 8, 0.25),
    ],
)
def test_actors_fit_the_machine(
    settings: tuple[str, ...], cpus: int, gpus: int, actors: int, client_cpus: int, client_gpus: float
) -> None:
    federation = config_of(*(f"federation.{setting}" for setting in settings)).federation
    resources = engine.share_out(federation, cpus=cpus, gpus=gpus)
    assert resources == engine.Resources(actors, client_cpus, client_gpus)
    assert resources.actors * resources.client_cpus <= cpus
    assert resources.actors * resources.client_gpus <= gpus


def test_more_than_the_machine_has_is_refused() -> None:
    federation = config_of("federation.client_gpus=0.5", "federation.client_cpus=4").federation
    with pytest.raises(ConfigError) as refused:
        engine.share_out(federation, cpus=2, gpus=0)
    assert [problem.path for problem in refused.value.problems] == ["federation.client_gpus", "federation.client_cpus"]


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"fedtune\[ray\]"):
        engine.run(config_of(), "", RunDirectory(tmp_path))


# --- a Flower of one's own


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


DAEMON = (
    "import os, subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import signal, time;"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'], start_new_session=True)\n"
    "open(sys.argv[1] + '.new', 'w').write(f'{os.getpid()} {child.pid}')\n"
    "os.rename(sys.argv[1] + '.new', sys.argv[1])\n"
)
"""Starts a process that leaves its session and heeds no SIGTERM, and writes both pids."""


@pytest.mark.parametrize("ending", ["time.sleep(600)", "os._exit(0)"])
def test_nothing_outlives_the_block(tmp_path: Path, ending: str) -> None:
    """Neither the command, nor a daemon of its that has become an orphan."""
    pids = tmp_path / "pids"
    with flower_home("127.0.0.1:1") as home:
        with home.owned(sys.executable, "-c", DAEMON + ending, str(pids), log=tmp_path / "log") as keeper:
            wait_for(pids.exists)
            started = [int(pid) for pid in pids.read_text().split()]
            assert "sleep" not in ending or all(lives(pid) for pid in started)
        assert keeper.returncode is not None
        assert not any(lives(pid) for pid in started)
    assert not home.path.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_the_command_does_not_outlive_a_keeper_that_is_killed(tmp_path: Path) -> None:
    with flower_home("127.0.0.1:1") as home, home.owned("sleep", "600", log=tmp_path / "log") as keeper:
        wait_for(lambda: [p.name() for p in psutil.Process(keeper.pid).children()] == ["sleep"])
        command = psutil.Process(keeper.pid).children()[0]
        keeper.kill()
        wait_for(lambda: not lives(command.pid))


def test_nothing_outlives_an_owner_that_is_killed(tmp_path: Path) -> None:
    pids, owner_code = (
        tmp_path / "pids",
        (
            "import sys, time; from pathlib import Path; from fedtune.federation.flower.home import flower_home\n"
            "with flower_home('127.0.0.1:1') as home:\n"
            "    Path(sys.argv[3]).write_text(str(home.path))\n"
            "    with home.owned(sys.executable, '-c', sys.argv[1], sys.argv[2], log=Path(sys.argv[4])): time.sleep(600)\n"
        ),
    )
    words = [DAEMON + "time.sleep(600)", str(pids), str(tmp_path / "home"), str(tmp_path / "log")]
    owner = subprocess.Popen([sys.executable, "-c", owner_code, *words])
    wait_for(pids.exists)
    owner.kill()
    owner.wait()
    wait_for(lambda: not any(lives(int(pid)) for pid in pids.read_text().split()))
    wait_for(lambda: not Path((tmp_path / "home").read_text()).exists())


def test_the_home_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with flower_home("127.0.0.1:1") as home:
        environment = home.environment()
        assert home.path.stat().st_mode & 0o077 == 0
        assert len(f"{home.path}/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store") <= 103
    assert "RAY_ADDRESS" not in environment
    assert environment["FLWR_HOME"] == environment["RAY_TMPDIR"] == str(home.path)
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert environment["FLWR_TELEMETRY_ENABLED"] == environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert environment["NO_PROXY"] == "example.org,127.0.0.1,localhost"


# --- what comes back from Flower's processes


@needs_ray
@pytest.mark.parametrize(
    ("raised", "ends_with", "text"),
    [
        (CapError("Too much.", hint="Less."), CapError, "Too much. Less."),
        (ConfigError([Problem("seed", "is odd")]), UsageError, "seed: is odd"),
        (FederationError("Nobody."), FederationError, "Nobody."),
        (KeyError("fault"), FedTuneError, "KeyError: 'fault'"),
    ],
)
def test_the_servers_error_is_ours(tmp_path: Path, raised: Exception, ends_with: type[Exception], text: str) -> None:
    from fedtune.federation.engines import ray_apps

    ray_apps._write_outcome(tmp_path, raised)
    ray_apps._write_outcome(tmp_path, FederationError("what came of it"))  # the first is the reason
    with pytest.raises(ends_with, match=re.escape(text)) as error:
        engine._raise(engine._read(tmp_path / engine.OUTCOME), tmp_path / "log")
    assert type(error.value) is ends_with
    assert (f"Its traceback is in {tmp_path / 'log'}" in error.value.hint) == (ends_with is FedTuneError)


def test_a_run_that_ended_well_raises_nothing(tmp_path: Path) -> None:
    engine._raise({"error": "", "message": "", "hint": ""}, tmp_path / "log")


@needs_ray
def test_events_come_back_once_and_whole(tmp_path: Path) -> None:
    from fedtune.federation.engines import ray_apps

    told: list[Event] = []
    step, saved = StepDone(3, 1, 2, 0.5, 10, 0.1), AdapterSaved(5, Path("/elsewhere/peft_5"))
    ray_apps._write_event(tmp_path, step)
    path = tmp_path / engine.EVENTS
    with listening(told.append):
        offset = engine._tell_from(path, 0, RunDirectory(tmp_path))
        ray_apps._write_event(tmp_path, saved)
        whole = path.read_bytes()
        path.write_bytes(whole[:-5])  # a line that is still being written
        assert engine._tell_from(path, offset, RunDirectory(tmp_path)) == offset
        path.write_bytes(whole)
        assert engine._tell_from(path, offset, RunDirectory(tmp_path)) == len(whole)
    assert told == [step, AdapterSaved(5, tmp_path / "peft_5")]


@needs_ray
@pytest.mark.parametrize(
    ("raised", "reason"), [(MemoryError("17 secrets"), "MemoryError"), (ClientError("No rows."), "No rows.")]
)
def test_a_clients_error_costs_the_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flower_identity: None, raised: Exception, reason: str
) -> None:
    from flwr.app import Context, Message, RecordDict

    from fedtune.federation.engines import ray_apps

    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(ray_apps.client, "app", fail)
    run_config = {"run-dir": str(tmp_path), engine.HOME: str(tmp_path)}
    context = Context(1, 2, {"partition-id": 3}, RecordDict(), run_config)
    reply = ray_apps.client_app(Message(RecordDict(), 2, "train"), context)
    assert reply.error.reason == reason
    assert not (tmp_path / engine.OUTCOME).exists()
    logged = (tmp_path / "debug.log").read_text()
    assert "Client 3 failed." in logged
    assert f"{type(raised).__name__}: {raised}" in logged
    assert "in fail" in logged


@needs_ray
def test_records_of_flowers_processes_reach_the_user_and_are_written_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning in an actor is one line in the run's log and one record in the process whose user follows the run."""
    import logging

    from flwr.app import Context, RecordDict

    from fedtune.federation.engines import ray_apps
    from fedtune.runs.log import run_log

    context = Context(1, 2, {}, RecordDict(), {"run-dir": str(tmp_path), engine.HOME: str(tmp_path)})
    with ray_apps._logged(context):
        try:
            raise KeyError("row")
        except KeyError:
            logging.getLogger("fedtune.models").warning("The base is %s.", "odd", exc_info=True)
        logging.getLogger("transformers").warning("advice")
    caplog.clear()
    heard: list[Event] = []
    with run_log(tmp_path / "debug.log"), listening(heard.append):
        engine._tell_from(tmp_path / engine.EVENTS, 0, RunDirectory(tmp_path))
    assert heard == []
    (record,) = caplog.records
    assert (record.name, record.levelno, record.getMessage()) == ("fedtune.models", logging.WARNING, "The base is odd.")
    assert "KeyError: 'row'" in str(record.exc_text)
    text = (tmp_path / "debug.log").read_text()
    assert (text.count("The base is odd."), text.count("advice")) == (1, 1)


@needs_ray
def test_data_that_is_not_there_ends_the_run(tmp_path: Path, flower_identity: None) -> None:
    from flwr.app import Context, Message, RecordDict

    from fedtune.federation.engines import ray_apps

    config = config_of("data.source=nowhere.jsonl").model_dump_json()
    run_config = {"fedtune-config": config, "run-dir": str(tmp_path), engine.HOME: str(tmp_path)}
    context = Context(1, 2, {"partition-id": 0, "num-partitions": 8}, RecordDict(), run_config)
    with pytest.raises(MissingError):
        ray_apps.client_app(Message(RecordDict(), 2, "query"), context)
    with pytest.raises(MissingError, match="nowhere"):
        engine._raise(engine._read(tmp_path / engine.OUTCOME), tmp_path / "log")


# --- Flower's pool of actors


@needs_ray
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_the_pool_outlives_its_actors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flower_identity: None) -> None:
    """A dead and a hanging actor are answered for and replaced; one whose client raised is kept, and so is what it has loaded."""
    import ray
    from flwr.app import ConfigRecord, Context, Message, RecordDict
    from flwr.server.superlink.fleet.vce.backend import raybackend
    from flwr.simulation.ray_transport.ray_actor import ClientAppActor

    from fedtune.federation.engines import ray_pool

    class App:
        def load(self, message: None, context: Context) -> None:
            os.environ.setdefault("LOADED", str(time.monotonic()))

        def __call__(self, message: Message, context: Context) -> Message:
            match message.content["config"]["do"]:
                case "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hang":
                    time.sleep(600)
                case "raise":
                    raise ValueError("client")
            told = ConfigRecord({"pid": os.getpid(), "loaded": os.environ["LOADED"]})
            return Message(RecordDict({"config": told}), reply_to=message)

    def ask(what: str) -> Message:
        message = Message(RecordDict({"config": ConfigRecord({"do": what})}), 2, "train")
        context = Context(1, 2, {}, RecordDict(), {engine.TIMEOUT: 0.5})
        job = lambda actor, *words: actor.run.remote(*words)  # noqa: E731
        future = pool.submit(job, (App, message, "0", context))
        try:
            return pool.fetch_result_and_return_actor_to_pool(future)[0]
        except Exception:
            pool.add_actor_back_to_pool(future)  # as Flower's RayBackend does
            raise

    assert raybackend.BasicActorPool is ray_pool.LastingPool
    monkeypatch.setattr(ray_pool, "GRACE_S", 0.5)
    with flower_home("127.0.0.1:1") as home:
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=str(home.path))
        try:
            pool = ray_pool.LastingPool(ClientAppActor, {"num_cpus": 1}, {})
            pool.add_actors_to_pool(pool.actors_capacity)
            first = ask("work").content["config"]
            with pytest.raises(ray.exceptions.RayTaskError):
                ask("raise")
            assert ask("work").content["config"] == first
            assert ask("die").error.reason == "its process ended: killed, or out of memory"
            second = ask("work").content["config"]
            assert second["pid"] != first["pid"]
            assert ask("hang").error.reason == "no reply within 0.5 s"
            wait_for(lambda: not lives(second["pid"]))
            assert ask("work").content["config"]["pid"] not in (first["pid"], second["pid"])
        finally:
            ray.shutdown()


# --- real runs


def adapter_of(run: Path, server_round: int = 2) -> bytes:
    return (run / f"peft_{server_round}" / "adapter_model.safetensors").read_bytes()


@needs_ray
@pytest.mark.slow
def test_same_bits_and_same_events_as_in_process(tmp_path: Path) -> None:
    """Float32 on the CPU with as many threads: Flower's simulation ends with the very adapter of the in-process engine."""
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
    for entry in (*ours, *theirs):
        del entry["serialised_bytes"]  # type: ignore[attr-defined]  # node ids, which Flower draws, are part of it
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
        wait_for(lambda: self.started("ray::ClientAppActor.run"))

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
        running.started("ray::ClientAppActor.run")[0].kill()
        running.until_round(2)
        running.started("ray::ClientAppActor.run")[0].suspend()
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
        running.process.send_signal(signal.SIGINT)
        assert running.end(30) == 130, running.text
        assert not any(map(lives, pids))
        assert "fedtune train --resume" in running.text
    with command(tmp_path, "--resume", str(running.run)) as again:
        assert again.end() == 0, again.text
    assert adapter_of(running.run, 3) == adapter_of(whole, 3)


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("victim", ["fedtune.cli.app", "flwr-simulation", "flower-superlink"])
def test_a_killed_process_ends_the_run_and_all_others(tmp_path: Path, victim: str) -> None:
    """Of ourselves nothing is left; of Flower's processes the end is noticed, and the exit code is 4."""
    with command(tmp_path, *tiny("federation.rounds=50")) as running:
        running.until_round(1)
        pids = [process.pid for process in running.started()]
        killed = time.monotonic()
        if victim == "fedtune.cli.app":
            running.process.kill()
            assert running.end(10) == -signal.SIGKILL
        else:
            keepers = [process for process in running.started(victim) if "flower_home" not in process.cmdline()[2]]
            keepers[0].kill()
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
