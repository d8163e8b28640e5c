"""The superlink engine, piece by piece, and through a real SuperLink on the loopback that has no nodes."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path

import httpx
import pytest
import torch
from flwr.app import Error, Message, MessageType, RecordDict
from flwr.cli.build import build_fab_from_files
from hypothesis import given
from hypothesis import strategies as st
from support.ports import free_port
from typer.testing import CliRunner

from fedtune.budget.audit import audit
from fedtune.cli.app import app
from fedtune.config.load import load_config
from fedtune.config.schema import FederationConfig, FedTuneConfig
from fedtune.errors import CapError, ConfigError, FederationError, FedTuneError, MissingError, Problem, UsageError
from fedtune.export.card import card
from fedtune.export.checkpoint import open_run
from fedtune.federation.engines import run_sync as mirrors
from fedtune.federation.engines import superlink, superlink_app
from fedtune.federation.engines.run_sync import Copy, Failed, Mirror, Part, Receiver, Signed, copies_in, read_copies
from fedtune.federation.events import (
    AdapterSaved,
    ClientsAwaited,
    ClientsMet,
    DataReady,
    Event,
    ReplyArrived,
    RoundDone,
    RoundStarted,
    RunOpened,
)
from fedtune.federation.flower.connection import connection_of
from fedtune.federation.server import prepared
from fedtune.federation.train import train
from fedtune.runs.directory import RunDirectory

# Flower builds its bundles with a name that pathspec has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")


def there_and_here(tmp_path: Path) -> tuple[RunDirectory, RunDirectory]:
    """Two run directories: the ServerApp's and the local one."""
    there, here = RunDirectory(tmp_path / "there"), RunDirectory(tmp_path / "here")
    there.path.mkdir()
    here.path.mkdir()
    return there, here


def add_adapter(run: RunDirectory, number: int, data: bytes) -> None:
    folder = run.adapter_folder(number)
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(data)
    (folder / "adapter_config.json").write_text("{}")


def files_of(run: RunDirectory) -> dict[str, bytes]:
    return {
        path.relative_to(run.path).as_posix(): path.read_bytes()
        for path in run.path.rglob("*")
        if path.is_file() and "state" not in path.parts
    }


def parts_in(frames: list[str]) -> dict[str, int]:
    """Bytes of each file that were sent."""
    sent: dict[str, int] = {}
    for frame in map(json.loads, frames):
        if frame["kind"] == "part":
            sent[frame["path"]] = sent.get(frame["path"], 0) + len(Part.model_validate_json(json.dumps(frame)).data)
    return sent


def test_a_run_directory_is_copied_as_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "PART_BYTES", 10)
    there, here = there_and_here(tmp_path)
    frames: list[str] = []
    mirror, receiver = Mirror(there, {}, frames.append), Receiver(here)

    def arrive() -> dict[str, int]:
        for frame in frames:
            receiver.take(frame)
        sent = parts_in(frames)
        frames.clear()
        return sent

    there.metrics_file.write_bytes(b"one\n")
    there.comm_cost_file.write_bytes(b"")
    mirror.sync()
    assert arrive() == {"metrics.jsonl": 4, "comm_cost.txt": 0}
    add_adapter(there, 2, bytes(range(25)))
    there.metrics_file.write_bytes(b"one\ntwo\n")
    mirror.sync()
    # Of a file that grew its end, of a new adapter all.
    assert arrive() == {
        "metrics.jsonl": 4,
        "peft_2/adapter_config.json": 2,
        "peft_2/adapter_model.safetensors": 25,
    }
    assert files_of(here) == files_of(there)
    mirror.sync()
    assert frames == []
    # A resumed run has cut its metrics back: the file goes anew.
    there.metrics_file.write_bytes(b"one\nTWO\n")
    mirror.sync()
    assert arrive() == {"metrics.jsonl": 8}
    assert files_of(here) == files_of(there)


def test_a_new_submission_sends_what_is_not_here(tmp_path: Path) -> None:
    there, here = there_and_here(tmp_path)
    for run in (there, here):
        run.metrics_file.write_bytes(b"one\n")
        add_adapter(run, 1, b"same")
        add_adapter(run, 2, b"right" if run is there else b"wrong")
    there.metrics_file.write_bytes(b"one\ntwo\n")
    frames: list[str] = []
    Mirror(there, read_copies(copies_in(here)), frames.append).sync()
    assert parts_in(frames) == {
        "metrics.jsonl": 4,
        "peft_2/adapter_config.json": 2,
        "peft_2/adapter_model.safetensors": 5,
    }
    receiver = Receiver(here)
    for frame in frames:
        receiver.take(frame)
    assert files_of(here) == files_of(there)
    assert read_copies("") == {}


def test_nothing_shows_before_its_hash_was_right(tmp_path: Path) -> None:
    there, here = there_and_here(tmp_path)
    add_adapter(there, 1, b"weights")
    add_adapter(here, 1, b"former")
    before = files_of(here)
    frames: list[str] = []
    Mirror(there, {}, frames.append).sync()
    receiver = Receiver(here)
    for frame in frames[:-1]:
        assert receiver.take(frame) is None
    assert files_of(here) == before
    damaged = Part(path="peft_1/adapter_model.safetensors", offset=0, data=b"weightz").model_dump_json()
    receiver.take(damaged)
    with pytest.raises(FederationError, match="sha256"):
        receiver.take(frames[-1])
    assert files_of(here) == before
    # A ServerApp that was interrupted begins a file's new end again.
    there.metrics_file.write_bytes(b"one\n")
    here.metrics_file.write_bytes(b"one\n")
    receiver = Receiver(here)
    for data in (b"tw", b"two\n"):
        receiver.take(Part(path="metrics.jsonl", offset=4, data=data).model_dump_json())
    digest = hashlib.sha256(b"one\ntwo\n").hexdigest()
    receiver.take(Signed(files={"metrics.jsonl": Copy(size=8, sha256=digest)}).model_dump_json())
    assert here.metrics_file.read_bytes() == b"one\ntwo\n"
    # Those that come later must follow what is there.
    with pytest.raises(FederationError, match="is missing"):
        Receiver(here).take(Part(path="metrics.jsonl", offset=9, data=b"x").model_dump_json())


@given(
    st.text() | st.sampled_from(["../x", "peft_1/../../x", "/x", "config.json", "peft_1/", "state/lock", "peft_x/a"])
)
def test_no_path_leads_elsewhere(path: str) -> None:
    part = Part(path=path, offset=0, data=b"x").model_dump_json()
    signed = Signed(files={path: Copy(size=1, sha256=hashlib.sha256(b"x").hexdigest())}).model_dump_json()
    with tempfile.TemporaryDirectory() as folder:
        for frame in (part, signed):
            with pytest.raises(FederationError, match="no run has"):
                Receiver(RunDirectory(Path(folder))).take(frame)
        assert list(Path(folder).iterdir()) == []


@given(st.text() | st.dictionaries(st.text(), st.text() | st.integers()))
def test_no_text_is_more_than_refused(sent: object) -> None:
    with pytest.raises(FederationError, match="does not know"):
        Receiver(RunDirectory(Path("nowhere"))).take(sent if isinstance(sent, str) else json.dumps(sent))


@given(st.binary(max_size=300))
def test_bytes_travel_unchanged(data: bytes) -> None:
    frame = Part(path="metrics.jsonl", offset=0, data=data)
    assert Part.model_validate_json(frame.model_dump_json()) == frame


def test_events_arrive_as_they_were_told(tmp_path: Path) -> None:
    there, here = there_and_here(tmp_path)
    frames: list[str] = []
    mirror, receiver = Mirror(there, {}, frames.append), Receiver(here)
    told: list[Event] = [
        RunOpened(Path("/there/run"), 3),
        ClientsAwaited([1], 2, "node 7: lost"),
        ClientsMet([5, 2**63], [10, 20]),
        RoundStarted(4, [0, 2], 1e-3),
        ReplyArrived(4, 2, "error", "out of time", None, 0, 0.0),
        RoundDone(4, 1.25, 1e-3, 1, 2, 10**12, 500, 2.5),
    ]
    for event in told:
        mirror(event)
    assert [receiver.take(frame) for frame in frames] == told
    frames.clear()
    mirror(AdapterSaved(4, there.adapter_folder(4)))
    assert receiver.take(frames[0]) == AdapterSaved(4, here.adapter_folder(4))  # where it is here
    assert receiver.take('{"kind": "told", "name": "OfALaterVersion", "event": {}}') is None


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FederationError("Round 3 of {run} failed.", hint="fedtune train --resume {run}"), FederationError),
        (CapError("The next messages would pass the cap.", hint="fedtune train --resume {run}"), CapError),
        (MissingError("No base in {run}."), MissingError),
        (ConfigError([Problem("model.base", "is odd")]), UsageError),
    ],
)
def test_a_failure_is_the_same_here(tmp_path: Path, error: FedTuneError, kind: type[FedTuneError]) -> None:
    there, here = there_and_here(tmp_path)
    for name in ("message", "hint"):
        setattr(error, name, getattr(error, name).replace("{run}", str(there.path)))
    frames: list[str] = []
    Mirror(there, {}, frames.append).fail(error)
    failed = Receiver(here).take(frames[0])
    assert isinstance(failed, Failed)
    ours = failed.as_error(here.path)
    assert type(ours) is kind
    assert ours.exit_code == error.exit_code
    assert ours.hint == error.hint.replace(str(there.path), str(here.path))
    assert str(there.path) not in ours.message


@pytest.mark.parametrize(
    ("address", "settings", "insecure"),
    [
        ("127.0.0.1:8000", {}, True),
        ("localhost:8000", {}, True),
        ("[::1]:8000", {}, True),
        ("127.0.0.1:8000", {"superlink_ca": "ca.crt"}, False),
        ("link.example:443", {}, False),
        ("10.0.0.7:8000", {}, False),
        ("10.0.0.7:8000", {"superlink_insecure": True}, True),
    ],
)
def test_talk_is_encrypted_unless_it_stays_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, settings: dict[str, object], insecure: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    make_ca(tmp_path / "ca.crt")
    connection = connection_of(FederationConfig(superlink=address, **settings))  # type: ignore[arg-type]
    assert connection.insecure is insecure
    assert connection.root_certificates == (str(tmp_path / "ca.crt") if "superlink_ca" in settings else None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "federation.superlink is not set"),
        ({"superlink": "http://link.example:80"}, "no address"),
        ({"superlink": "link.example:http"}, "no address"),
        ({"superlink": ":8000"}, "no address"),
        ({"superlink": "hospitals"}, "no connection 'hospitals'"),
        ({"superlink": "hospitals", "superlink_insecure": True}, "says itself"),
        ({"superlink": "a:1", "superlink_ca": "none.crt"}, r"none\.crt"),
        ({"superlink": "a:1", "superlink_ca": "bad.crt"}, r"bad\.crt holds no certificate"),
        ({"superlink": "a:1", "superlink_ca": "ca.crt", "superlink_insecure": True}, "contradict"),
    ],
)
def test_a_superlink_that_cannot_be_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], said: str
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.crt").write_text("no certificate")
    with pytest.raises((UsageError, MissingError), match=said) as caught:
        connection_of(FederationConfig(**settings))  # type: ignore[arg-type]
    assert caught.value.exit_code in (2, 3)


def test_a_connection_of_the_users_flower_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    (tmp_path / "config.toml").write_text(
        '[superlink.hospitals]\naddress = "link.example:8000"\n[superlink.simulation]\naddress = ":local:"\n'
    )
    connection = connection_of(FederationConfig(superlink="hospitals"))
    assert (connection.address, connection.insecure) == ("link.example:8000", False)
    with pytest.raises(UsageError, match="no SuperLink with an address"):
        connection_of(FederationConfig(superlink="simulation"))
    with pytest.raises(MissingError, match="clinics"):
        connection_of(FederationConfig(superlink="clinics"))


def test_no_path_of_this_machine_travels() -> None:
    config = load_config(
        challenge="tiny",
        settings=[
            *("data.source=/home/me/rows.jsonl", "federation.superlink=a:1", "federation.superlink_ca=/home/me/ca.crt"),
            "federation.engine=superlink",
        ],
    ).config
    text = superlink._without_places(config)
    assert "/home/me" not in text
    assert FedTuneConfig.model_validate_json(text, strict=True).training == config.training


def test_the_bundle_names_apps_that_are_there() -> None:
    fab, _ = build_fab_from_files({"pyproject.toml": superlink._bundle().encode()})
    assert len(fab) < 2000
    bundled = tomllib.loads(superlink._bundle())["tool"]["flwr"]["app"]
    for named in bundled["components"].values():
        module, _, attribute = named.partition(":")
        assert hasattr(import_module(module), attribute)
    # Flower refuses a key that the bundle does not have.
    assert set(bundled["config"]) == {"fedtune-config", "fedtune-version", "fedtune-have", "run-name"}


@given(st.text())
def test_a_run_name_is_the_name_of_one_folder(name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FEDTUNE_SERVER_RUNS", raising=False)
        try:
            run = superlink_app.server_run(name)
        except UsageError:
            return
    assert run.path.name == name
    assert run.path.parent == Path.home() / ".fedtune" / "runs"


class Nodes:
    """A grid whose nodes answer one after another; node 7 is gone, and node 8 says nothing."""

    def __init__(self) -> None:
        self.sent: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"to-{message.metadata.dst_node_id}"
            self.sent[message.metadata.message_id] = message
        return list(self.sent)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        for name in sorted(message_ids):
            message = self.sent[name]
            node = message.metadata.dst_node_id
            if node == 8:
                continue
            reply = (
                Message(Error(3, "gone"), reply_to=message) if node == 7 else Message(RecordDict(), reply_to=message)
            )
            reply.metadata.__dict__["_src_node_id"] = 1 if node == 7 else node
            return [reply]
        return []


def test_the_grid_says_which_node_is_gone(flower_identity: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superlink_app, "_POLL_S", 0.01)
    grid = superlink_app.PromptGrid(Nodes())  # type: ignore[arg-type]
    messages = [Message(RecordDict(), node, MessageType.TRAIN) for node in (5, 6, 7, 8)]
    replies = list(grid.send_and_receive(messages, timeout=0.1))
    assert [(reply.metadata.src_node_id, reply.has_error()) for reply in replies] == [(5, False), (6, False), (7, True)]


@pytest.mark.parametrize("targets", ["all-linear", "default", '["v_proj", "q_proj"]'])
def test_shapes_give_the_same_start_as_the_base(tmp_path: Path, targets: str) -> None:
    starts = {}
    for engine in ("in-process", "superlink"):
        config = load_config(
            challenge="tiny", settings=[f"adapter.targets={targets}", f"federation.engine={engine}"]
        ).config
        run = RunDirectory(tmp_path / engine)
        starts[engine] = prepared(None, config.model_dump_json(), run)  # type: ignore[arg-type]
    ours, theirs = starts["superlink"], starts["in-process"]
    assert ours.target_modules == theirs.target_modules
    assert ours.revision == theirs.revision
    assert list(ours.tensors) == list(theirs.tensors)
    assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in theirs.tensors)


def test_nobody_answers(tmp_path: Path) -> None:
    config = load_config(
        challenge="tiny",
        settings=[
            "federation.engine=superlink",
            f"federation.superlink=127.0.0.1:{free_port()}",
            "data.source=gone.csv",
        ],
    ).config
    with pytest.raises(MissingError, match="No SuperLink answers"):
        train(config, out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "rows.jsonl"], "they lie with the nodes"),
        (["--baselines"], "which is not here"),
        (["--superlink-ca", "none.crt"], "none.crt"),
    ],
)
def test_what_the_command_refuses(tmp_path: Path, words: list[str], said: str) -> None:
    """`--superlink` alone means the engine; nothing is asked of an address that nobody has."""
    with contextlib.chdir(tmp_path):
        done = CliRunner().invoke(app, ["train", "--challenge", "tiny", "--superlink", "127.0.0.1:1", *words])
    assert done.exit_code in (2, 3)
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


def make_ca(path: Path) -> None:
    """Write a certificate that signs itself."""
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp384r1", "-nodes"]
    words += ["-keyout", str(path.with_suffix(".key")), "-out", str(path), "-days", "2", "-subj", "/CN=test"]
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    subprocess.run(words, check=True, capture_output=True)


@pytest.fixture
def lonely_superlink(tmp_path: Path) -> Iterator[str]:
    """A SuperLink on the loopback without nodes, its ServerApps' runs under `tmp_path/server`; yields its address."""
    port = free_port()
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FEDTUNE_SERVER_RUNS": str(tmp_path / "server"),
    }
    flags = ["--insecure", "--port", str(port), "--disable-runtime-dependency-installation"]
    with (tmp_path / "superlink.log").open("wb") as log:
        process = subprocess.Popen(["flower-superlink", *flags], env=environment, stdout=log, stderr=log)
    try:
        wait_until(lambda: httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).is_success)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def wait_until(done: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if done():
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_real_superlink_without_nodes(lonely_superlink: str, tmp_path: Path) -> None:
    """Submitted twice: the first time nobody takes part; the second time the SuperLink's machine has the finished run."""
    small = ["federation.rounds=1", "federation.fraction=0.25", "training.max_steps=1"]
    ours = train(load_config(challenge="tiny", settings=small).config, out=tmp_path / "ours")
    config = load_config(
        challenge="tiny",
        settings=[
            *small,
            "federation.client_timeout_s=1",
            "federation.engine=superlink",
            f"federation.superlink={lonely_superlink}",
        ],
    ).config
    with pytest.raises(FederationError, match="0 of 8 clients are there"):
        train(config, out=tmp_path / "runs")
    (path,) = (tmp_path / "runs").iterdir()
    run = RunDirectory(path)
    (there,) = (tmp_path / "server").iterdir()
    assert there.name.startswith(path.name)
    shutil.rmtree(there)
    shutil.copytree(ours.run, there)
    # As after a SuperLink that was started anew without its memory: it does not know the former submission.
    memory = run.superlink_file
    memory.write_text(json.dumps({**json.loads(memory.read_text()), "run_id": 12345}))

    events: list[Event] = []
    result = train(config, out=tmp_path / "runs", resume=run, listener=events.append)
    assert files_of(run).keys() >= {"metrics.jsonl", "ledger.jsonl", "comm_cost.txt", "report.html"}
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (result.adapter / name).read_bytes() == (ours.adapter / name).read_bytes()
    assert (result.last_loss, result.used_bytes) == (ours.last_loss, ours.used_bytes)
    assert [event.resumed_after for event in events if isinstance(event, RunOpened)] == [0, 1]
    assert superlink.SuperLinkEngine().rounds_done(run) == run.committed_rounds() == 1
    assert audit(run).state == "finished"
    finished = open_run(str(path))
    assert finished.is_finished
    # The challenge's data set is not what the nodes have trained on.
    assert finished.config.data.source is None
    assert "`data." not in card(finished).replace("`data.reshuffle", "")
    assert not any(isinstance(event, DataReady) and event.table for event in events)  # nobody has told
