"""The LoRA adapter: attached to a base in memory, and as files that PEFT reads.

An adapter's tensors are named as PEFT saves them, `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`,
in the order of the model's modules.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedtune.config.schema import AdapterConfig
from fedtune.errors import ConfigError, MissingError, Problem
from fedtune.models import integrity
from fedtune.models.base import Base
from fedtune.models.targets import Targets, empty_copy, lora_config, quietly_adapted, resolve_targets, set_dropout
from fedtune.runs.atomic import write_folder

log = logging.getLogger(__name__)

AdapterTensors = dict[str, torch.Tensor]
"""An adapter's tensors by PEFT's saved names."""

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
MAGNITUDE = "lora_magnitude_vector"
NAMED = 3
"""So many keys of each fault are named; the rest is counted."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations (or their first letters) that take the adapter's first product off the base's weights."""
_NOT_READ = {
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "an activated LoRA (aLoRA)",
    "use_qalora": "QALoRA",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA, which rewrites the base's weights",
    "velora_config": "VeLoRA",
    "megatron_config": "Megatron layers",
}
"""Keys of PEFT's config whose adapters compute otherwise than LoRA does, with what to call them."""
_ABOUT = {"base_model_name_or_path", "auto_mapping", "peft_version"}
"""Keys that change nothing of what an adapter computes."""


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

    def __init__(self, base: Base, model: Any, targets: Targets | None = None, whole: Sequence[str] = ()) -> None:
        """Set up around PEFT's model.

        Args:
            base: The base, which `model` has been put on.
            model: PEFT's PeftModel.
            targets: What the config came to, where this adapter is to be trained.
            whole: Names of the base's own parameters that come with the adapter: its biases, or resized embeddings.
        """
        self.base = base
        self.model = model
        """PEFT's PeftModel around `base.model`."""
        self.peft_config: Any = model.peft_config["default"]
        self.targets = targets
        self._parameters = saved_parameters(model)
        own = dict(model.named_parameters(remove_duplicate=False))
        self._parameters |= {key: own[key] for key in whole}
        of_base = integrity.parameters_of(base.model)
        self._replaced = {
            key: (parameter, parameter.detach().clone())
            for key, parameter in self._parameters.items()
            if id(parameter) in of_base
        }
        """The base's own parameters that the adapter gives other values, with those that the base has."""
        self._offset_hooks: list[Any] = []
        self.from_base = {key: tensor for key, tensor in self.tensors().items() if not _is_lora_matrix(key)}
        """What starts as the base has it: modules to save, and DoRA's magnitudes, the norms of its weights' rows."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the adapter."""
        return {key: tuple(parameter.shape) for key, parameter in self._parameters.items()}

    @property
    def resolved(self) -> dict[str, Any]:
        """PEFT's resolved config, as `adapter_config.json` holds it."""
        return config_table(self.peft_config)

    @property
    def target_modules(self) -> tuple[str, ...] | str:
        """The modules that are adapted, as PEFT names them: names, or a regular expression."""
        targets = self.peft_config.target_modules
        return targets if isinstance(targets, str) else tuple(sorted(targets or ()))

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
        held = {key: parameter.detach().clone() for key, (parameter, _) in self._replaced.items()}
        self._give_back()
        try:
            with self.model.disable_adapter():
                yield
        finally:
            with torch.no_grad():
                for key, values in held.items():
                    self._parameters[key].copy_(values)

    def check_base(self, when: str) -> None:
        """Check that the base's weights are bit for bit what they were when it was loaded.

        Raises:
            FedTuneError: they are not; the first tensor that differs is named.
        """
        integrity.check(self.base.model, when, besides=[parameter for parameter, _ in self._replaced.values()])

    def _give_back(self) -> None:
        """Put the base's own values back where the adapter has replaced them."""
        with torch.no_grad():
            for parameter, values in self._replaced.values():
                parameter.copy_(values)

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
        self._give_back()
        self._replaced = {}
        _take_off_whole_modules(self.base.model)
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
        ConfigError: `adapter.targets` names what this model does not have, what PEFT cannot adapt, or nothing that training
            on text reaches.
    """
    _check_bare(base)
    targets = resolve_targets(empty_copy(base.model), adapter)
    for note in targets.notes:
        log.warning("%s.", note)
    _check_not_quantized(base.model, adapter)
    model = peft_model(base.model, targets)
    for parameter in saved_parameters(model).values():  # modules to save come in the base's dtype
        parameter.data = parameter.data.to(torch.float32)
    model.eval()
    return AdaptedModel(base, model, targets)


def attach_saved(base: Base, saved: SavedAdapter) -> AdaptedModel:
    """Put an adapter of `saved`'s form on `base`; its values come with `AdaptedModel.load`.

    The initialisation that the adapter was made with does not run: it may change the base, and its values are replaced.

    Raises:
        AdapterError: its settings do not fit this base, or it is of a kind that is not read.
    """
    _check_bare(base)
    try:
        model = quietly_adapted(base.model, reading_config(saved))
    except (ValueError, TypeError, ImportError) as error:
        _take_off(base.model)
        raise AdapterError(
            f"The adapter does not fit the model {base.model.config.model_type}: {error}",
            hint="Name the base model that it was trained on: --model MODEL",
        ) from error
    model.eval()
    known = saved_parameters(model)
    own = dict(model.named_parameters(remove_duplicate=False))
    # PEFT saves embeddings whole beside their adapter, and after the vocabulary was resized.
    whole = [key for key in saved.tensors if key not in known and key in own]
    return AdaptedModel(base, model, whole=whole)


def reading_config(saved: SavedAdapter) -> LoraConfig:
    """Return PEFT's config of a saved adapter, for reading its tensors: without its initialisation, which does not run.

    Raises:
        AdapterError: the adapter is of a kind that is not read, its initialisation has changed the base, or PEFT does not
            accept the config.
    """
    config = saved.config
    for key, name in _NOT_READ.items():
        if config.get(key):
            raise AdapterError(
                f"The adapter uses {name} ({key} in its {CONFIG_FILE}), which fedtune does not read.",
                hint="Load it with PEFT itself.",
            )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"The adapter was trained on weights that its initialisation had changed (init_lora_weights = {init}), and does "
            "not fit the plain base.",
            hint="Convert it where it was trained: model.save_pretrained(FOLDER, "
            "path_initial_model_for_weight_conversion=INITIAL). Where the base already holds the changed weights, set "
            f"init_lora_weights to true in its {CONFIG_FILE}.",
        )
    # The base's name is left out: PEFT would warn that this copy of it lies elsewhere.
    known = {field.name for field in fields(LoraConfig)} - {"base_model_name_or_path"}
    table = {key: value for key, value in config.items() if key in known}
    if unknown := sorted(key for key, value in config.items() if value and key not in known | _ABOUT):
        log.warning(
            "PEFT %s does not know %s of the %s and leaves it out.", peft.__version__, _some(unknown), CONFIG_FILE
        )
    # Settings of initialisations; MiCA's is also the name of its way to compute, which is that of LoRA.
    inert = {"init_lora_weights": False, "loftq_config": {}, "eva_config": None, "corda_config": None}
    try:
        return LoraConfig(**table | inert | {"lora_ga_config": None, "inference_mode": True})
    except (ValueError, TypeError) as error:
        raise AdapterError(f"The {CONFIG_FILE} is not one that PEFT accepts: {error}", hint="Copy it anew.") from error


def peft_model(model: Any, targets: Targets, **options: Any) -> Any:
    """Return PEFT's model of resolved targets around `model`, a transformers model."""
    adapted = quietly_adapted(model, copy.deepcopy(targets.config), **options)
    if targets.dropout and not targets.config.lora_dropout:
        set_dropout(adapted, targets.dropout)
    return adapted


def _check_bare(base: Base) -> None:
    if hasattr(base.model, "peft_config"):
        raise RuntimeError("the base still carries an adapter: detach that one first")
    integrity.watch(base.model)


def _take_off_whole_modules(model: Any) -> None:
    """Put the base's own modules back where an adapter has trained copies: PEFT's `unload` leaves the copies in their place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.original_module)


def _take_off(model: Any) -> None:
    """Take what PEFT has put on a model before it failed off again."""
    _take_off_whole_modules(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer) and hasattr(module, "base_layer"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def _check_not_quantized(model: Any, adapter: AdapterConfig) -> None:
    """PEFT fails deep inside on weights that cannot be trained whole."""
    for wanted in adapter.modules_to_save:
        found = [module for name, module in model.named_modules() if name == wanted or name.endswith(f".{wanted}")]
        if any(not p.is_floating_point() for module in found for p in module.parameters()):
            problem = f"{wanted} is quantized and cannot be trained whole"
            raise ConfigError([Problem("adapter.modules_to_save", problem)])


def config_table(config: LoraConfig) -> dict[str, Any]:
    """Return a PEFT config as JSON has it: sets in alphabetical order, so that the same config gives the same bytes."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


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
    the base. Of an embedding, as in PEFT, A is zero and B is normal: rows of A are looked up, and each of its columns is one
    token's. DoRA's magnitudes and modules to save follow from the base: they need the attached model instead of shapes.

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
        elif is_random(key):
            stream = f"{seed}:{server_round}:{key}" if server_round else f"{seed}:{key}"
            entropy = hashlib.sha256(stream.encode()).digest()
            generator = np.random.default_rng(list(entropy))
            if ".lora_A." in key:  # (rank, in_features); of stacked experts (experts * rank, in_features)
                uniform = generator.random(shape, dtype=np.float32)
                tensors[key] = torch.from_numpy((uniform * 2 - 1) / np.float32(shape[1] ** 0.5))
            else:  # (embedding_dim, rank)
                tensors[key] = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
        else:  # (out_features, rank); of an embedding (rank, vocabulary)
            tensors[key] = torch.zeros(shape)
    return tensors


def write_adapter(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    adapter: AdapterConfig,
    *,
    base_name: str,
    revision: str | None,
    target_modules: Sequence[str] | str = (),
    resolved: Mapping[str, Any] | None = None,
    read_back: Callable[[Path, Mapping[str, torch.Tensor]], None] | None = None,
) -> None:
    """Write an adapter as PEFT reads it, whole or not at all; the same adapter gives the same bytes.

    What was written is read again before it takes its place, and compared with `tensors`.

    Args:
        folder: replaced if it exists.
        tensors: the adapter's tensors by PEFT's saved names.
        adapter: the settings it was trained with; rank, alpha and rsLoRA are taken from here.
        base_name: the base as the user named it, `model.base`.
        revision: the base's commit on the hub, if it has one.
        target_modules: the modules that are adapted, where `resolved` is not given.
        resolved: PEFT's resolved config (`AdaptedModel.resolved`).
        read_back: a further check of the written folder, before it is in its place.

    Raises:
        AdapterError: the files do not hold the adapter, or a value of it is not finite.
    """
    named = target_modules if isinstance(target_modules, str) else sorted(target_modules)
    table = {
        **(resolved if resolved is not None else {**config_table(lora_config(adapter)), "target_modules": named}),
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "use_rslora": adapter.rslora,
        "base_model_name_or_path": base_name,
        "revision": revision,
        "inference_mode": True,
    }

    def fill(beside: Path) -> None:
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, beside / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(table, indent=2, sort_keys=True)
        (beside / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        _check_written(beside, contiguous)
        if read_back is not None:
            read_back(beside, contiguous)

    write_folder(Path(folder), fill)


def _check_written(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check the files of an adapter against what is in memory: keys, shapes, finite, and the same bits."""
    found = read_adapter(folder).tensors
    check_tensors(found, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    if differing := [key for key, tensor in tensors.items() if not torch.equal(found[key], tensor)]:
        raise AdapterError(f"The written adapter does not hold the trained one: {_some(differing)} differ.")


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
    if not isinstance(config, dict):
        raise AdapterError(f"The {CONFIG_FILE} of {folder} is not a JSON object.", hint=hint)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"The adapter {folder} is of type {kind}; fedtune reads LoRA adapters.", hint=hint)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise AdapterError(f"The {WEIGHTS_FILE} of {folder} is damaged ({error}).", hint="Copy it anew.") from None
    _check_numbers(folder, config, tensors)
    return SavedAdapter(tensors, config)


_PLAUSIBLE_RANK = 2**16
"""Larger ranks are refused unless a tensor has such a dimension."""


def _check_numbers(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse ranks and scales that are not numbers, and ranks that no tensor has, for which memory may not suffice."""
    largest = max((max(tensor.shape, default=0) for tensor in tensors.values()), default=0)
    for key, several in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        pattern = found if isinstance(found := config.get(several), dict) else {}
        values = {key: config.get(key, 8)} | {f"{several}[{name!r}]": value for name, value in pattern.items()}
        for place, value in values.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number:
                problem = "which must be a number"
            elif key == "r" and (value < 1 or value != int(value)):
                problem = "which must be a whole number above 0"
            elif key == "r" and value > max(largest, _PLAUSIBLE_RANK):
                problem = f"and the largest dimension of its tensors is {largest}"
            else:
                continue
            raise AdapterError(
                f"The {CONFIG_FILE} of {folder} has {place} = {json.dumps(value)[:40]}, {problem}.",
                hint=f"Copy {CONFIG_FILE} again from the place where the adapter was trained.",
            )


def saved_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the adapter's parameters in a PeftModel by the names that PEFT saves them under, in PEFT's order.

    The base's own biases are among them where the adapter's config trains them.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, torch.nn.Parameter] = get_peft_model_state_dict(model, named, save_embedding_layers=False)
    return found


def is_random(key: str) -> bool:
    """Whether a matrix starts with random values, and its partner with zeros: A of a linear layer, B of an embedding."""
    return ".lora_A." in key or key.endswith(".lora_embedding_B")


def _is_lora_matrix(key: str) -> bool:
    if key.endswith(".bias"):
        return False
    return ".lora_A." in key or ".lora_B." in key or key.endswith((".lora_embedding_A", ".lora_embedding_B"))


def _some(keys: Sequence[str]) -> str:
    rest = len(keys) - NAMED
    return ", ".join(keys[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
