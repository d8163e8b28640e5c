"""An adapter's tensor names and shapes, without weights: by arithmetic where the architecture is known.

    q_proj of a model with hidden size 4096 and 8 key-value heads of 128, rank 32:
    lora_A (32, 4096), lora_B (4096, 32); its v_proj: lora_A (32, 4096), lora_B (1024, 32)

Importing this file and the arithmetic load neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from fedtune.config.facts import Architecture
from fedtune.config.schema import AdapterConfig, ModelConfig

Shapes = dict[str, tuple[int, ...]]


def adapter_shapes(model: ModelConfig, adapter: AdapterConfig, architecture: Architecture | None) -> Shapes:
    """Return shape by name, in PEFT's order, of the adapter that `attach` would put on the base.

    Args:
        model: the base; only its configuration is read, and nothing at all where `architecture` suffices.
        adapter: which modules are adapted, and how.
        architecture: the base's architecture where a challenge or recipe states it.

    Raises:
        MissingError, ConfigError: as `resolve_base` and `attach` do.
    """
    plain_lora = not adapter.dora and not adapter.modules_to_save
    if architecture is not None and plain_lora and adapter.targets != "all-linear":
        targets = architecture.default_targets if adapter.targets == "default" else adapter.targets
        if set(targets) <= {"q_proj", "k_proj", "v_proj", "o_proj"}:
            return _attention_shapes(architecture, targets, adapter.rank)
    return _meta_shapes(model, adapter)


def target_modules(adapter: AdapterConfig, shapes: Iterable[str]) -> list[str]:
    """Return the adapted modules as PEFT names them in `adapter_config.json`, from the names of a LoRA adapter's tensors."""
    from peft.utils.constants import MIN_TARGET_MODULES_FOR_OPTIMIZATION

    if isinstance(adapter.targets, tuple):
        return sorted(set(adapter.targets))
    modules = {re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", name) for name in shapes}
    # PEFT keeps the whole names of all linear modules as long as they are few.
    whole = adapter.targets == "all-linear" and len(modules) < MIN_TARGET_MODULES_FOR_OPTIMIZATION
    return sorted(modules if whole else {module.rpartition(".")[2] for module in modules})


def _attention_shapes(architecture: Architecture, targets: tuple[str, ...], rank: int) -> Shapes:
    hidden = architecture.hidden
    queries = architecture.heads * architecture.head_dim
    keys = architecture.kv_heads * architecture.head_dim
    modules = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
    }
    shapes: Shapes = {}
    for layer in range(architecture.layers):
        for name, (in_features, out_features) in modules.items():
            if name in targets:
                module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
                shapes[f"{module}.lora_A.weight"] = (rank, in_features)
                shapes[f"{module}.lora_B.weight"] = (out_features, rank)
    return shapes


def _meta_shapes(model: ModelConfig, adapter: AdapterConfig) -> Shapes:
    """Build model and adapter from config.json, without memory for their weights."""
    import torch

    from fedtune.models.adapter import peft_model, saved_parameters
    from fedtune.models.base import empty_model, quiet

    empty = empty_model(model)
    with quiet(), torch.device("meta"):
        adapted = peft_model(empty, adapter, low_cpu_mem_usage=True)
    return {key: tuple(parameter.shape) for key, parameter in saved_parameters(adapted).items()}
