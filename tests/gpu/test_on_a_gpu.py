"""What only a GPU shows: its own kernels of quantization, and whole commands on it. `make test-gpu` runs these."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.families import build

from fedtune.config.schema import ModelConfig
from fedtune.errors import MissingError
from fedtune.models.base import load_base

pytestmark = pytest.mark.gpu

WEIGHT = "model.layers.1.mlp.up_proj.weight"


def fedtune(*words: str, folder: Path) -> str:
    command = [sys.executable, "-c", "from fedtune.cli.app import main; main()", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4", "int8"])
def test_a_value_that_is_not_finite(tmp_path: Path, value: float, quantization: str) -> None:
    """CUDA's quantization takes a NaN for a number."""
    folder = build("llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights[WEIGHT][3, 5] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingError, match=f"{WEIGHT} of .* holds a value that is not finite"):
        load_base(ModelConfig(base=str(folder), quantization=quantization))  # type: ignore[arg-type]


def test_commands(tmp_path: Path) -> None:
    """Training gives the same bits twice; base and adapter are scored, merged and scored again."""
    words = ("train", "--challenge", "tiny", "--set", "federation.rounds=2", "--out")
    digests = []
    for name in ("one", "two"):
        fedtune(*words, name, folder=tmp_path)
        (run,) = (tmp_path / name).iterdir()
        digests.append(hashlib.sha256((run / "peft_2" / "adapter_model.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1]
    options = ("--runs", "two", "--bench", "tiny", "--json")
    scores = {}
    for mode in ("fast", "official"):
        out = fedtune("eval", *options, "--peft", "peft_2", "--base", "--mode", mode, folder=tmp_path)
        scores[mode] = [result["accuracy"] for result in json.loads(out)["results"]]
    assert len(scores["fast"]) == 2
    for fast, official in zip(scores["fast"], scores["official"], strict=True):
        assert fast == pytest.approx(official, abs=3)  # bf16 may turn a few of 216 answers
    fedtune("export", "--runs", "two", "--to", "merged", "--out", "merged", folder=tmp_path)
