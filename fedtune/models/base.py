"""Loads the base model and its tokenizer, once per process."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from fedtune.config.schema import ModelConfig
from fedtune.errors import ConfigError, MissingError, Problem
from fedtune.models.check import (
    check_agreement,
    check_causal,
    check_finite,
    check_loading,
    recorded_loading,
)
from fedtune.models.compat import CONFIG_MAPPING
from fedtune.models.config_keys import fault_of_model, fault_of_tokenizer, reason
from fedtune.models.dequantize import dequantize, worth_dequantizing
from fedtune.models.hub import resolve_base
from fedtune.models.limits import Limits, limits_of
from fedtune.models.stored import (
    check_quantization,
    check_tables,
    check_values,
    check_weights_named,
    own_code,
    read_headers,
    read_table,
    stored_form,
)
from fedtune.runs.log import silence_libraries

log = logging.getLogger(__name__)


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
    stored_quantized: bool = False
    """Whether the base's files hold the weights quantized already, as the config asks."""


def load_base(config: ModelConfig) -> Base:
    """Load the base model of `config` and its tokenizer, on the GPU if there is one, and check what was loaded.

    Raises:
        MissingError: model, weights or tokenizer are not there, damaged, or do not fit each other.
        ConfigError: the model needs code of its own that `config` does not allow, is not causal, or is stored quantized in
            another form than `config` asks for.
    """
    folder, revision = (resolved := resolve_base(config)).folder, resolved.revision
    model_config = read_model_config(config, folder)
    headers = read_headers(folder, config.base)
    stored = check_quantization(config, read_table(folder / "config.json", config.base), headers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(config, device)
    tokenizer = _tokenizer(config, folder)
    if stored:
        _set_compute_dtype(model_config, dtype)
    try:
        with silence_libraries(), recorded_loading() as report:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                config=model_config,
                dtype=dtype,
                quantization_config=None if stored else _quantization(config, dtype),
                device_map={"": device},
                trust_remote_code=config.trust_remote_code,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # they are in the report, all of them
            )
    except Exception as error:  # transformers and a model's own code raise whatever they like
        if is_out_of_memory(error):
            raise MissingError(
                f"The device's memory does not hold {config.base} with model.quantization = {config.quantization}.",
                hint="Free memory, or hold it smaller: --set model.quantization=nf4",
            ) from error
        raise _unusable(config, folder, error) from error
    _check_generates(model, config)
    model.requires_grad_(False)
    model.eval()
    for module in model.modules():
        # On some CPUs bitsandbytes repacks 4-bit weights in the first evaluation; gradients then no longer pass them.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    try:
        check_loading(model, report, headers, config.base)
    except MissingError:
        if config.quantization == "none":
            with suppress(MissingError):  # that an encoder is no decoder says more than that its heads are unused
                check_causal(model, tokenizer, config, dtype)
        raise
    _note_untied(model, config.base)
    quantized = config.quantization != "none" and not stored
    check_finite(model, headers, config.base, folder if quantized else None)
    dequantized = worth_dequantizing(model, config, dtype, free_memory_bytes(device))
    if dequantized:
        dequantize(model, dtype)
    check_causal(model, tokenizer, config, dtype)
    check_agreement(model, tokenizer, config.base)
    return Base(model, tokenizer, revision, device, dtype, dequantized, stored)


def read_model_config(config: ModelConfig, folder: Path) -> Any:
    """Return transformers' configuration of a base, after all checks that config.json allows; no weights are read.

    Raises:
        MissingError: config.json or another table is damaged, or describes no model.
        ConfigError: as `load_base` raises it.
    """
    check_tables(folder, config.base)
    check_code(config, folder)
    table = read_table(folder / "config.json", config.base)
    check_weights_named(table, config.base)
    check_values(table, config.base)
    check_quantization(config, table)
    try:
        with silence_libraries():
            found = AutoConfig.from_pretrained(
                folder, trust_remote_code=config.trust_remote_code, local_files_only=True
            )
            encoder_decoder = bool(found.is_encoder_decoder)
    except Exception as error:  # transformers and a model's own code raise whatever they like
        raise _unusable(config, folder, error) from error
    found.return_dict = True  # all code here reads outputs by name; that changes no value
    own_class = config.trust_remote_code and "AutoModelForCausalLM" in (getattr(found, "auto_map", None) or {})
    if encoder_decoder:
        raise ConfigError([Problem("model.base", f"{config.base} is an encoder-decoder and no causal language model")])
    if not own_class and type(found) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        if "AutoModelForCausalLM" in (getattr(found, "auto_map", None) or {}):
            raise ConfigError([Problem("model.trust_remote_code", _OWN_CODE)])
        raise ConfigError([Problem("model.base", f"{config.base} is no causal language model")])
    return found


def empty_model(config: ModelConfig, folder: Path | None = None) -> Any:
    """Return the model of `config.base` on the meta device: its modules and shapes without weights.

    Args:
        config: The base.
        folder: Its folder where that is known; otherwise config.json is fetched where needed.

    Raises:
        MissingError, ConfigError: as `read_model_config` and `resolve_base` do.
    """
    folder = folder or resolve_base(config, only_config=True).folder
    model_config = read_model_config(config, folder)
    try:
        with silence_libraries(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # transformers and a model's own code raise whatever they like
        raise _unusable(config, folder, error) from error
    _check_generates(model, config)
    return model


def _note_untied(model: Any, base: str) -> None:
    """Have the config of a loaded model say so where its files hold a head that is not the embedding which it ties it to.

    transformers takes the head of the files, and would replace it by the embedding when it next resizes the two.
    """
    if not (getattr(model.config, "tie_word_embeddings", False) and getattr(model, "_tied_weights_keys", None)):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is embedding.weight:
        return
    for holder in (model.config, model.config.get_text_config(decoder=True)):
        holder.tie_word_embeddings = False
    log.warning(
        "config.json of %s has tie_word_embeddings = true, and the weight files hold a head that differs from the embedding; "
        "the files' head is used",
        base,
    )


def _unusable(config: ModelConfig, folder: Path, error: Exception) -> MissingError:
    """Return the error that says why transformers cannot build a base, with the keys of config.json that are the cause."""
    fault = fault_of_model(folder, config.base, error)
    if fault is None:
        return MissingError(
            f"{config.base} cannot be loaded ({reason(error)}).",
            hint="Check its config.json, copy the model again, or choose another model.base.",
        )
    step = f"Correct {fault.names} in {fault.file}"
    if isinstance(error, ImportError):
        step = f"Remove {fault.names} from {fault.file}, install what it needs"
    return MissingError(
        f"{config.base} cannot be loaded because of {fault} ({reason(error)}).",
        hint=f"{step}, or choose another model.base.",
    )


def _check_generates(model: Any, config: ModelConfig) -> None:
    """Refuse a class of a model's own code that only computes logits: PEFT and evaluation need its `generate`."""
    if not hasattr(model, "prepare_inputs_for_generation"):
        problem = f"{config.base} ({type(model).__name__}) cannot generate text: its class lacks GenerationMixin"
        raise ConfigError([Problem("model.base", problem)])


def check_files(config: ModelConfig, folder: Path) -> tuple[Any, Limits]:
    """Run every check of a base that needs no weights in memory; return its tokenizer and what rows it takes.

    `config.quantization` is not compared with a supported stored form: a node checks its base before it knows the run.

    Raises:
        MissingError, ConfigError: as `load_base` does.
    """
    check_tables(folder, config.base)
    table = read_table(folder / "config.json", config.base)
    config = config.model_copy(update={"quantization": stored_form(table) or "none", "dequantize": "auto"})
    empty = empty_model(config, folder)
    check_quantization(config, table, read_headers(folder, config.base))
    return _tokenizer(config, folder), limits_of(empty)


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


_OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "ALLOC_FAILED",
)
"""What torch's allocators and CUDA's libraries say in a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the device or the machine had no memory left, and nothing about the model."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


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


def _set_compute_dtype(model_config: Any, dtype: torch.dtype) -> None:
    """Have weights that are stored in 4 bits computed with in `dtype`, and not in what they were stored with."""
    for holder in (model_config, model_config.get_text_config(decoder=True)):
        table = getattr(holder, "quantization_config", None)
        if isinstance(table, dict):
            table["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")


_OWN_CODE = (
    "this model runs code of its own, which fedtune does only on request: read the code, then --set "
    "model.trust_remote_code=true, for a model on the hub at a pinned model.revision"
)
_OWN_TOKENIZER = "the tokenizer of t" + _OWN_CODE[1:]


def _tokenizer(config: ModelConfig, folder: Path) -> Any:
    own = _tokenizer_code(config, folder)
    if own and not config.trust_remote_code and not (folder / "tokenizer.json").is_file():
        # transformers would take another class for it; only a tokenizer.json says all of what a tokenizer does.
        raise ConfigError([Problem("model.trust_remote_code", _OWN_TOKENIZER)])
    try:
        with silence_libraries():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=config.trust_remote_code, local_files_only=True
            )
            vocabulary, special = len(tokenizer.get_vocab()), len(set(tokenizer.all_special_ids))
    except Exception as error:  # a damaged tokenizer.json is a bare Exception of the tokenizers library
        if own and not config.trust_remote_code:
            raise ConfigError([Problem("model.trust_remote_code", _OWN_TOKENIZER)]) from error
        if not own and (fault := fault_of_tokenizer(folder, config.base, error)):
            raise MissingError(
                f"The tokenizer of {config.base} cannot be read because of {fault} ({reason(error)}).",
                hint=f"Correct {fault.names} in {fault.file}, or choose another model.base.",
            ) from error
        raise MissingError(
            f"The base model {config.base} has no tokenizer that can be read ({type(error).__name__}).",
            hint="Put its tokenizer files beside its weights, or choose another model.base.",
        ) from error
    if vocabulary <= special + 1:
        # Without its files, transformers makes some tokenizers up: special tokens, and at most a space.
        raise MissingError(
            f"The base model {config.base} has no tokenizer that can be read (it knows no token).",
            hint="Put its tokenizer files beside its weights, or choose another model.base.",
        )
    return tokenizer


def _tokenizer_code(config: ModelConfig, folder: Path) -> set[str]:
    path = folder / "tokenizer_config.json"
    return own_code(read_table(path, config.base)) if path.is_file() else set()


def check_code(config: ModelConfig, folder: Path) -> None:
    """Refuse a model or tokenizer that needs code of its own unless `config` allows it, and code of a third place always.

    Raises:
        ConfigError: the code is not allowed.
        MissingError: config.json or tokenizer_config.json is damaged.
    """
    table = read_table(folder / "config.json", config.base)
    code = own_code(table) | _tokenizer_code(config, folder)
    kind = table.get("model_type")
    if config.trust_remote_code:
        if any("--" in name for name in code):
            raise ConfigError([Problem("model.base", "its code lies in another repository, which no revision pins")])
        return
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if own_code(table):
            raise ConfigError([Problem("model.trust_remote_code", _OWN_CODE)])
        raise ConfigError([Problem("model.base", f"transformers knows no model of type {kind!r}")])
    if code:
        log.warning(
            "%s brings code of its own (%s), which does not run; transformers' own %s classes are used",
            config.base,
            min(code),
            kind,
        )
