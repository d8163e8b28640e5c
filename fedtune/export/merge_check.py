"""Compares a merged model with its base model and adapter by their logits."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch

from fedtune.config.schema import ModelConfig
from fedtune.errors import FedTuneError
from fedtune.export.checkpoint import RunCheckpoint
from fedtune.models.adapter import attach_saved
from fedtune.models.base import Base, free_memory_bytes, load_base
from fedtune.models.stored import read_headers
from fedtune.units import format_bytes

PROMPTS = (
    "The capital of France is",
    "Question: What is the taste of bridwort?\n\nAnswer:",
    "def add(a, b):\n    return",
)

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference between the logits of merged model and adapter model, both computed in float32, as a share of the largest
logit, by the dtype of the merged weights."""


@dataclass(frozen=True)
class Agreement:
    """How far the logits of the merged model are from those of base model and adapter."""

    difference: float
    """Largest difference over all prompts, as a share of the largest logit."""
    effect: float
    """The same between the base model with and without adapter: the effect of the adapter."""


def check_merged(checkpoint: RunCheckpoint, merged: Path) -> str:
    """Compare the merged model in a folder with base model and adapter; return the result as a sentence.

    Raises:
        FedTuneError: the logits differ by more than the tolerance.
    """
    dtype = _dtype_of(merged)
    needed = 4 * sum(path.stat().st_size for path in merged.glob("*.safetensors")) // dtype.itemsize
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = free_memory_bytes(device)
    if needed * 1.2 > free:
        return (
            f"Not checked: comparing the logits takes {format_bytes(needed * 1.2)} of memory for the model in float32, and "
            f"{format_bytes(free)} are free."
        )
    found = compare(checkpoint, merged)
    most = TOLERANCE[dtype]
    text = f"the logits differ by at most {found.difference:.1e} of the largest, the adapter moves them by {found.effect:.1e}"
    if not found.difference <= most:
        raise FedTuneError(
            f"The merged model does not give the logits of base and adapter: {text}; allowed are {most:g} in {dtype}.",
            hint="Nothing was written. Use --to folder, and report this with the base's name.",
        )
    return f"Checked against base and adapter on {len(PROMPTS)} prompts: {text} (allowed: {most:g} in {dtype})."


def compare(checkpoint: RunCheckpoint, merged: Path) -> Agreement:
    """Compute the logits of `PROMPTS` with base, base and adapter, and merged model, one model in memory at a time."""
    full = checkpoint.config.model.model_copy(
        update={"quantization": "none", "compute_dtype": "fp32", "dequantize": "auto"}
    )
    base = load_base(full)
    without_adapter = _logits(base)
    attach_saved(base, checkpoint.saved).load(checkpoint.saved.tensors)
    expected = _logits(base)
    del base
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    code = {"revision": full.revision, "trust_remote_code": full.trust_remote_code}
    got = _logits(load_base(ModelConfig(base=str(merged.resolve()), quantization="none", compute_dtype="fp32", **code)))
    largest = max(float(each.abs().max()) for each in expected)

    def distance(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True)) / largest

    return Agreement(distance(got, expected), distance(without_adapter, expected))


@torch.inference_mode()
def _logits(base: Base) -> list[torch.Tensor]:
    """Return the logits of every prompt, (1, tokens, vocabulary) each, on the CPU."""
    prompts = (base.tokenizer(prompt, return_tensors="pt").input_ids.to(base.device) for prompt in PROMPTS)
    return [base.model(input_ids=ids).logits.float().cpu() for ids in prompts]


def _dtype_of(folder: Path) -> torch.dtype:
    """Return the least precise dtype of a model's weights for which there is a tolerance."""
    stored = {tensor.dtype for tensor in read_headers(folder, str(folder)).values()}
    return torch.bfloat16 if "BF16" in stored else torch.float16 if "F16" in stored else torch.float32
