"""Nothing hides: a client's traceback is in the run's debug.log, on every engine, and the terminal names the file."""

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import typer
from test_train_command import SMALL, fedtune, the_run, typed
from typer.testing import CliRunner

from fedtune.cli.console import guarded
from fedtune.config.load import load_config
from fedtune.federation import client
from fedtune.runs.log import run_log

WORDS = ("--set", "federation.rounds=2", "--set", "federation.fraction=1.0", "--set", "training.max_steps=1")

BROKEN = '''
"""Python imports this at its start: client 3's training raises from then on, in whatever process it is."""
import importlib.abc, importlib.machinery, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "fedtune.federation.client":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            train = module.train_locally
            def a_step_that_fails(*args, seed, **options):
                if seed[2] == 3 and seed[1] == 1:
                    {"row": 1}["needle"]
                return train(*args, seed=seed, **options)
            module.train_locally = a_step_that_fails
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
'''


@pytest.fixture
def failing_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Client 3's training raises in round 1."""
    train = client.train_locally

    def a_step_that_fails(*args: Any, seed: Any, **options: Any) -> Any:
        if seed[1:] == (1, 3):
            {"row": 1}["needle"]
        return train(*args, seed=seed, **options)

    monkeypatch.setattr(client, "train_locally", a_step_that_fails)
    return


def check_log(text: str) -> None:
    """The log has the client's whole traceback, once."""
    assert text.count("Client 3 failed.\nTraceback (most recent call last):") == 1
    assert text.count("in a_step_that_fails") == 1
    assert text.count("\nKeyError: 'needle'\n") == 1


def test_a_clients_exception_is_in_the_log_and_the_terminal_names_the_file(
    tmp_path: Path, failing_client: None
) -> None:
    done = typed("train", *SMALL, *WORDS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = the_run(tmp_path)
    file = run.log_file.relative_to(tmp_path)
    said = done.stderr.replace("\n", " ")
    assert said.count(f"warning: Round 1: client 3 failed: KeyError; the traceback is in {file}.") == 1
    assert "Traceback" not in done.stderr
    assert "needle" not in done.stderr
    check_log(run.log_file.read_text())
    assert "needle" not in run.metrics_file.read_text() + run.ledger_file.read_text()


def test_debug_shows_the_traceback(tmp_path: Path, failing_client: None) -> None:
    done = typed("train", *SMALL, *WORDS, "--debug", cwd=tmp_path)
    assert done.returncode == 0
    check_log(done.stderr.replace("Client 3 failed.", "Client 3 failed.", 1))
    check_log(the_run(tmp_path).log_file.read_text())


def test_a_failure_of_the_run_itself_is_in_the_log_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("weights")

    monkeypatch.setattr("fedtune.federation.rounds.weights_of", fail)
    done = typed("train", *SMALL, cwd=tmp_path)
    assert done.returncode == 1
    text = the_run(tmp_path).log_file.read_text()
    assert "ZeroDivisionError: weights" in text
    assert "in fail" in text


def test_a_resumed_run_appends_to_its_log(tmp_path: Path) -> None:
    capped = typed("train", *SMALL, "--set", "communication.cap_mib=1.5", cwd=tmp_path)
    assert capped.returncode == 5
    assert typed("train", "--resume", "--set", "communication.cap_mib=500.0", cwd=tmp_path).returncode == 0
    text = the_run(tmp_path).log_file.read_text()
    assert text.index("starts the run.") < text.index("CapError: ") < text.index("resumes the run.")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "flwr run"])
def test_on_flowers_engines_too(tmp_path: Path, engine: str) -> None:
    """Actors and server are processes of their own; they write to the same run's log."""
    pytest.importorskip("ray", reason="needs the extra: pip install fedtune[ray]")
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(BROKEN)
    path = os.pathsep.join([str(site), *sys.path])
    words = ["train", *SMALL, *WORDS, "--set", "federation.client_cpus=1"]
    if engine == "ray":
        done = fedtune(*words, "--engine", "ray", cwd=tmp_path, timeout_s=500, PYTHONPATH=path)
        assert done.returncode == 0, done.stderr
        debugged = fedtune(
            *words, "--engine", "ray", "--debug", "--out", "debugged", cwd=tmp_path, timeout_s=500, PYTHONPATH=path
        )
        check_log(debugged.stderr)
    else:
        done = flwr_run(tmp_path, path)
    run = the_run(tmp_path)
    if engine == "ray":
        file = run.log_file.relative_to(tmp_path)
        assert f"client 3 failed: KeyError; the traceback is in {file}" in done.stderr.replace("\n", " ")
        assert "needle" not in done.stderr
    check_log(run.log_file.read_text())


def flwr_run(tmp_path: Path, path: str) -> subprocess.CompletedProcess[str]:
    """Run the project as the Flower app that it is, which makes its own run directory."""
    from support.ports import free_port
    from test_flwr_run import PROJECT, stop_superlinks

    settings = ["federation.rounds=2", "federation.fraction=1.0", "training.max_steps=1"]
    run_config = tmp_path / "run-config.toml"
    config = load_config(challenge="tiny", settings=settings).config
    run_config.write_text(tomli_w.dumps({"fedtune-config": config.model_dump_json()}))
    command = ["flwr", "run", str(PROJECT), "--stream", "--run-config", str(run_config)]
    try:
        return subprocess.run(
            [*command, "--federation-config", "num-supernodes=8"],
            env={
                **os.environ,
                "PYTHONPATH": path,
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "FLWR_HOME": str(tmp_path / "home"),
                "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
                "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
                "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
                "FLWR_TELEMETRY_ENABLED": "0",
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=500,
            check=True,
        )
    finally:
        stop_superlinks(tmp_path / "home")


# --- what a command shows ---------------------------------------------------------------------------------------------


def command(debug: bool = False) -> None:
    """Log what fedtune and its libraries might."""
    logger = logging.getLogger("fedtune.models.base")
    for _ in range(3):
        logger.warning("The tokenizer has [two] ends of text.")
    logger.info("details")
    logging.getLogger("transformers.x").warning("library advice")
    try:
        raise KeyError("inside")
    except KeyError:
        logger.error("Client 1 could not be answered.", exc_info=True)


def shown(*words: str, log: Path | None = None) -> tuple[str, str]:
    """Return what a command with --debug or without shows on stdout and stderr."""
    app = typer.Typer()

    def logging_command(debug: bool = False) -> None:
        if log is None:
            command()
        else:
            with run_log(log), warnings.catch_warnings():
                command()

    app.command()(guarded(logging_command))
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.stdout, done.stderr


def test_warnings_of_fedtune_are_shown_once_on_stderr(tmp_path: Path) -> None:
    out, err = shown(log=tmp_path / "debug.log")
    assert out == ""
    assert err.splitlines() == [
        "warning: The tokenizer has [two] ends of text.",
        f"warning: Client 1 could not be answered; the traceback is in {tmp_path / 'debug.log'}",
    ]
    text = (tmp_path / "debug.log").read_text()
    assert text.count("two] ends") == 3
    assert "library advice" in text
    assert "KeyError: 'inside'" in text


def test_debug_shows_everything(tmp_path: Path) -> None:
    for log in (None, tmp_path / "debug.log"):
        out, err = shown("--debug", log=log)
        assert out == ""
        assert err.count("warning: The tokenizer has [two] ends of text.") == 1
        assert "\ndetails\n" in err
        assert "warning: transformers.x: library advice" in err
        assert err.count("Traceback (most recent call last)") == 1
        assert "KeyError: 'inside'" in err


def test_without_a_log_a_traceback_is_shown(tmp_path: Path) -> None:
    _, err = shown()
    assert "warning: Client 1 could not be answered." in err
    assert "KeyError: 'inside'" in err
    assert "details" not in err


def test_a_command_leaves_logging_as_it_was() -> None:
    def state() -> list[object]:
        loggers = [logging.getLogger(name) for name in ("", "fedtune", "transformers")]
        return [(logger.level, logger.propagate, set(logger.handlers)) for logger in loggers]

    before = state()
    shown()
    shown("--debug")
    assert state() == before
