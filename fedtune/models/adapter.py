"""The LoRA adapter: attached to a base in memory, and as files that PEFT reads.

An adapter's tensors are named as PEFT saves them, `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`,
in the order of the model's modules.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from fedtune.config.schema import AdapterConfig
from fedtune.errors import ConfigError, MissingError, Problem
from fedtune.models.base import Base
from fedtune.runs.atomic import write_folder

AdapterTensors = dict[str, torch.Tensor]
"""An adapter's tensors by PEFT's saved names."""

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
MAGNITUDE = "lora_magnitude_vector"
_SAVED = ".modules_to_save.default."
NAMED = 3
"""So many keys of each fault are named; the rest is counted."""


class AdapterError(MissingError):
    """An adapter is not there, cannot be read, or does not fit the model."""


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as read from a folder; not yet checked against a model."""

    tensors: AdapterTensors
    config: dict[str, Any]
    """The whole of its adapter_config.json."""


class AdaptedModel:
    """A base with one adapter attached; clients and rounds swap the adapter's values in place."""

    def __init__(self, base: Base, model: Any) -> None:
        self.base = base
        self.model = model
        """PEFT's PeftModel around `base.model`."""
        self.peft_config: Any = model.peft_config["default"]
        self._parameters = saved_parameters(model)
        self._offset_hooks: list[Any] = []
        self.from_base = {key: tensor for key, tensor in self.tensors().items() if not _is_lora_matrix(key)}
        """What starts as the base has it: modules to save, and DoRA's magnitudes, the norms of its weights' rows."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the adapter."""
        return {key: tuple(parameter.shape) for key, parameter in self._parameters.items()}

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The modules that are adapted, as PEFT names them."""
        return tuple(sorted(self.peft_config.target_modules))

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the adapter's own parameters (float32, on the base's device), in key order."""
        return list(self._parameters.values())

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return them by key."""
        return dict(self._parameters)

    def tensors(self) -> AdapterTensors:
        """Return a copy of the adapter: float32, on the CPU."""
        return {key: p.detach().to("cpu", torch.float32, copy=True) for key, p in self._parameters.items()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy `tensors` into the adapter, in place.

        Raises:
            AdapterError: keys are missing, extra, of another shape, or not finite; the adapter is then unchanged.
        """
        check_tensors(tensors, self.shapes)
        with torch.no_grad():
            for key, parameter in self._parameters.items():
                parameter.copy_(tensors[key])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the base alone inside this context."""
        with self.model.disable_adapter():
            yield

    def set_offset(self, offset: Mapping[str, torch.Tensor]) -> None:
        """Add `offset` to the base's weights while the model computes, in place of what was added before; {} adds nothing.

        Args:
            offset: of a module either `{module}.offset` (out_features, in_features), or the product of
                `{module}.offset_B` (out_features, R) and `{module}.offset_A` (R, in_features); on the CPU.
        """
        for handle in self._offset_hooks:
            handle.remove()
        self._offset_hooks = []
        for name, tensor in offset.items():
            module, _, kind = name.rpartition(".")
            if kind == "offset_A":
                continue
            factors = [tensor] if kind == "offset" else [offset[f"{module}.offset_A"], tensor]
            on_device = [factor.to(self.base.device) for factor in factors]
            self._offset_hooks.append(self.model.get_submodule(module).register_forward_hook(_adding(on_device)))

    def detach(self) -> Base:
        """Take the adapter off and return the base, free for another; this object is of no further use."""
        self.set_offset({})
        self.model.unload()
        self._parameters = {}
        return self.base


def _adding(factors: list[torch.Tensor]) -> Any:
    """Return a forward hook that adds the input times the factors, one after another, to a linear module's output."""

    def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        added = inputs[0]
        for factor in factors:
            added = torch.nn.functional.linear(added.to(factor.dtype), factor)
        return output + added.to(output.dtype)

    return hook


def attach(base: Base, adapter: AdapterConfig) -> AdaptedModel:
    """Put a new adapter on `base`, with weights in float32 on its device.

    Raises:
        ConfigError: `adapter.targets` names modules that are no linear layers of this model, or is `default` where PEFT
            knows no default.
    """
    if hasattr(base.model, "peft_config"):
        raise RuntimeError("the base still carries an adapter: detach that one first")
    model = peft_model(base.model, adapter)
    for parameter in saved_parameters(model).values():  # modules to save come in the base's dtype
        parameter.data = parameter.data.to(torch.float32)
    model.eval()
    return AdaptedModel(base, model)


def attach_saved(base: Base, saved: SavedAdapter) -> AdaptedModel:
    """Put an adapter of `saved`'s form on `base`; its values come with `AdaptedModel.load`.

    Raises:
        AdapterError: its settings do not fit this base.
    """
    if hasattr(base.model, "peft_config"):
        raise RuntimeError("the base still carries an adapter: detach that one first")
    # The base's name is left out: PEFT would warn that this copy of it lies elsewhere.
    known = {field.name for field in fields(LoraConfig)} - {"base_model_name_or_path"}
    try:
        model = _quietly_adapted(base.model, LoraConfig(**{k: v for k, v in saved.config.items() if k in known}))
    except (ValueError, TypeError) as error:
        raise AdapterError(
            f"The adapter does not fit the model {base.model.config.model_type}: {error}",
            hint="Name the base model that it was trained on: --model MODEL",
        ) from error
    model.eval()
    return AdaptedModel(base, model)


def peft_model(model: Any, adapter: AdapterConfig, **options: Any) -> Any:
    """Return PEFT's model of `adapter` around `model`, a transformers model; raises as `attach` does."""
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    linear = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
    if isinstance(adapter.targets, tuple):
        unknown = [t for t in adapter.targets if not any(name == t or name.endswith(f".{t}") for name in names)]
        if unknown:
            raise ConfigError(
                [Problem("adapter.targets", f"this model has no linear module {', '.join(unknown)}; it has {linear}")]
            )
    _check_modules_to_save(model, adapter)
    try:
        return _quietly_adapted(model, lora_config(adapter), **options)
    except ValueError as error:
        if adapter.targets != "default":
            raise
        problem = f"PEFT knows no default for {model.config.model_type}; name some of {linear}"
        raise ConfigError([Problem("adapter.targets", problem)]) from error


def _check_modules_to_save(model: Any, adapter: AdapterConfig) -> None:
    """PEFT passes over names that no module has, and fails deep inside on weights that cannot be trained."""
    for wanted in adapter.modules_to_save:
        found = [module for name, module in model.named_modules() if name == wanted or name.endswith(f".{wanted}")]
        if not found:
            problem = f"this model has no module {wanted}"
        elif any(not p.is_floating_point() for module in found for p in module.parameters()):
            problem = f"{wanted} is quantized and cannot be trained whole"
        else:
            continue
        raise ConfigError([Problem("adapter.modules_to_save", problem)])


def _quietly_adapted(model: Any, config: LoraConfig, **options: Any) -> Any:
    with warnings.catch_warnings():
        # PEFT asks transformers by a name that transformers has deprecated.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        # The config's reference says what becomes of tied modules.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        # GPT-2's Conv1D has its weights turned; PEFT sees that by itself, and says so.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        return get_peft_model(model, config, **options)


def lora_config(adapter: AdapterConfig) -> LoraConfig:
    """Return `adapter` in PEFT's terms."""
    targets = adapter.targets
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=None if targets == "default" else list(targets) if isinstance(targets, tuple) else targets,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        modules_to_save=list(adapter.modules_to_save) or None,
    )


def check_tensors(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check an adapter's tensors against the shapes that they must have.

    Raises:
        AdapterError: keys are missing, extra, of another shape, or not finite floating-point numbers.
    """
    common = [key for key in shapes if key in tensors]
    mismatched = [
        f"{key} {tuple(tensors[key].shape)} instead of {tuple(shapes[key])}"
        for key in common
        if tuple(tensors[key].shape) != tuple(shapes[key])
    ]
    infinite = [key for key in common if not tensors[key].is_floating_point() or not tensors[key].isfinite().all()]
    faults = {
        "missing": [key for key in shapes if key not in tensors],
        "extra": [key for key in tensors if key not in shapes],
        "of another shape": mismatched,
        "not finite": infinite,
    }
    if found := "; ".join(f"{fault}: {_some(keys)}" for fault, keys in faults.items() if keys):
        raise AdapterError(
            f"The adapter does not fit the model: {found}.",
            hint="Use the model.base and the adapter settings that it was trained with.",
        )


def initial_tensors(
    adapter: AdaptedModel | Mapping[str, tuple[int, ...]], seed: int, server_round: int = 0
) -> AdapterTensors:
    """Return the adapter that a run starts from, a pure function of names, shapes and seed.

    A is uniform within ±1/sqrt(in_features), PEFT's Kaiming initialisation, and B is zero: the adapted model starts as
    the base. DoRA's magnitudes and modules to save follow from the base: they need the attached model instead of shapes.

    Args:
        adapter: the attached model, or its adapter's shapes by name.
        seed: the run's seed; the state of torch's own generators and the device do not matter.
        server_round: for strategies that start anew in every round, the round; 0 for a run's first adapter.
    """
    shapes = adapter.shapes if isinstance(adapter, AdaptedModel) else adapter
    tensors = {}
    for key, shape in shapes.items():
        if not _is_lora_matrix(key):
            if not isinstance(adapter, AdaptedModel):
                raise ValueError(f"{key} follows from the base: give the attached model")
            tensors[key] = adapter.from_base[key].clone()
        elif ".lora_A." in key:  # (rank, in_features)
            stream = f"{seed}:{server_round}:{key}" if server_round else f"{seed}:{key}"
            entropy = hashlib.sha256(stream.encode()).digest()
            uniform = np.random.default_rng(list(entropy)).random(shape, dtype=np.float32)
            tensors[key] = torch.from_numpy((uniform * 2 - 1) / np.float32(shape[1] ** 0.5))
        else:  # (out_features, rank)
            tensors[key] = torch.zeros(shape)
    return tensors


def write_adapter(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    adapter: AdapterConfig,
    *,
    base_name: str,
    revision: str | None,
    target_modules: Sequence[str],
) -> None:
    """Write an adapter as PEFT reads it, whole or not at all; the same adapter gives the same bytes.

    Args:
        folder: replaced if it exists.
        tensors: the adapter's tensors by PEFT's saved names.
        adapter: the settings it was trained with.
        base_name: the base as the user named it, `model.base`.
        revision: the base's commit on the hub, if it has one.
        target_modules: the modules that are adapted (`AdaptedModel.target_modules`).
    """
    table = lora_config(adapter).to_dict() | {
        "base_model_name_or_path": base_name,
        "revision": revision,
        "target_modules": sorted(target_modules),
        "inference_mode": True,
    }

    def fill(beside: Path) -> None:
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, beside / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(table, indent=2, sort_keys=True)
        (beside / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

    write_folder(Path(folder), fill)


def read_adapter(folder: Path) -> SavedAdapter:
    """Read a LoRA adapter from a folder as PEFT writes it; `AdaptedModel.load` checks it against the model.

    Raises:
        AdapterError: a file is missing, damaged or a pickle, or this is no LoRA adapter.
    """
    folder = Path(folder)
    hint = "Name a folder with an adapter, such as RUN/peft_10."
    if not folder.is_dir():
        raise AdapterError(f"There is no adapter folder {folder}.", hint=hint)
    if not (folder / WEIGHTS_FILE).is_file():
        pickled = (folder / "adapter_model.bin").exists()
        reason = "holds its weights as a pickle, which fedtune never loads" if pickled else f"has no {WEIGHTS_FILE}"
        raise AdapterError(f"The adapter {folder} {reason}.", hint="Save it as safetensors." if pickled else hint)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"The adapter {folder} has no {CONFIG_FILE}.", hint=hint) from None
    except ValueError:
        raise AdapterError(f"The {CONFIG_FILE} of {folder} is not JSON.", hint=hint) from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise AdapterError(f"The adapter {folder} is of type {kind}; fedtune reads LoRA adapters.", hint=hint)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise AdapterError(f"The {WEIGHTS_FILE} of {folder} is damaged ({error}).", hint="Copy it anew.") from None
    return SavedAdapter(tensors, config)


def saved_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the adapter's parameters in a PeftModel by the names that PEFT saves them under.

    Those are the parameters' own names without the adapter's name; a DoRA magnitude's also without `weight`. Modules to save
    come last, under the names of the modules that they stand for.
    """
    matrices, modules = {}, {}
    for name, parameter in model.named_parameters():
        if MAGNITUDE in name:
            matrices[name.removesuffix(".default.weight")] = parameter
        elif ".lora_" in name:
            matrices[name.replace(".default.", ".")] = parameter
        elif _SAVED in name:
            modules[name.replace(_SAVED, ".")] = parameter
    return matrices | modules


def _is_lora_matrix(key: str) -> bool:
    return ".lora_A." in key or ".lora_B." in key


def _some(keys: Sequence[str]) -> str:
    rest = len(keys) - NAMED
    return ", ".join(keys[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
