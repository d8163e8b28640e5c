"""Loads the base model and its tokenizer, once per process."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fedtune.config.schema import ModelConfig
from fedtune.errors import ConfigError, MissingError, Problem
from fedtune.models.dequantize import dequantize, worth_dequantizing
from fedtune.models.hub import resolve_base
from fedtune.runs.log import silence_libraries


@dataclass(frozen=True)
class Base:
    """A base model in memory: frozen weights, evaluation mode."""

    model: Any
    """transformers' PreTrainedModel."""
    tokenizer: Any
    """transformers' PreTrainedTokenizer."""
    revision: str | None
    """The commit on the hub that was loaded; None for a folder or a built-in model."""
    device: torch.device
    compute_dtype: torch.dtype
    """Arithmetic of forward and backward: bfloat16 or float32."""
    dequantized: bool
    """Whether 4-bit weights are held dequantized."""


def load_base(config: ModelConfig) -> Base:
    """Load the base model of `config` and its tokenizer, on the GPU if there is one.

    Raises:
        MissingError: model, weights or tokenizer are not there or cannot be read.
        ConfigError: the model needs code of its own that `config` does not allow.
    """
    resolved = resolve_base(config)
    check_code(config, resolved.folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(config, device)
    tokenizer = _tokenizer(config, resolved.folder)
    try:
        with silence_libraries():
            model = AutoModelForCausalLM.from_pretrained(
                resolved.folder,
                dtype=dtype,
                quantization_config=_quantization(config, dtype),
                device_map={"": device},
                trust_remote_code=config.trust_remote_code,
                use_safetensors=True,
                local_files_only=True,
            )
    except (OSError, SafetensorError) as error:
        raise MissingError(
            f"The weights of {config.base} cannot be read ({type(error).__name__}).",
            hint="Delete that copy and run the same command again to fetch it anew.",
        ) from error
    model.requires_grad_(False)
    model.eval()
    for module in model.modules():
        # On some CPUs bitsandbytes repacks 4-bit weights in the first evaluation; gradients then no longer pass them.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    dequantized = worth_dequantizing(model, config, dtype, free_memory_bytes(device))
    if dequantized:
        dequantize(model, dtype)
    return Base(model, tokenizer, resolved.revision, device, dtype, dequantized)


@lru_cache(maxsize=1)
def load_tokenizer(config: ModelConfig) -> Any:
    """Load the tokenizer of `config.base`; asked again for the same, return it again.

    Raises:
        MissingError: it is not there or cannot be read.
        ConfigError: it needs code of its own that `config` does not allow.
    """
    folder = resolve_base(config).folder
    check_code(config, folder)
    return _tokenizer(config, folder)


def compute_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """Return the number format of forward and backward; `auto` is bfloat16 on a GPU that has it."""
    if config.compute_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[config.compute_dtype]


def free_memory_bytes(device: torch.device) -> int:
    """Return the bytes that can still be taken on `device`: of the GPU, or of the machine's memory."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        # What torch holds but does not use can be used again.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # no such count on macOS; half of what is built in is a fair guess
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _quantization(config: ModelConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if config.quantization == "none":
        return None
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=config.quantization, bnb_4bit_compute_dtype=dtype)


def _tokenizer(config: ModelConfig, folder: Path) -> Any:
    try:
        with silence_libraries():
            return AutoTokenizer.from_pretrained(
                folder, trust_remote_code=config.trust_remote_code, local_files_only=True
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MissingError(
            f"The base model {config.base} has no tokenizer that can be read ({type(error).__name__}).",
            hint="Put its tokenizer files beside its weights, or choose another model.base.",
        ) from error


def check_code(config: ModelConfig, folder: Path) -> None:
    """Refuse a model that needs code of its own unless `config` allows it, and code of a third place always."""
    table = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own_code = table.get("auto_map") or {}
    if not config.trust_remote_code and table.get("model_type") not in CONFIG_MAPPING:
        problem = "this model runs code of its own, which fedtune does only on request and at a pinned model.revision"
        if not own_code:
            problem = f"transformers knows no model of type {table.get('model_type')!r}"
        raise ConfigError([Problem("model.trust_remote_code" if own_code else "model.base", problem)])
    if config.trust_remote_code and "--" in json.dumps(own_code):
        raise ConfigError([Problem("model.base", "its code lies in another repository, which no revision pins")])
