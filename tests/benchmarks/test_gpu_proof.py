"""The GPU proof runs where there is no GPU, so that it is known to work before there is one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' Trainer uses names of its own that it deprecates
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_part_runs_and_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import main

    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--device", "cpu", "--shape", "tiny"])
    assert main() == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["failed"] == []
    losses = [part["first_loss"] for part in found.values() if isinstance(part, dict) and "first_loss" in part]
    assert len(losses) == 6
    assert losses == pytest.approx([losses[0]] * 6, rel=1e-3)  # FP4 moves the loss a little
    assert (
        found["evaluation, float32"]["equal"]
        == found["evaluation, fast"]["equal"]
        == found["evaluation, float32"]["of"]
    )
    table = (tmp_path / "gpu.md").read_text()
    assert "| fedtune |" in table
    assert "| leaderboard's way |" in table
