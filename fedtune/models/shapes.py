"""An adapter's tensor names and shapes, without weights: by arithmetic where the architecture is known.

    q_proj of a model with hidden size 4096 and 8 key-value heads of 128, rank 32:
    lora_A (32, 4096), lora_B (4096, 32); its v_proj: lora_A (32, 4096), lora_B (1024, 32)

Importing this file and the arithmetic load neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedtune.config.facts import Architecture
from fedtune.config.schema import AdapterConfig, ModelConfig

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class AdapterForm:
    """An adapter as `attach` would put it on the base."""

    shapes: Shapes
    """Shape by name, in PEFT's order."""
    adapter: AdapterConfig
    default_targets: tuple[str, ...] = ()
    """PEFT's default for the architecture, where arithmetic sufficed."""
    targets: Any = None
    """`models.targets.Targets`; None where arithmetic sufficed."""
    peft_config: Any = None
    """PEFT's LoraConfig as resolved on the model; None where arithmetic sufficed."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of it, one sentence each."""
        return () if self.targets is None else self.targets.notes

    @property
    def not_linear(self) -> tuple[str, ...]:
        """Adapted modules whose update is not the product B·A of a linear layer."""
        return () if self.targets is None else self.targets.not_linear

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """PEFT's resolved config, as `adapter_config.json` holds it."""
        from fedtune.models.adapter import config_table
        from fedtune.models.targets import lora_config

        if self.peft_config is not None:
            return config_table(self.peft_config)
        named = self.adapter.targets if isinstance(self.adapter.targets, tuple) else self.default_targets
        return {**config_table(lora_config(self.adapter)), "target_modules": sorted(set(named))}


def adapter_shapes(model: ModelConfig, adapter: AdapterConfig, architecture: Architecture | None) -> Shapes:
    """Return shape by name, in PEFT's order, of the adapter that `attach` would put on the base; see `adapter_form`."""
    return adapter_form(model, adapter, architecture).shapes


def adapter_form(model: ModelConfig, adapter: AdapterConfig, architecture: Architecture | None) -> AdapterForm:
    """Return the adapter that `attach` would put on the base: names, shapes, PEFT's config.

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
            shapes = _attention_shapes(architecture, targets, adapter.rank)
            return AdapterForm(shapes, adapter, architecture.default_targets)
    return _meta_form(model, adapter)


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


def _meta_form(model: ModelConfig, adapter: AdapterConfig) -> AdapterForm:
    """Build model and adapter from config.json, without memory for their weights."""
    from fedtune.models.adapter import peft_model, saved_parameters
    from fedtune.models.base import empty_model
    from fedtune.models.targets import resolve_targets

    targets = resolve_targets(empty_model(model), adapter)
    adapted = peft_model(empty_model(model), targets, low_cpu_mem_usage=True)
    shapes = {key: tuple(parameter.shape) for key, parameter in saved_parameters(adapted).items()}
    return AdapterForm(shapes, adapter, targets=targets, peft_config=adapted.peft_config["default"])


def read_back(model: ModelConfig, folder: Path, tensors: Mapping[str, Any]) -> None:
    """Load a written adapter with `PeftModel.from_pretrained`, and compare what PEFT then holds with `tensors`.

    The base is a stand-in without memory for its weights: each is one zero that looks as large as the weight.

    Args:
        model: The base; only its configuration is read.
        folder: The written adapter.
        tensors: The adapter in memory, by PEFT's saved names.

    Raises:
        AdapterError: PEFT cannot load it, leaves out tensors of the file, or gets other values.
    """
    import warnings

    import torch
    from peft import PeftModel

    from fedtune.models.adapter import AdapterError, saved_parameters
    from fedtune.models.base import empty_model

    base = _stand_in(empty_model(model))
    hint = "The run's last state is kept; report this with model.base and the adapter's settings."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", "Found missing adapter keys")
            loaded = PeftModel.from_pretrained(base, str(folder), torch_device="cpu", local_files_only=True)
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdapterError(f"PEFT cannot read the adapter that was written: {said}", hint=hint) from error
    found = saved_parameters(loaded)
    faults = [f"{name} is left out" for name in tensors if name not in found]
    faults += [f"{name} is not in the file" for name in found if name not in tensors]
    faults += [
        f"{name} has other values"
        for name, tensor in tensors.items()
        if name in found and not torch.equal(found[name].detach().to(tensor.dtype), tensor)
    ]
    if faults:
        raise AdapterError(
            f"PEFT does not read the adapter that was written as it is: {faults[0]} ({len(faults)} tensors in all).",
            hint=hint,
        )


def _stand_in(empty: Any) -> Any:
    """Give every weight of a model on the meta device one zero on the CPU, repeated without memory."""
    import torch

    for module in empty.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                # In float32: PEFT would round the adapter to a lower precision of its base.
                zero = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
                module._parameters[name] = torch.nn.Parameter(zero, requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
    return empty
