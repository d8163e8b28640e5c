"""A real language model, SmolLM2-135M-Instruct, through the commands, against plain transformers and PEFT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from fedtune.config.schema import ModelConfig
from fedtune.models.adapter import attach_saved, read_adapter
from fedtune.models.base import load_base

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's own calls
]

QUESTIONS = 200
TEXTS = (
    "What are the genetic changes related to COG5-congenital disorder of glycosylation?",
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
)


@pytest.fixture(scope="module", autouse=True)
def both_cores() -> Iterator[None]:
    """Unlike the tests' other models, this one is large enough for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def fedtune(*words: str, cwd: Path) -> Any:
    """Run a command in a process of its own, and return its JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "fedtune.cli.app", *words, "--json"],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def run(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run of 2 clients and 2 rounds on the first 16 rows of MedQuAD, and what the command said."""
    data = Path(__file__).parents[3] / "shared" / "data" / "train" / "medquad.jsonl"
    if not data.is_file():
        pytest.skip("the real data is not here")
    folder = tmp_path_factory.mktemp("real")
    with data.open(encoding="utf-8") as lines:
        (folder / "rows.jsonl").write_text("".join(next(lines) for _ in range(16)), encoding="utf-8")
    settings = [
        f"model.base='{real_model}'",
        "model.quantization='none'",
        "model.compute_dtype='fp32'",
        "data.source='rows.jsonl'",
        "data.instruction='{instruction}\\n{input}'",
        "data.response='{output}'",
        "federation.clients=2",
        "federation.fraction=1.0",
        "federation.rounds=2",
        "training.batch_size=4",
        "training.max_steps=2",
        "training.sequence_length=96",
        "training.learning_rate_max=2e-3",
        "training.learning_rate_min=1e-3",
        "adapter.rank=8",
        "adapter.alpha=16",
        "adapter.dropout=0.0",
    ]
    said = fedtune("train", *(word for setting in settings for word in ("--set", setting)), cwd=folder)
    [path] = (folder / "runs").iterdir()
    return path, said


@torch.no_grad()
def logits_of(model: Any, folder: Path) -> list[torch.Tensor]:
    """Logits of each text, (tokens, vocabulary)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [model(**tokenizer(text, return_tensors="pt")).logits[0].float() for text in TEXTS]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for one, two in zip(found, expected, strict=True):
        assert one.shape == two.shape
        assert float((one - two).abs().max()) <= tolerance * float(two.abs().max())


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def with_adapter(real_model: Path, run: tuple[Path, Any]) -> list[torch.Tensor]:
    """Logits of the base with the run's adapter, by PEFT."""
    base = plain(real_model)
    alone = logits_of(base, real_model)
    adapted = logits_of(PeftModel.from_pretrained(base, run[0] / "peft_2").eval(), real_model)
    for one, two in zip(adapted, alone, strict=True):
        assert float((one - two).abs().max()) > 0.01 * float(two.abs().max()), "the adapter changes the model"
    return adapted


def test_training_lowers_the_loss(run: tuple[Path, Any]) -> None:
    """All rows are in every round, so that the losses of two rounds compare."""
    first, last = run[1]["result"]["first_loss"], run[1]["result"]["last_loss"]
    assert 1.0 < first < 5.0, "as an instruction model does on answers that it has not seen"
    assert last < 0.95 * first


def test_the_adapter_in_peft_is_the_runs_own(
    real_model: Path, run: tuple[Path, Any], with_adapter: list[torch.Tensor]
) -> None:
    base = load_base(ModelConfig(base=str(real_model), quantization="none", compute_dtype="fp32"))
    saved = read_adapter(run[0] / "peft_2")
    adapted = attach_saved(base, saved)
    adapted.load(saved.tensors)
    assert_same(logits_of(adapted.model, real_model), with_adapter, 1e-5)


def test_the_merged_model_is_base_and_adapter(
    real_model: Path, run: tuple[Path, Any], with_adapter: list[torch.Tensor], tmp_path: Path
) -> None:
    fedtune("export", str(run[0]), "--to", "merged", "--out", str(tmp_path / "merged"), cwd=tmp_path)
    # The merged weights are rounded to the base's 16 bits.
    assert_same(logits_of(plain(tmp_path / "merged"), tmp_path / "merged"), with_adapter, 0.02)


def test_fp4_gives_the_logits_of_plain_transformers(real_model: Path) -> None:
    ours = load_base(ModelConfig(base=str(real_model), quantization="fp4", compute_dtype="fp32"))
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32, quantization_config=settings).eval()
    for model in (ours.model, theirs):
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # its arithmetic is bfloat16's
    found, expected = (logits_of(model, real_model) for model in (ours.model, theirs))
    assert_same(found, expected, 1e-4)
    rounded = max(
        float((one - two).abs().max()) / float(two.abs().max())
        for one, two in zip(found, logits_of(plain(real_model), real_model), strict=True)
    )
    assert rounded > 0.02, "4 bits are another model"


def test_fast_answers_are_the_official_ones(real_model: Path, shared_data: Path, tmp_path: Path) -> None:
    words = ["eval", "--model", str(real_model), "--base", "--bench", "medmcqa", "--data-dir"]
    limits = ["--limit", str(QUESTIONS), "--verify", str(QUESTIONS), "--out", str(tmp_path / "results")]
    [result] = fedtune(*words, str(shared_data / "benchmarks"), *limits, cwd=tmp_path)["results"]
    assert result["verified"]["asked"] == QUESTIONS
    assert result["verified"]["equal"] == QUESTIONS
