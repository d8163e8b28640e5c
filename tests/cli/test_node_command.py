"""`fedtune node` as a data owner types it: what is checked before anything starts, and a real federation of two nodes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import tomli_w
from typer.testing import CliRunner, Result

from fedtune.cli.app import app
from fedtune.cli.node import _settings
from fedtune.config.load import load_config
from fedtune.runs.atomic import read_json_lines

PROJECT = Path(__file__).parents[2]
CLI = [sys.executable, "-m", "fedtune.cli.app"]
NOBODY = "127.0.0.1:1"
"""No SuperLink listens there."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    row = {"instruction": "Say it.", "input": "Question: where?", "output": "A"}
    path.write_text(f"{json.dumps(row)}\n" * 3)
    return path


def node(*words: str | Path) -> Result:
    flags = ["--superlink", NOBODY, "--partition", "0", "--dry-run", *map(str, words)]
    return CliRunner().invoke(app, ["node", *flags], env={"COLUMNS": "200"})


def test_a_dry_run_says_what_was_found_and_starts_nothing(data: Path) -> None:
    done = node("--data", data, "--model", "builtin:tiny", "--insecure")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"data {data}: 3 rows with the columns instruction, input, output",
        "base model builtin:tiny",
        f"fedtune {version('fedtune')}; runs of another version or base model are refused",
        "nothing was started",
    ]
    assert f"nobody answers at {NOBODY} yet" in done.stderr
    assert "without TLS" in done.stderr


def test_a_template_that_is_the_defaults_is_the_owners_too(data: Path) -> None:
    settings = _settings(data, "builtin:tiny", None, None, None, ['data.instruction="{instruction}"'], None, None, None)
    assert (settings.instruction, settings.response) == ("{instruction}", None)


def test_what_an_owner_insists_on_is_said(data: Path, tmp_path: Path) -> None:
    """Also where it is the default's value: what a run may ask for has none."""
    state = tmp_path / "state"
    terms = ["--state", str(state)]
    terms += ["--set", "privacy.mode=local", "--set", "privacy.epsilon=4", "--set", "privacy.clip=1.0"]
    terms += ["--at-most", "training.batch_size=16", "--at-most", "adapter.rank=8"]
    done = node("--data", data, "--model", "builtin:tiny", "--insecure", "--challenge", "tiny", *terms)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[3:] == [
        "takes part with privacy.mode only local",
        "takes part with privacy.epsilon at most 4.0",
        "takes part with privacy.delta at most 1e-05",
        "takes part with privacy.clip only 1.0",
        "takes part with training.batch_size at most 16",
        "takes part with adapter.rank at most 8",
        f"privacy account {state / 'privacy' / 'account.json'}: new, nothing is spent",
        "nothing was started",
    ]
    assert not state.exists()


@pytest.mark.parametrize(
    ("words", "code", "what", "next_word"),
    [
        (["--model", "builtin:tiny", "--data", "none.jsonl"], 3, "none.jsonl is not there", "--data"),
        (["--model", "builtin:tiny", "--data", "."], 3, "a node has one file", "--data"),
        ([], 2, "No base model is named", "--model BASE"),
        (["--model", "./none"], 3, "There is no folder ./none", "Name a folder"),
        (["--model", "builtin:tiny", "--key", "none"], 3, "There is no key file none", ""),
        (["--model", "builtin:tiny", "--ca", "none"], 3, "There is no certificate file none", ""),
        (["--model", "builtin:tiny", "--ca", "none", "--insecure"], 2, "--insecure means no TLS", "--insecure out"),
        (["--model", "builtin:tiny", "--superlink", "http://there"], 2, "no address", "--superlink HOST:8000"),
        (
            ["--model", "builtin:tiny", "--set", 'data.response="{answer}"'],
            2,
            "no column 'answer'",
            "--set 'data.response=\"{instruction}\"'",
        ),
        (
            ["--challenge", "medical", "--model", "builtin:tiny", "--set", 'data.instruction="{q}"'],
            2,
            "no column 'q'",
            "",
        ),
        (
            ["--model", "builtin:tiny", "--at-most", "training.epochs"],
            2,
            "--at-most 'training.epochs' is not",
            "--at-most",
        ),
        (
            ["--model", "builtin:tiny", "--at-most", "training.batch=8"],
            2,
            "did you mean training.batch_size? (from --at-most",
            "",
        ),
        (
            ["--model", "builtin:tiny", "--at-most", "privacy.mode=local"],
            2,
            "takes numbers",
            "--set privacy.mode=local",
        ),
        (["--model", "builtin:tiny", "--set", "privacy.epsilon=4"], 2, "asks for no privacy", "privacy.mode=local"),
        (["--model", "owner/name", "--set", "model.trust_remote_code=true"], 2, "40 hex digits", ""),
    ],
)
def test_mistakes_are_one_sentence_and_a_next_step(
    data: Path, words: list[str], code: int, what: str, next_word: str
) -> None:
    done = node(*([] if "--data" in words else ["--data", data]), *words)
    assert done.exit_code == code, done.stderr
    assert what in done.stderr
    assert next_word in done.stderr
    assert "Traceback" not in done.stderr


def test_templates_of_a_challenge_must_fit_the_columns(data: Path) -> None:
    data.write_text('{"question": "Where?", "answer": "A"}\n')
    done = node("--data", data, "--challenge", "tiny")
    assert done.exit_code == 2
    assert "data.instruction: the data has no column 'instruction'; it has 'question', 'answer'" in done.stderr
    fitting = ["--set", 'data.instruction="{question}"', "--set", 'data.response="{answer}"']
    assert node("--data", data, "--challenge", "tiny", *fitting).exit_code == 0


# Real processes on loopback


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


Start = Callable[..., tuple[subprocess.Popen[bytes], Path]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a program of this environment in the background; returns it and the file that its words go to."""
    running = []
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
    }

    def run(*words: str | Path) -> tuple[subprocess.Popen[bytes], Path]:
        said = tmp_path / f"said-{len(running)}.txt"
        with said.open("wb") as file:
            child = subprocess.Popen(
                [str(word) for word in words], env=environment, cwd=tmp_path, stdout=file, stderr=file
            )
        running.append(child)
        return child, said

    yield run
    for child in running:
        child.terminate()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def wait_for(text: str, said: Path, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while text not in said.read_text():
        assert time.monotonic() < deadline, said.read_text()[-3000:]
        time.sleep(0.2)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def lives(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_until_gone(pid: int, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while lives(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.2)


Running = tuple[subprocess.Popen[bytes], Path]


def two_files(folder: Path) -> Path:
    """Deal the tiny challenge's rows out to two files; return their folder."""
    lines = (PROJECT / "fedtune/data/builtin/tiny/train.jsonl").read_text().splitlines(keepends=True)
    files = folder / "files"
    files.mkdir()
    for number in range(2):
        (files / f"{number}.jsonl").write_text("".join(lines[number::2]))
    return files


def start_superlink(start: Start, port: int) -> Running:
    superlink, said = start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port))
    wait_for("running on", said)
    return superlink, said


def start_node(start: Start, address: str, number: int, files: Path) -> Running:
    words = ["--superlink", address, "--insecure", "--model", "builtin:tiny", "--partition", str(number)]
    node, said = start(*CLI, "node", *words, "--data", files / f"{number}.jsonl")
    wait_for("SuperNode ID", said)
    return node, said


@pytest.mark.slow
def test_a_node_without_a_key_comes_back_as_another(start: Start, tmp_path: Path) -> None:
    """Killed in round 2, which costs it that round and perhaps the next; then it is there again, under a new id."""
    files, port = two_files(tmp_path), free_port()
    address = f"127.0.0.1:{port}"
    start_superlink(start, port)
    start_node(start, address, 0, files)
    small = ["federation.rounds=5", "federation.clients=2", "federation.fraction=1.0", "training.max_steps=2"]
    words = ["--challenge", "tiny", "--superlink", address, *(word for one in small for word in ("--set", one))]
    training, said = start(*CLI, "train", *words, "--out", tmp_path / "runs")
    wait_for("1 of 2 clients are there, missing 1", said)
    lost, _ = start_node(start, address, 1, files)
    wait_for("round 1/5", said)
    (supernode,) = children(lost.pid)
    os.kill(supernode, signal.SIGKILL)  # no goodbye to the SuperLink
    lost.kill()
    lost.wait()
    start_node(start, address, 1, files)
    assert training.wait(400) == 0, said.read_text()
    (run,) = (tmp_path / "runs").iterdir()
    status = {(line["round"], line["partition"]): line["status"] for line in read_json_lines(run / "metrics.jsonl")}
    assert "error" in status.values()
    assert [status[5, partition] for partition in (0, 1)] == ["ok", "ok"]


@pytest.mark.slow
def test_a_federation_of_two_nodes(start: Start, tmp_path: Path) -> None:
    """Same bits as in-process; a strange bundle is not run; a SuperLink that forgot is joined again; no process is left."""
    from fedtune.federation.train import train

    files, port = two_files(tmp_path), free_port()
    address = f"127.0.0.1:{port}"
    (tmp_path / "home").mkdir()
    connection = {"superlink": {"default": "here", "here": {"address": address, "insecure": True}}}
    (tmp_path / "home" / "config.toml").write_text(tomli_w.dumps(connection))
    superlink, said_by_superlink = start_superlink(start, port)
    nodes = [start_node(start, address, number, files) for number in range(2)]

    # What the server knows of its own places must mean nothing to the nodes.
    changes = ["federation.rounds=2", "federation.clients=2", "federation.fraction=1.0", "training.max_steps=2"]
    config = load_config(challenge="tiny", settings=[*changes, "data.partitioner=files", f"data.source={files}"]).config
    there = config.model_copy(update={"data": config.data.model_copy(update={"source": "/nowhere/hunter2"})})
    told = submit(start, PROJECT, there.model_dump_json(), tmp_path / "run")
    ours = train(config, out=tmp_path / "ours")
    name = "adapter_model.safetensors"
    theirs = tmp_path / "run" / "peft_2" / name
    assert theirs.is_file(), told
    assert theirs.read_bytes() == (ours.adapter / name).read_bytes()

    # Flower's own SuperNode would import this bundle's ClientApp, which leaves a file behind.
    taken = tmp_path / "taken"
    told = submit(start, strange_app(tmp_path, taken), there.model_dump_json(), tmp_path / "strange")
    assert "bundle is of another app than fedtune" in told
    assert not taken.exists()

    # A SuperLink that forgets its nodes is joined again.
    superlink.kill()
    superlink.wait()
    _, said_by_superlink = start_superlink(start, port)
    for _, said in nodes:
        wait_for("joining it again", said)
    deadline = time.monotonic() + 300
    while said_by_superlink.read_text().count("Activated node_id") < 2:
        assert time.monotonic() < deadline, nodes[0][1].read_text()[-2000:]
        time.sleep(0.5)

    # A node that is killed takes its SuperNode with it, one that is asked to end does so by itself.
    (killed, _), (asked, said) = nodes
    (orphan,) = children(killed.pid)
    (child,) = children(asked.pid)
    killed.kill()
    killed.wait()
    wait_until_gone(orphan)
    asked.send_signal(signal.SIGTERM)
    assert asked.wait(30) == 130
    assert not lives(child)
    assert "the same command joins it again" in said.read_text()


def strange_app(folder: Path, taken: Path) -> Path:
    """Write a Flower app that is fedtune's but for its ClientApp, whose import writes the file `taken`."""
    app_folder = folder / "strange-app"
    (app_folder / "stolen").mkdir(parents=True)
    table = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    table["tool"]["flwr"]["app"]["components"]["clientapp"] = "stolen.client:app"
    del table["tool"]["flwr"]["app"]["fab-exclude"]
    (app_folder / "pyproject.toml").write_text(tomli_w.dumps(table))
    for name in ("README.md", "LICENSE"):
        (app_folder / name).write_text((PROJECT / name).read_text())
    (app_folder / "stolen" / "client.py").write_text(
        f"from pathlib import Path\nfrom flwr.clientapp import ClientApp\nPath({str(taken)!r}).touch()\napp = ClientApp()\n"
    )
    return app_folder


def submit(start: Start, app_folder: Path, config_json: str, run: Path) -> str:
    """Run a config on the SuperLink by Flower's own command, and return what that said."""
    run.mkdir()
    run_config = run.with_suffix(".toml")
    run_config.write_text(tomli_w.dumps({"fedtune-config": config_json, "run-dir": str(run)}))
    child, said = start("flwr", "run", app_folder, "here", "--stream", "--run-config", run_config)
    child.wait(300)
    return said.read_text()
