"""`flwr run .`: the repository is a Flower app, and the same ServerApp and ClientApp run on Flower's own simulation (Ray)."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import tomli_w
from support.ports import free_port

from fedtune.config.load import load_config
from fedtune.federation.train import train

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a Flower with a home and ports of its own; whatever it started is ended by its pid."""
    if find_spec("ray") is None:  # not imported here: the engine ray starts its own Ray only where nothing else did
        pytest.skip("needs the extra: pip install fedtune[ray]")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
    }
    yield environment
    stop_superlinks(tmp_path / "home")


def stop_superlinks(home: Path) -> None:
    """Stop the SuperLink that `flwr run` has started in the background with this home."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words, variables = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
            except OSError:
                continue
            if b"flower-superlink" in words and str(home).encode() in variables:
                os.kill(int(entry.name), signal.SIGTERM)


@pytest.mark.slow
def test_flwr_run_gives_the_same_bits_as_the_in_process_engine(flower: dict[str, str], tmp_path: Path) -> None:
    """Same config and seed, float32 on the CPU: bit-identical adapters on both engines."""
    settings = ["federation.rounds=2", "federation.clients=8", "federation.fraction=0.5", "training.max_steps=2"]
    config = load_config(challenge="tiny", settings=settings).config
    ours = train(config, out=tmp_path / "ours")
    run = tmp_path / "theirs"
    run.mkdir()
    run_config = tmp_path / "run-config.toml"
    run_config.write_text(tomli_w.dumps({"fedtune-config": config.model_dump_json(), "run-dir": str(run)}))
    done = subprocess.run(
        [
            "flwr",
            "run",
            str(PROJECT),
            "--stream",
            "--run-config",
            str(run_config),
            "--federation-config",
            "num-supernodes=8",
        ],
        env=flower,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert (run / "peft_2" / "adapter_model.safetensors").is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    theirs = (run / "peft_2" / "adapter_model.safetensors").read_bytes()
    assert theirs == (ours.adapter / "adapter_model.safetensors").read_bytes()
