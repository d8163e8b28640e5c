"""`fedtune export --to merged`: the adapter added into the unquantized base, written as safetensors shards.

A target's weight W becomes W + s·B·A, with DoRA m · (W + s·B·A) / ‖W + s·B·A‖ (https://arxiv.org/abs/2402.09353, the norm
over each output's row); s is alpha / rank, with rsLoRA alpha / sqrt(rank). The sum is in float32 and then rounded to the
base's own dtype. The base is never loaded as a whole: its files are read tensor by tensor.
"""

from __future__ import annotations

import gc
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file

from fedtune.config.schema import ModelConfig
from fedtune.errors import ConfigError, FedTuneError, MissingError
from fedtune.export.card import card
from fedtune.export.finished import FinishedRun
from fedtune.export.folder import TOKENIZER_FILES, about_files, base_files, notes
from fedtune.export.package import MANIFEST, Exported, Package, make_room, package
from fedtune.models.adapter import MAGNITUDE, AdapterError, attach_saved, reading_config
from fedtune.models.base import Base, empty_model, free_memory_bytes, load_base, load_tokenizer
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
from fedtune.runs.atomic import write_folder
from fedtune.runs.log import silence_libraries
from fedtune.units import format_bytes

SHARD_BYTES = 2 * 10**9
"""Most bytes of tensors in a file, and so about what is held in memory; a larger tensor has a file of its own."""

OTHER_FILES = ("generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")

PROMPTS = (
    "The capital of France is",
    "Question: What is the taste of bridwort?\n\nAnswer:",
    "def add(a, b):\n    return",
)

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference between the logits of merged and adapter model, computed in float32 both, as a share of the largest
logit, by the dtype that the merged weights are rounded to."""

_PREFIX = "base_model.model."

Listener = Callable[[int, int], None]
"""Told the bytes written so far and in all."""


@dataclass(frozen=True)
class Target:
    """What becomes of one of the base's tensors."""

    lora_a: torch.Tensor
    """(rank, in_features); of an embedding (rank, vocabulary); of stacked experts (experts · rank, in_features)."""
    lora_b: torch.Tensor
    """(out_features, rank); of an embedding (embedding_dim, rank); of stacked experts (out_features, rank · experts)."""
    scale: float
    transposed: bool
    """The weight is stored as (in_features, out_features): transformers' Conv1D, and embeddings."""
    magnitude: torch.Tensor | None
    """DoRA's, (out_features,)."""
    experts: int = 1
    """Experts that lie in one parameter, (experts, out_features, in_features)."""


@dataclass(frozen=True)
class Part:
    """A tensor of the base's files that is a part of one of the model's parameters, such as one expert's weight."""

    parameter: str
    """The parameter's name in the model."""
    target: Target


@dataclass(frozen=True)
class Merge:
    """What is done to the base's tensors, by the names that they have in its files."""

    targets: Mapping[str, Target]
    parts: Mapping[str, Part]
    """Tensors that the model puts together with others when it is loaded."""
    model: Any
    """PEFT's model without weights, which knows how."""
    replaced: Mapping[str, torch.Tensor]
    """Modules that were trained whole."""
    split: Mapping[str, str]
    """Tensors that the base ties to another and does not store, to be stored now: name to the other's."""
    untied: bool
    """Whether tensors that config.json ties differ in the merged model: by the adapter, or in the base's files already."""


@dataclass(frozen=True)
class Agreement:
    """How far the merged model's logits are from those of base and adapter."""

    difference: float
    """Largest difference over all prompts, as a share of the largest logit."""
    effect: float
    """The same between base and adapter model: what the adapter does."""


def export_merged(
    finished: FinishedRun,
    out: Path,
    *,
    licence: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    listener: Listener | None = None,
) -> Exported:
    """Write base and adapter as one model to the folder `out`, whole or not at all, and compare the two forms' logits.

    Memory: the tensors of one output file (`shard_bytes`), and one target in float32. The comparison holds a whole model in
    float32 and is left out, with a note, where memory is short.

    Raises:
        MissingError: the base cannot be had or is stored quantized, or the adapter does not fit it.
        UsageError: `out` holds something else; a file is a link or holds a secret; `licence` is none.
        FedTuneError: the merged model does not give the adapter model's logits, or a merged weight is not finite.
    """
    make_room(out)
    folder = resolve_base(finished.config.model).folder
    merge = plan_merge(finished, folder)
    texts = _texts(finished, folder, merge, licence)
    found: list[str] = []

    def fill(beside: Path) -> None:
        try:
            for name, content in texts.files.items():
                assert isinstance(content, bytes)
                (beside / name).write_bytes(content)
            write_shards(folder, merge, beside, shard_bytes, listener)
            whole = package({path.name: path for path in sorted(beside.iterdir())})
            (beside / MANIFEST).write_bytes(whole.manifest())
            found.append(_checked(finished, beside))
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise

    write_folder(out, fill)
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    return Exported(out, sizes, (*found, *notes(finished)))


def merged_sizes(
    finished: FinishedRun, *, licence: str | None = None, shard_bytes: int = SHARD_BYTES
) -> dict[str, int]:
    """Return the files that `export_merged` would write, with their bytes; of weights the tensors alone. Raises as it does."""
    folder = resolve_base(finished.config.model).folder
    merge = plan_merge(finished, folder)
    sizes = _texts(finished, folder, merge, licence).sizes()
    shards = _shards(_stored(folder, merge), shard_bytes)
    return sizes | {name: sum(tensor.bytes for tensor in tensors) for name, tensors in shards.items()}


def plan_merge(finished: FinishedRun, folder: Path) -> Merge:
    """Find for every tensor of the adapter the base's tensor that it changes; no weights of the base are read.

    Args:
        finished: The adapter and its run.
        folder: The base's.

    Raises:
        MissingError: the base is stored quantized, or the adapter does not fit it.
    """
    model = _on_meta(finished, folder)
    tied: dict[str, str] = dict(model.get_base_model().all_tied_weights_keys)
    names = _names_of(folder)
    left = dict(finished.saved.tensors)
    targets: dict[str, Target] = {}
    parts: dict[str, Part] = {}
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer) or "default" not in module.scaling:
            continue
        target, parameter = _target(finished, path, module, left)
        name = f"{path.removeprefix(_PREFIX).replace('.base_layer', '')}.{parameter}"
        stored = _stored_names(name, names, tied, model)
        if len(stored) == 1 and not stored[0].part:
            targets[stored[0].name] = target
        else:
            parts |= {each.name: Part(name, target) for each in stored}
    if tokens := next((key for key in left if ".token_adapter." in key), None):
        raise AdapterError(
            f"{finished.name} trains single tokens (trainable_token_indices), which are not merged: {tokens}.",
            hint="Use --to folder: PEFT puts the adapter on the model when it is loaded.",
        )
    saved = finished.saved.config.get("modules_to_save") or ()
    own = {name.replace(".base_layer", "") for name, _ in model.get_base_model().named_parameters()}
    replaced = {}
    for key in list(left):
        # PEFT saves a module that was trained whole under its own name, and the base's biases and embeddings likewise.
        name = key.removeprefix(_PREFIX).replace(".base_layer", "")
        if any(f".{module}." in key for module in saved) or name in own:
            found = _stored_names(name, names, tied, model)
            if len(found) != 1 or found[0].part:
                raise AdapterError(
                    f"{finished.name} holds {name} whole, which the base's files hold in parts: it is not merged.",
                    hint="Use --to folder: PEFT puts the adapter on the model when it is loaded.",
                )
            replaced[found[0].name] = left.pop(key)
    if left:
        raise AdapterError(f"The base has no place for {min(left)} of {finished.name}.", hint="Name its own base.")
    changed = {*targets, *replaced}
    groups = [(key, _stored_names(other, names, {}, model)[0].name) for key, other in tied.items()]
    untied = {key: other for key, other in groups if key in changed or other in changed}
    split = {key: other for key, other in untied.items() if key not in names}
    differ = any(_differ(folder, key, other) for key, other in groups if {key, other} <= names)
    return Merge(targets, parts, model, replaced, split, bool(untied) or differ)


def _target(finished: FinishedRun, path: str, module: LoraLayer, left: dict[str, torch.Tensor]) -> tuple[Target, str]:
    """Return what an adapted module adds, and the name of its parameter; its tensors are taken out of `left`."""
    variant = type(module.lora_variant.get("default")).__name__
    embedding, stacked = isinstance(module, LoraEmbedding), isinstance(module, ParamWrapper)
    kind = variant if variant not in ("NoneType", "DoraLinearVariant", "DoraEmbeddingVariant") else ""
    if not (embedding or stacked or isinstance(module, LoraLinear)):
        kind = type(module).__name__
    if module.lora_bias["default"]:
        kind = "lora_bias"
    if kind:
        raise MissingError(
            f"{finished.name} is of a kind of LoRA that is not merged ({kind}).",
            hint="Use --to folder: PEFT puts the adapter on the model when it is loaded.",
        )
    ends = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    try:
        lora_a, lora_b = (left.pop(f"{path}.{end}") for end in ends)
        magnitude = left.pop(f"{path}.{MAGNITUDE}") if module.use_dora["default"] else None
    except KeyError as error:
        raise AdapterError(f"{finished.name} lacks {error}.", hint="Copy the adapter anew.") from None
    scale = module.scaling["default"]
    if isinstance(module, ParamWrapper):
        # Some models store (experts, in_features, out_features).
        turned = module.num_experts > 1 and not has_swapped_features(module)
        return Target(lora_a, lora_b, scale, turned, None, module.num_experts), module.parameter_name
    return Target(lora_a, lora_b, scale, embedding or module.fan_in_fan_out, magnitude), "weight"


def merged_tensor(weight: torch.Tensor, target: Target) -> torch.Tensor:
    """Return a target's merged weight in its own dtype and layout.

    Args:
        weight: (out_features, in_features), or the other way round where `target.transposed`.
        target: What is added.
    """
    # PEFT's order of operations, in one buffer: (out_features, in_features).
    merged = _update(target)
    merged.add_(weight.mT if target.transposed else weight)
    if target.magnitude is not None:
        norm = torch.linalg.norm(merged, dim=1, keepdim=True)
        merged.mul_(target.magnitude.float().view(-1, 1) / norm)
    return (merged.mT if target.transposed else merged).to(weight.dtype).contiguous()


def _update(target: Target) -> torch.Tensor:
    """Return s·B·A, (out_features, in_features), or one for each expert: (experts, out_features, in_features)."""
    lora_a, lora_b = target.lora_a.float(), target.lora_b.float()
    if target.experts > 1:
        lora_a = lora_a.reshape(target.experts, -1, lora_a.shape[-1])
        lora_b = lora_b.reshape(lora_b.shape[0], -1, target.experts)
        return torch.einsum("o r e, e r i -> e o i", lora_b, lora_a).mul_(target.scale)
    return (lora_b @ lora_a).mul_(target.scale)


class _Parts:
    """The updates of tensors that are parts of one parameter; those of one parameter are kept at a time."""

    def __init__(self, model: Any) -> None:
        self.model, self.parameter = model, ""
        self.updates: dict[str, torch.Tensor] = {}

    def update(self, name: str, part: Part) -> torch.Tensor:
        """Return what is added to the tensor `name` of the base's files."""
        if part.parameter != self.parameter:
            update = _update(part.target)
            whole = update.mT.contiguous() if part.target.transposed else update
            self.updates = revert_weight_conversion(self.model.get_base_model(), {part.parameter: whole})
            self.parameter = part.parameter
        return self.updates[name]


def write_shards(
    folder: Path, merge: Merge, out: Path, shard_bytes: int = SHARD_BYTES, listener: Listener | None = None
) -> None:
    """Write the base's tensors, merged, to `out`: one model.safetensors, or numbered ones with an index.

    Raises:
        FedTuneError: a merged weight is not finite.
        AdapterError: shapes do not fit.
    """
    shards = _shards(_stored(folder, merge), shard_bytes)
    total, written = sum(tensor.bytes for tensors in shards.values() for tensor in tensors), 0
    parts = _Parts(merge.model)
    for name, tensors in shards.items():
        buffer = {}
        for tensor in tensors:
            buffer[tensor.name] = _merged_from(tensor, merge, parts)
            written += tensor.bytes
            if listener is not None:
                listener(written, total)
        save_file(buffer, out / name, metadata={"format": "pt"})
        (out / name).chmod(0o644)  # safetensors writes for the owner alone
        del buffer
    if len(shards) > 1:
        index = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
        table = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (out / "model.safetensors.index.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Stored:
    """A tensor of the merged model, and where the base keeps what it is made of."""

    name: str
    source: str
    file: Path
    bytes: int


def _header(file: Path) -> dict[str, Any]:
    """Return a safetensors file's table of tensors: `dtype`, `shape`, `data_offsets` by name."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        table: dict[str, Any] = json.loads(stream.read(length))
    return {name: entry for name, entry in table.items() if name != "__metadata__"}


def _names_of(folder: Path) -> set[str]:
    return {name for file in weight_files(folder, str(folder)) for name in _header(file)}


def _differ(folder: Path, *names: str) -> bool:
    """Whether tensors of the base's files have different values."""
    files = {name: file for file in weight_files(folder, str(folder)) for name in _header(file)}
    found = []
    for name in names:
        with safe_open(files[name], "pt") as file:
            found.append(file.get_tensor(name))
    return not all(torch.equal(found[0], other) for other in found[1:])


def _stored(folder: Path, merge: Merge) -> Iterator[_Stored]:
    """Yield the merged model's tensors in the order of the base's files."""
    for file in weight_files(folder, str(folder)):
        for name, entry in sorted(_header(file).items(), key=lambda item: item[1]["data_offsets"]):
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            yield _Stored(name, name, file, size)
            for own, other in merge.split.items():
                if other == name:
                    yield _Stored(own, name, file, size)


def _shards(tensors: Iterator[_Stored], shard_bytes: int) -> dict[str, list[_Stored]]:
    """Return which tensors go into which file, in order, none above `shard_bytes` unless one tensor is."""
    groups: list[list[_Stored]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(each.bytes for each in groups[-1]) + tensor.bytes > shard_bytes:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}


def _merged_from(stored: _Stored, merge: Merge, parts: _Parts) -> torch.Tensor:
    with safe_open(stored.file, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(stored.source)
    merged = tensor
    if stored.name in merge.replaced:
        merged = merge.replaced[stored.name].to(tensor.dtype).contiguous()
        if merged.shape != tensor.shape:
            raise AdapterError(
                f"{stored.name} is {tuple(tensor.shape)} in the base, {tuple(merged.shape)} in the adapter."
            )
    try:
        if (target := merge.targets.get(stored.name)) is not None:
            merged = merged_tensor(merged, target)
        elif (part := merge.parts.get(stored.name)) is not None:
            merged = (parts.update(stored.name, part) + merged).to(tensor.dtype)
    except RuntimeError as error:
        raise AdapterError(
            f"The adapter does not fit {stored.name} {tuple(tensor.shape)} as the base's files hold it: {error}.",
            hint="Use --to folder: PEFT puts the adapter on the model when it is loaded.",
        ) from None
    if merged is tensor:
        # Two names of one storage cannot go into one file.
        return tensor.clone() if stored.name != stored.source else tensor
    if not merged.isfinite().all():
        raise FedTuneError(f"The merged {stored.name} holds a value that {tensor.dtype} cannot.")
    return merged


def _on_meta(finished: FinishedRun, folder: Path) -> Any:
    """Return PEFT's model around a base without memory for its weights: which layers it adapts, how, and what is tied."""
    config = finished.config.model
    headers, table = read_headers(folder, config.base), read_table(folder / "config.json", config.base)
    try:
        check_quantization(config.model_copy(update={"quantization": "none"}), table, headers)
    except ConfigError as error:
        raise MissingError(
            f"The base {config.base} is stored quantized, and an adapter merges only into full weights.",
            hint="Name the unquantized base in the run's config, or use --to folder.",
        ) from error
    empty = empty_model(config, folder)
    with silence_libraries(), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is trained here, and nothing kept
        try:
            return get_peft_model(empty, reading_config(finished.saved), low_cpu_mem_usage=True)
        except (ValueError, TypeError, ImportError) as error:
            raise AdapterError(f"{finished.name} does not fit its base: {error}") from error


@dataclass(frozen=True)
class _Place:
    """Where the base's files hold a parameter, or a part of it."""

    name: str
    part: bool


def _stored_names(name: str, names: set[str], tied: Mapping[str, str], model: Any) -> list[_Place]:
    """Return the names that the base's files give a parameter.

    That is its own, one without the model's prefix, as GPT-2's have it, or what transformers makes it of when it loads the base.
    """
    if name in names or name in tied:
        return [_Place(name, part=False)]
    base = model.get_base_model()
    bare = name.removeprefix(f"{base.base_model_prefix}.")
    if bare in names:
        return [_Place(bare, part=False)]
    own = {key.replace(".base_layer", ""): parameter for key, parameter in base.named_parameters()}
    if name in own:
        found = revert_weight_conversion(base, {name: own[name].detach()})
        if found and found.keys() <= names:
            return [
                _Place(key, part=len(found) > 1 or tensor.shape != own[name].shape) for key, tensor in found.items()
            ]
    raise AdapterError(
        f"The base's files hold no {name}, which the adapter changes.",
        hint="Use --to folder: PEFT puts the adapter on the model when it is loaded.",
    )


def _texts(finished: FinishedRun, folder: Path, merge: Merge, licence: str | None) -> Package:
    """Return everything but the weights."""
    # Code of the base's own goes with it only where the run was allowed to use it.
    code = [path.name for path in folder.glob("*.py")] if finished.config.model.trust_remote_code else []
    files = base_files(finished, ("config.json", *OTHER_FILES, *TOKENIZER_FILES, *code))
    if merge.untied:
        table = json.loads(files["config.json"])
        table["tie_word_embeddings"] = False
        files["config.json"] = (json.dumps(table, indent=2) + "\n").encode()
    files |= _with_trained_end(files, finished.config.model)
    about = about_files(finished)
    return package({**files, "README.md": card(finished, licence=licence, merged=True), **about})


def _with_trained_end(files: Mapping[str, bytes], config: ModelConfig) -> dict[str, bytes]:
    """Return config.json and generation_config.json where they lack the end of text that training taught, with it added.

    The ends of text that the base's files name stay beside it, where the base has an embedding for them.
    """
    trained = load_tokenizer(config).eos_token_id
    tables = {name: json.loads(files[name]) for name in ("config.json", "generation_config.json") if name in files}
    text = tables["config.json"].get("text_config") or {}
    vocabulary = tables["config.json"].get("vocab_size") or text.get("vocab_size") or float("inf")
    changed = {}
    for name, table in tables.items():
        for holder in (table, table.get("text_config")):
            if holder is None or (holder is not table and "eos_token_id" not in holder):
                continue
            old = holder.get("eos_token_id")
            ends = [end for end in (old if isinstance(old, list) else [old]) if isinstance(end, int)]
            if trained is not None and trained not in ends:
                known = [end for end in ends if 0 <= end < vocabulary]
                holder["eos_token_id"] = [trained, *known] if known else trained
                changed[name] = (json.dumps(table, indent=2) + "\n").encode()
    return changed


def _checked(finished: FinishedRun, merged: Path) -> str:
    """Compare the merged model with base and adapter; return what came out, or why nothing was compared."""
    dtype = _dtype_of(merged)
    needed = 4 * sum(path.stat().st_size for path in merged.glob("*.safetensors")) // dtype.itemsize
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = free_memory_bytes(device)
    if needed * 1.2 > free:
        return (
            f"Not checked: comparing the logits takes {format_bytes(needed * 1.2)} of memory for the model in float32, and "
            f"{format_bytes(free)} are free."
        )
    found = compare(finished, merged)
    most = TOLERANCE[dtype]
    said = f"the logits differ by at most {found.difference:.1e} of the largest, the adapter moves them by {found.effect:.1e}"
    if not found.difference <= most:
        raise FedTuneError(
            f"The merged model does not give what base and adapter give: {said}; allowed are {most:g} in {dtype}.",
            hint="Nothing was written. Use --to folder, and report this with the base's name.",
        )
    return f"Checked against base and adapter on {len(PROMPTS)} prompts: {said} (allowed: {most:g} in {dtype})."


def compare(finished: FinishedRun, merged: Path) -> Agreement:
    """Compute the logits of `PROMPTS` with base, base and adapter, and merged model, one model in memory at a time."""
    full = finished.config.model.model_copy(
        update={"quantization": "none", "compute_dtype": "fp32", "dequantize": "auto"}
    )
    base = load_base(full)
    before = _logits(base)
    adapted = attach_saved(base, finished.saved)
    adapted.load(finished.saved.tensors)
    wanted = _logits(base)
    del base, adapted
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    code = {"revision": full.revision, "trust_remote_code": full.trust_remote_code}
    got = _logits(load_base(ModelConfig(base=str(merged.resolve()), quantization="none", compute_dtype="fp32", **code)))
    largest = max(float(each.abs().max()) for each in wanted)

    def apart(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True)) / largest

    return Agreement(apart(got, wanted), apart(before, wanted))


@torch.inference_mode()
def _logits(base: Base) -> list[torch.Tensor]:
    """Return the logits of every prompt, (1, tokens, vocabulary) each, on the CPU."""
    asked = (base.tokenizer(prompt, return_tensors="pt").input_ids.to(base.device) for prompt in PROMPTS)
    return [base.model(input_ids=ids).logits.float().cpu() for ids in asked]


def _dtype_of(folder: Path) -> torch.dtype:
    """Return the least exact dtype of a model's weights that the check knows."""
    stored = {entry["dtype"] for file in weight_files(folder, str(folder)) for entry in _header(file).values()}
    return torch.bfloat16 if "BF16" in stored else torch.float16 if "F16" in stored else torch.float32
