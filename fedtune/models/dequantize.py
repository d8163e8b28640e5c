"""Holds 4-bit weights dequantized in memory: the same values, without dequantizing them in every pass.

A 4-bit layer dequantizes its weight before each product and rounds nothing else, so a plain layer with the dequantized
weight gives the same results. That is not so for int8, which quantizes the activations as well.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit

from fedtune.config.schema import ModelConfig

SHARE_OF_MEMORY = 0.5
"""`auto` dequantizes when the weights take at most this share of the free memory; the rest is left to activations."""


def worth_dequantizing(model: Any, config: ModelConfig, dtype: torch.dtype, free_bytes: int) -> bool:
    """Whether `config.dequantize` asks for it, or leaves it to `free_bytes` of memory and they suffice."""
    if config.quantization not in ("nf4", "fp4") or config.dequantize == "off":
        return False
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    size_bytes = sum(layer.in_features * layer.out_features for layer in layers) * dtype.itemsize
    return config.dequantize == "on" or size_bytes <= SHARE_OF_MEMORY * free_bytes


@torch.no_grad()
def dequantize(model: Any, dtype: torch.dtype) -> None:
    """Replace every 4-bit layer of `model` by a plain one of the same values in `dtype`, in place, layer by layer."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, Linear4bit):
            continue
        plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state).to(dtype)  # (out, in)
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        if module.bias is not None:
            plain.bias = torch.nn.Parameter(module.bias.to(dtype), requires_grad=False)
        plain.training = module.training
        model.set_submodule(name, plain)
        # The layer's 4-bit weight is freed here, before the next one is dequantized.
        del module
    _forget_quantization(model)


def _forget_quantization(model: Any) -> None:
    """Remove transformers' marks of a quantized model: it is a plain one now, to be moved, cast and saved as such."""
    for mark in ("is_loaded_in_4bit", "hf_quantizer", "quantization_method"):
        if mark in vars(model):
            delattr(model, mark)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
