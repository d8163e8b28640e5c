"""Where a result comes from: weights, revisions, versions, device and number format."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fedtune.config.schema import BUILTIN_TINY, ModelConfig
from fedtune.models.adapter import CONFIG_FILE, WEIGHTS_FILE
from fedtune.models.base import compute_dtype
from fedtune.models.hub import resolve_base
from fedtune.runs.directory import file_sha256

_PACKAGES = ("fedtune", "torch", "transformers", "peft", "bitsandbytes")


def pin_revision(model: ModelConfig) -> ModelConfig:
    """Return `model` with the commit of its revision on the hub, so that a result names its weights."""
    if not _is_on_hub(model):
        return model
    return model.model_copy(update={"revision": resolve_base(model, only_config=True).revision})


def model_hash(model: ModelConfig) -> str | None:
    """Return a hash of weights, tokenizer and settings of a local or built-in model; None for one on the hub."""
    if _is_on_hub(model):
        return None  # its commit identifies it
    digest = hashlib.sha256()
    folder = resolve_base(model).folder
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def describe(model: ModelConfig, model_sha256: str | None, adapter: Path | None) -> dict[str, Any]:
    """Return the part of a result that identifies weights and arithmetic; `adapter` is None for the base model alone."""
    has_gpu = torch.cuda.is_available()
    dtype = compute_dtype(model, torch.device("cuda" if has_gpu else "cpu"))
    return {
        "model": model.model_dump(mode="json"),
        "model_sha256": model_sha256,
        "adapter_sha256": None if adapter is None else file_sha256(adapter / WEIGHTS_FILE),
        "adapter_config_sha256": None if adapter is None else file_sha256(adapter / CONFIG_FILE),
        "device": str(torch.cuda.get_device_name()) if has_gpu else "cpu",
        "compute_dtype": str(dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def _is_on_hub(model: ModelConfig) -> bool:
    return model.base != BUILTIN_TINY and not Path(model.base).expanduser().is_dir()
