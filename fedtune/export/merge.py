"""Adds an adapter to the weights of its unquantized base model, written as safetensors files.

A weight W becomes W + s·B·A, with DoRA m · (W + s·B·A) / ‖W + s·B·A‖ (https://arxiv.org/abs/2402.09353, the norm over the row
of each output); s is alpha / rank, with rsLoRA alpha / sqrt(rank). The sum is computed in float32 and then rounded to the
dtype of the base. The base is never loaded completely: its files are read tensor by tensor.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file

from fedtune.errors import ConfigError, FedTuneError, MissingError
from fedtune.export.checkpoint import RunCheckpoint
from fedtune.export.target import Listener
from fedtune.models.adapter import MAGNITUDE, AdapterError, reading_config
from fedtune.models.base import empty_model
from fedtune.models.compat import (
    LoraEmbedding,
    LoraLayer,
    LoraLinear,
    ParamWrapper,
    has_swapped_features,
    revert_weight_conversion,
)
from fedtune.models.hub import resolve_base
from fedtune.models.stored import check_quantization, read_headers, read_table, weight_files
from fedtune.runs.log import silence_libraries

_PREFIX = "base_model.model."
_USE_FOLDER = "Use --to folder: PEFT then applies the adapter when the model is loaded."


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one weight."""

    lora_a: torch.Tensor
    """(rank, in_features); of an embedding (rank, vocabulary); of stacked experts (experts · rank, in_features)."""
    lora_b: torch.Tensor
    """(out_features, rank); of an embedding (embedding_dim, rank); of stacked experts (out_features, rank · experts)."""
    scale: float
    transposed: bool
    """Whether the weight is stored as (in_features, out_features), as in transformers' Conv1D and in embeddings."""
    magnitude: torch.Tensor | None
    """The magnitude vector of DoRA, (out_features,)."""
    experts: int = 1
    """Number of experts in the parameter, (experts, out_features, in_features)."""


@dataclass(frozen=True)
class PartUpdate:
    """What changes a stored tensor that is one part of a model parameter, such as the weight of one expert."""

    parameter: str
    """The name of the parameter in the model."""
    update: Update
    """The update of the whole parameter."""


@dataclass(frozen=True)
class MergedTensor:
    """A tensor of the merged model, and the stored tensor of the base model that it is made of."""

    name: str
    source: str
    file: Path
    bytes: int


@dataclass(frozen=True)
class Merge:
    """How the stored tensors of the base model change, by their names in its files."""

    stored: Mapping[str, MergedTensor]
    """The stored tensors in the order of the files."""
    updates: Mapping[str, Update]
    parts: Mapping[str, PartUpdate]
    """Tensors that transformers combines into one parameter when it loads the model."""
    model: Any
    """PEFT's model without weights, which knows how tensors are combined."""
    replaced: Mapping[str, torch.Tensor]
    """Modules that were trained whole."""
    split: Mapping[str, str]
    """Tensors that the base model ties to another one and does not store, but the merged model does; with the other's name."""
    untied: bool
    """Whether tensors that config.json ties differ in the merged model."""


def plan_merge(checkpoint: RunCheckpoint) -> Merge:
    """Find the tensor of the base model that each tensor of the adapter changes, without reading weights of the base.

    Raises:
        MissingError: the base is stored quantized, or the adapter does not fit it.
    """
    folder = resolve_base(checkpoint.config.model).folder
    model = _model_without_weights(checkpoint, folder)
    tied: dict[str, str] = dict(model.get_base_model().all_tied_weights_keys)
    stored = {tensor.name: tensor for file in weight_files(folder, str(folder)) for tensor in _tensors_in(file)}
    left = dict(checkpoint.saved.tensors)
    updates: dict[str, Update] = {}
    parts: dict[str, PartUpdate] = {}
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer) or "default" not in module.scaling:
            continue
        update, parameter = _update_of(checkpoint, path, module, left)
        name = f"{path.removeprefix(_PREFIX).replace('.base_layer', '')}.{parameter}"
        names, are_parts = _stored_names(name, stored, tied, model)
        if are_parts:
            parts |= dict.fromkeys(names, PartUpdate(name, update))
        else:
            updates[names[0]] = update
    if tokens := next((key for key in left if ".token_adapter." in key), None):
        raise AdapterError(
            f"{checkpoint.name} trains single tokens (trainable_token_indices), which cannot be merged: {tokens}.",
            hint=_USE_FOLDER,
        )
    whole_modules = checkpoint.saved.config.get("modules_to_save") or ()
    own = {name.replace(".base_layer", "") for name, _ in model.get_base_model().named_parameters()}
    replaced = {}
    for key in list(left):
        # PEFT saves a module that was trained whole under its own name, and likewise the biases and embeddings of the base.
        name = key.removeprefix(_PREFIX).replace(".base_layer", "")
        if any(f".{module}." in key for module in whole_modules) or name in own:
            names, are_parts = _stored_names(name, stored, tied, model)
            if are_parts:
                raise AdapterError(
                    f"{checkpoint.name} holds {name} whole, which the base model stores in parts, so it cannot be merged.",
                    hint=_USE_FOLDER,
                )
            replaced[names[0]] = left.pop(key)
    if left:
        raise AdapterError(
            f"The base model has no module for {min(left)} of {checkpoint.name}.",
            hint="Name the base it was trained on.",
        )
    changed = {*updates, *replaced}
    pairs = [(key, _stored_names(other, stored, {}, model)[0][0]) for key, other in tied.items()]
    untied = {key: other for key, other in pairs if key in changed or other in changed}
    split = {key: other for key, other in untied.items() if key not in stored}
    differ = any(
        not torch.equal(_read(stored[key]), _read(stored[other]))
        for key, other in pairs
        if {key, other} <= stored.keys()
    )
    return Merge(stored, updates, parts, model, replaced, split, bool(untied) or differ)


def _update_of(
    checkpoint: RunCheckpoint, path: str, module: LoraLayer, left: dict[str, torch.Tensor]
) -> tuple[Update, str]:
    """Return the update of an adapted module and the name of its parameter; the tensors are removed from `left`."""
    variant = type(module.lora_variant.get("default")).__name__
    embedding, stacked = isinstance(module, LoraEmbedding), isinstance(module, ParamWrapper)
    kind = variant if variant not in ("NoneType", "DoraLinearVariant", "DoraEmbeddingVariant") else ""
    if not (embedding or stacked or isinstance(module, LoraLinear)):
        kind = type(module).__name__
    if module.lora_bias["default"]:
        kind = "lora_bias"
    if kind:
        raise MissingError(f"{checkpoint.name} is a kind of LoRA that cannot be merged ({kind}).", hint=_USE_FOLDER)
    ends = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    try:
        lora_a, lora_b = (left.pop(f"{path}.{end}") for end in ends)
        magnitude = left.pop(f"{path}.{MAGNITUDE}") if module.use_dora["default"] else None
    except KeyError as error:
        raise AdapterError(f"{checkpoint.name} lacks {error}.", hint="Copy the adapter again.") from None
    scale = module.scaling["default"]
    if isinstance(module, ParamWrapper):
        # Some models store (experts, in_features, out_features).
        transposed = module.num_experts > 1 and not has_swapped_features(module)
        return Update(lora_a, lora_b, scale, transposed, None, module.num_experts), module.parameter_name
    return Update(lora_a, lora_b, scale, embedding or module.fan_in_fan_out, magnitude), "weight"


def _model_without_weights(checkpoint: RunCheckpoint, folder: Path) -> Any:
    """Return PEFT's model on the meta device, which shows the adapted layers and the tied weights."""
    config = checkpoint.config.model
    headers, table = read_headers(folder, config.base), read_table(folder / "config.json", config.base)
    try:
        check_quantization(config.model_copy(update={"quantization": "none"}), table, headers)
    except ConfigError as error:
        raise MissingError(
            f"The base {config.base} is stored quantized, and an adapter can only be merged into full weights.",
            hint="Name the unquantized base in the run's config, or use --to folder.",
        ) from error
    empty = empty_model(config, folder)
    with silence_libraries(), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they concern training and saving, which this model is not used for
        try:
            return get_peft_model(empty, reading_config(checkpoint.saved), low_cpu_mem_usage=True)
        except (ValueError, TypeError, ImportError) as error:
            raise AdapterError(f"{checkpoint.name} does not fit its base: {error}") from error


def _stored_names(
    name: str, stored: Mapping[str, MergedTensor], tied: Mapping[str, str], model: Any
) -> tuple[list[str], bool]:
    """Return the names under which the base model stores a parameter, and whether each holds only a part of it.

    That is the parameter's own name, the name without the prefix of the model (as GPT-2 has it), or the names of the tensors
    that transformers combines into the parameter when it loads the model.
    """
    if name in stored or name in tied:
        return [name], False
    base = model.get_base_model()
    bare = name.removeprefix(f"{base.base_model_prefix}.")
    if bare in stored:
        return [bare], False
    own = {key.replace(".base_layer", ""): parameter for key, parameter in base.named_parameters()}
    if name in own:
        found = revert_weight_conversion(base, {name: own[name].detach()})
        if found and found.keys() <= stored.keys():
            return list(found), len(found) > 1 or any(tensor.shape != own[name].shape for tensor in found.values())
    raise AdapterError(f"The files of the base model hold no {name}, which the adapter changes.", hint=_USE_FOLDER)


def _tensors_in(file: Path) -> Iterator[MergedTensor]:
    """Yield the tensors of a safetensors file in the order of their data."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        yield MergedTensor(name, name, file, end - start)


def _read(stored: MergedTensor) -> torch.Tensor:
    with safe_open(stored.file, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(stored.source)
    return tensor


def merged_tensor(weight: torch.Tensor, update: Update) -> torch.Tensor:
    """Return a merged weight in the dtype and layout of `weight`.

    Args:
        weight: (out_features, in_features), or transposed if `update.transposed`.
        update: What the adapter adds.
    """
    # The operations of PEFT in their order, in one buffer: (out_features, in_features).
    merged = _delta(update)
    merged.add_(weight.mT if update.transposed else weight)
    if update.magnitude is not None:
        norm = torch.linalg.norm(merged, dim=1, keepdim=True)
        merged.mul_(update.magnitude.float().view(-1, 1) / norm)
    return (merged.mT if update.transposed else merged).to(weight.dtype).contiguous()


def _delta(update: Update) -> torch.Tensor:
    """Return s·B·A, (out_features, in_features), or of stacked experts (experts, out_features, in_features)."""
    lora_a, lora_b = update.lora_a.float(), update.lora_b.float()
    if update.experts > 1:
        lora_a = lora_a.reshape(update.experts, -1, lora_a.shape[-1])
        lora_b = lora_b.reshape(lora_b.shape[0], -1, update.experts)
        return torch.einsum("o r e, e r i -> e o i", lora_b, lora_a).mul_(update.scale)
    return (lora_b @ lora_a).mul_(update.scale)


def shards_of(merge: Merge, shard_bytes: int) -> dict[str, list[MergedTensor]]:
    """Return the tensors of each file of the merged model; a file above `shard_bytes` holds a single tensor."""
    tied = [(key, merge.stored[other]) for key, other in merge.split.items()]
    groups: list[list[MergedTensor]] = [[]]
    for stored in merge.stored.values():
        for tensor in (stored, *(replace(stored, name=key) for key, other in tied if other is stored)):
            if groups[-1] and sum(each.bytes for each in groups[-1]) + tensor.bytes > shard_bytes:
                groups.append([])
            groups[-1].append(tensor)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}


def write_shards(merge: Merge, out: Path, shard_bytes: int, listener: Listener | None = None) -> None:
    """Write the merged tensors to the folder `out`: one model.safetensors, or numbered files with an index.

    Raises:
        FedTuneError: a merged weight is not finite.
        AdapterError: the shapes of adapter and base model do not fit.
    """
    shards = shards_of(merge, shard_bytes)
    total, written = sum(tensor.bytes for tensors in shards.values() for tensor in tensors), 0
    parts = _PartUpdates(merge)
    for name, tensors in shards.items():
        buffer = {}
        for tensor in tensors:
            buffer[tensor.name] = _merge_stored(tensor, merge, parts)
            written += tensor.bytes
            if listener is not None:
                listener(written, total)
        save_file(buffer, out / name, metadata={"format": "pt"})
        (out / name).chmod(0o644)  # safetensors gives permissions to the owner only
        del buffer
    if len(shards) > 1:
        index = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
        table = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (out / "model.safetensors.index.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


class _PartUpdates:
    """Splits the update of a parameter into the updates of its stored parts; keeps those of one parameter at a time."""

    def __init__(self, merge: Merge) -> None:
        self.merge, self.parameter = merge, ""
        self.updates: dict[str, torch.Tensor] = {}

    def update(self, name: str) -> torch.Tensor:
        """Return what is added to the stored tensor `name`."""
        part = self.merge.parts[name]
        if part.parameter != self.parameter:
            delta = _delta(part.update)
            whole = delta.mT.contiguous() if part.update.transposed else delta
            self.updates = revert_weight_conversion(self.merge.model.get_base_model(), {part.parameter: whole})
            self.parameter = part.parameter
        return self.updates[name]


def _merge_stored(stored: MergedTensor, merge: Merge, parts: _PartUpdates) -> torch.Tensor:
    """Return a tensor of the merged model."""
    tensor = _read(stored)
    merged = tensor
    if stored.name in merge.replaced:
        merged = merge.replaced[stored.name].to(tensor.dtype).contiguous()
        if merged.shape != tensor.shape:
            raise AdapterError(
                f"{stored.name} is {tuple(tensor.shape)} in the base model, {tuple(merged.shape)} in the adapter."
            )
    try:
        if stored.name in merge.updates:
            merged = merged_tensor(merged, merge.updates[stored.name])
        elif stored.name in merge.parts:
            merged = (parts.update(stored.name) + merged).to(tensor.dtype)
    except RuntimeError as error:
        raise AdapterError(
            f"The adapter does not fit {stored.name} {tuple(tensor.shape)} as the base model stores it: {error}.",
            hint=_USE_FOLDER,
        ) from None
    if merged is tensor:
        # safetensors refuses a file in which two names share memory.
        return tensor.clone() if stored.name != stored.source else tensor
    if not merged.isfinite().all():
        raise FedTuneError(f"The merged {stored.name} holds a value that {tensor.dtype} cannot represent.")
    return merged
