"""A strategy that changes what travels is one new file: it trains, is forecast and counted, and goes with its file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fedtune

FILE = '''
from typing import Literal

from fedtune.config.strategies.base import StrategyOptions


class QueriesOnly(StrategyOptions):
    """Trains and returns the adapters of query projections only."""

    name: Literal["queries-only"]
    """The other adapters stay as they are."""

    def is_trained(self, name, server_round):
        return "q_proj" in name
'''
TRAIN = (
    *("train", "--challenge", "tiny", "--json"),
    *("--set", "strategy.name=queries-only", "--set", "federation.rounds=2", "--set", "training.max_steps=1"),
)


def test_added_and_removed_again(tmp_path: Path) -> None:
    package = tmp_path / "fedtune"
    shutil.copytree(Path(fedtune.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    file = package / "config" / "strategies" / "queries_only.py"
    file.write_text(FILE)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from fedtune.cli.app import main; main()", *words]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    done = run(*TRAIN)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / json.loads(done.stdout)["result"]["run"]
    entries = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    down, up = (
        {e["bytes"] for e in entries if (e["kind"], e["direction"]) == ("train", way)} for way in ("down", "up")
    )
    assert len(down) == len(up) == 1
    assert 2 * max(up) < max(down), "a reply holds a fraction of the adapter"
    total = json.loads(run("budget", str(folder), "--json").stdout)["audit"]["total"]
    assert total["down_bytes"] + total["up_bytes"] == total["forecast_bytes"]
    file.unlink()
    refused = run(*TRAIN)
    assert refused.returncode == 2
    assert "queries-only" in refused.stderr
