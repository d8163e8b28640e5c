"""What all tests share: a clean environment, real data where it is there, small models of our own."""

import os

# The models here are small: on a machine that others use too, a second thread mostly waits. Set before torch is imported;
# processes that tests start inherit it, so that all of them add up in the same order.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("COLUMNS", None)  # set where tests run on several processes; tables would be cut to it

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Only the tests marked `gpu` see a GPU: the others compare bits and floats that hold on the CPU."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test depends on the user's hub login or settings."""
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data beside the project; tests that need it are skipped where it is not."""
    folder = PROJECT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data is not here")
    return folder


@pytest.fixture(scope="session")
def real_model() -> Path:
    """A folder with SmolLM2-135M-Instruct, made once and kept in the user's cache; tests are skipped where it cannot be had."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "fedtune-tests" / "smollm2-135m-instruct"
    command = [sys.executable, str(PROJECT / "scripts" / "real_model.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def flower_identity() -> Iterator[None]:
    """Flower's messages need to know who makes them."""
    from fedtune.federation.engines.in_process import identity

    with identity():
        yield
