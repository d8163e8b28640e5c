"""docs/how-to/three-hospitals.md, typed as it stands: TLS, node keys, a node that dies, everything that is refused, resume."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fedtune.runs.atomic import read_json_lines
from fedtune.runs.directory import RunDirectory

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to" / "three-hospitals.md"

pytestmark = pytest.mark.slow

SMALL = [
    *("--set", "federation.clients=3", "--set", "federation.rounds=3", "--set", "training.max_steps=1"),
    *("--set", 'adapter.targets=["q_proj", "v_proj"]'),
]
WAIT_S = 500.0


class Place:
    """One machine: a folder to type in, a home of its own, and what runs there in terminals of their own."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = int(listener.getsockname()[1])
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in ("FLWR_HOME", "FEDTUNE_SERVER_RUNS")},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "COLUMNS": "200",
        }
        (folder / "home").mkdir()
        blocks = re.findall(r"^```bash\n(.*?)^```", HOW_TO.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        self.blocks = [block.replace("8000", str(self.port)) for block in blocks]
        self.terminals: dict[str, subprocess.Popen[bytes]] = {}

    def block(self, holds: str) -> str:
        """The how-to's one block that holds a text."""
        (found,) = [block for block in self.blocks if holds in block]
        return found

    def type(self, words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )

    def open(self, name: str, words: str) -> None:
        """Type a command that stays; what it says is in `<name>.log`."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.terminals[name] = subprocess.Popen(
                ["bash", "-c", f"exec {words}"],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                # As in a shell, where Ctrl-C works; these tests may run in the background.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
            )

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def end(self, name: str, how: signal.Signals = signal.SIGTERM) -> int:
        process = self.terminals.pop(name)
        process.send_signal(how)
        return process.wait(60)

    def start_superlink(self) -> None:
        self.open("superlink", self.block("flower-superlink"))
        wait_for(
            lambda: self.said("superlink").rfind("Uvicorn running") > self.said("superlink").rfind("Finished server")
        )
        wait_for(lambda: self.type("flwr supernode list hospitals").returncode == 0 if self.registered else True)

    @property
    def registered(self) -> bool:
        return (self.folder / "home" / ".flwr" / "config.toml").exists()

    def start_node(self, name: str) -> None:
        self.open(name, self.block(f"--key {name}/node-key"))

    def wait_for_nodes(self, count: int) -> None:
        wait_for(lambda: self.type("flwr supernode list hospitals").stdout.count("online") == count)

    def server_app(self) -> psutil.Process:
        """The ServerApp's process, a grandchild of this SuperLink."""
        children = psutil.Process(self.terminals["superlink"].pid).children(recursive=True)
        (process,) = [child for child in children if "flwr-serverapp" in " ".join(child.cmdline())]
        return process


def wait_for(done: Callable[[], bool], seconds: float = WAIT_S) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.3)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The how-to, up to the three nodes."""
    for tool in ("openssl", "ssh-keygen", "split"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    place = Place(tmp_path_factory.mktemp("hospitals"))
    try:
        for holds in ("mkdir north", "openssl req", "ssh-keygen"):
            done = place.type(f"set -e\n{place.block(holds)}")
            assert done.returncode == 0, done.stderr
        place.start_superlink()
        done = place.type(f"set -e\n{place.block('supernode register')}")
        assert done.returncode == 0, done.stdout + done.stderr
        for name in ("north", "east", "south"):
            place.start_node(name)
        place.wait_for_nodes(3)
        yield place
    finally:
        for name in list(place.terminals):
            with contextlib.suppress(subprocess.TimeoutExpired):
                place.end(name)


def run_in(folder: Path) -> RunDirectory:
    (path,) = folder.iterdir()
    return RunDirectory(path)


def test_the_how_to_as_written_while_a_node_dies_and_comes_back(place: Place) -> None:
    place.open("train", place.block("fedtune train"))
    wait_for(lambda: "round 1/4" in place.said("train") or place.terminals["train"].poll() is not None)
    # A round takes seconds, a node's start many: north holds the second one up until east is back.
    place.terminals["north"].send_signal(signal.SIGSTOP)
    try:
        place.end("east", signal.SIGKILL)
        place.wait_for_nodes(2)
        place.start_node("east")
        place.wait_for_nodes(3)
    finally:
        place.terminals["north"].send_signal(signal.SIGCONT)
    assert place.terminals.pop("train").wait(WAIT_S) == 0, place.said("train")
    run = run_in(place.folder / "runs")
    assert f"{run.path.relative_to(place.folder)}/peft_4" in place.said("train")
    status = {(line["round"], line["partition"]): line["status"] for line in read_json_lines(run.metrics_file)}
    assert {partition for _, partition in status} == {0, 1, 2}  # an error, too, has a name
    assert [status[4, partition] for partition in (0, 1, 2)] == ["ok"] * 3  # it is back, as the same node
    done = place.type(f"set -e\n{place.block('fedtune budget')}")
    assert done.returncode == 0, done.stderr
    assert "peft_4" in done.stdout
    assert "finished" in done.stdout


@pytest.fixture(scope="module")
def expected(place: Place) -> Path:
    """The adapter of the in-process engine on the same three files."""
    together = place.folder / "together"
    together.mkdir()
    for number, name in enumerate(("north", "east", "south")):
        shutil.copy(place.folder / name / "rows.jsonl", together / f"{number}.jsonl")
    words = " ".join(f"'{word}'" for word in SMALL)
    done = place.type(f"fedtune train --challenge tiny --data together --out in-process {words}")
    assert done.returncode == 0, done.stderr
    return place.folder / done.stdout.strip()


def submit(place: Place, name: str, out: str) -> None:
    words = " ".join(f"'{word}'" for word in SMALL)
    place.open(name, f"fedtune train --challenge tiny --superlink hospitals --out {out} {words}")


def resume(place: Place, out: str) -> Path:
    done = place.type(f"fedtune train --resume --out {out}")
    assert done.returncode == 0, done.stderr
    return place.folder / done.stdout.strip()


def same_adapter(ours: Path, theirs: Path) -> bool:
    return all(
        (ours / name).read_bytes() == (theirs / name).read_bytes()
        for name in ("adapter_model.safetensors", "adapter_config.json")
    )


def test_a_killed_client_finds_its_run_again(place: Place, expected: Path) -> None:
    submit(place, "killed-client", "killed-client")
    wait_for(lambda: "round 1/3" in place.said("killed-client"))
    place.end("killed-client", signal.SIGKILL)
    memory = run_in(place.folder / "killed-client").superlink_file
    submission = json.loads(memory.read_text())["run_id"]
    assert same_adapter(resume(place, "killed-client"), expected)
    assert json.loads(memory.read_text())["run_id"] == submission  # followed, not submitted anew


def test_a_killed_server_app(place: Place, expected: Path) -> None:
    submit(place, "killed-app", "killed-app")
    wait_for(lambda: "round 1/3" in place.said("killed-app"))
    place.server_app().kill()
    assert place.terminals.pop("killed-app").wait(WAIT_S) == 4
    assert "fedtune train --resume killed-app/" in place.said("killed-app")
    adapter = resume(place, "killed-app")
    assert same_adapter(adapter, expected)
    lines = read_json_lines(adapter.parent / "metrics.jsonl")
    assert sorted((line["round"], line["partition"]) for line in lines) == [
        (r, p) for r in (1, 2, 3) for p in (0, 1, 2)
    ]


def test_a_killed_superlink(place: Place, expected: Path) -> None:
    submit(place, "killed-link", "killed-link")
    wait_for(lambda: "round 1/3" in place.said("killed-link"))
    children = psutil.Process(place.terminals["superlink"].pid).children(recursive=True)
    place.end("superlink", signal.SIGKILL)
    psutil.wait_procs(children, timeout=60)  # they end by themselves
    place.start_superlink()
    assert place.terminals.pop("killed-link").wait(WAIT_S) == 4, place.said("killed-link")
    place.wait_for_nodes(3)
    assert same_adapter(resume(place, "killed-link"), expected)


def test_ctrl_c_stops_the_run_over_there_too(place: Place, expected: Path) -> None:
    submit(place, "stopped", "stopped")
    wait_for(lambda: "round 1/3" in place.said("stopped"))
    assert place.end("stopped", signal.SIGINT) == 130
    assert "Round 1 is saved. Go on: fedtune train --resume stopped/" in place.said("stopped")
    assert "finished:stopped" in place.type("flwr list hospitals").stdout
    assert same_adapter(resume(place, "stopped"), expected)


def test_what_is_refused(place: Place) -> None:
    other = place.type(
        "mkdir stranger && cd stranger && ssh-keygen -q -t ecdsa -b 384 -N '' -f node-key && openssl req -x509 -newkey ec"
        " -pkeyopt ec_paramgen_curve:secp384r1 -nodes -keyout ca.key -out ca.crt -subj /CN=Stranger"
    )
    assert other.returncode == 0, other.stderr
    address, node = f"localhost:{place.port}", place.block("--key north/node-key")

    def refused(words: str, code: int, said: str) -> None:
        done = place.type(words)
        assert done.returncode == code, done.stderr
        assert said in done.stderr, done.stderr
        assert "Traceback" not in done.stderr

    train = f"fedtune train --challenge tiny --out refused --superlink {address}"
    refused(f"{train} --superlink-ca stranger/ca.crt", 3, "is not who it says")
    refused(train, 3, "does not answer without encryption")
    refused(node.replace("--ca ca.crt", "--ca stranger/ca.crt"), 2, "stranger/ca.crt")
    refused(re.sub("--ca ca.crt --key .*node-key", "--insecure", node), 2, "speaks TLS")
    unknown = place.type(node.replace("north/node-key", "stranger/node-key"))
    assert unknown.returncode == 4
    assert "Failed to activate SuperNode" in unknown.stdout + unknown.stderr
    assert not (place.folder / "refused").exists()
