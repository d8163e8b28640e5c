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
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors import safe_open
from safetensors.torch import save_file

from fedtune.config.schema import ModelConfig
from fedtune.errors import ConfigError, FedTuneError, MissingError
from fedtune.export.card import card
from fedtune.export.finished import FinishedRun
from fedtune.export.folder import TOKENIZER_FILES, about_files, base_files, notes
from fedtune.export.package import MANIFEST, Exported, Package, make_room, package
from fedtune.models.adapter import MAGNITUDE, AdapterError, attach_saved
from fedtune.models.base import Base, empty_model, free_memory_bytes, load_base, load_tokenizer, quiet
from fedtune.models.hub import resolve_base
from fedtune.models.stored import check_quantization, read_headers, read_table, weight_files
from fedtune.runs.atomic import write_folder
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
    """(rank, in_features)"""
    lora_b: torch.Tensor
    """(out_features, rank)"""
    scale: float
    transposed: bool
    """The weight is stored as (in_features, out_features): transformers' Conv1D."""
    magnitude: torch.Tensor | None
    """DoRA's, (out_features,)."""


@dataclass(frozen=True)
class Merge:
    """What is done to the base's tensors, by the names that they have in its files."""

    targets: Mapping[str, Target]
    replaced: Mapping[str, torch.Tensor]
    """Modules that were trained whole."""
    split: Mapping[str, str]
    """Tensors that the base ties to another and does not store, to be stored now: name to the other's."""
    untied: bool
    """Whether the adapter makes tied tensors differ."""


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
    for path, module in model.named_modules():
        if not isinstance(module, LoraLinear):
            continue
        variant = type(module.lora_variant.get("default")).__name__
        if variant not in ("NoneType", "DoraLinearVariant") or module.lora_bias["default"]:
            raise MissingError(f"{finished.name} is of a kind of LoRA that is not merged ({variant}).")
        try:
            lora_a, lora_b = (left.pop(f"{path}.lora_{letter}.weight") for letter in "AB")
            magnitude = left.pop(f"{path}.{MAGNITUDE}") if module.use_dora["default"] else None
        except KeyError as error:
            raise AdapterError(f"{finished.name} lacks {error}.", hint="Copy the adapter anew.") from None
        targets[_stored_name(f"{path.removeprefix(_PREFIX)}.weight", names, tied, model)] = Target(
            lora_a, lora_b, module.scaling["default"], module.fan_in_fan_out, magnitude
        )
    saved = finished.saved.config.get("modules_to_save") or ()
    whole = [key for key in left if any(f".{name}." in key for name in saved)]
    replaced = {
        _stored_name(key.removeprefix(_PREFIX), names, tied, model): left.pop(key) for key in whole
    }  # PEFT saves a module that was trained whole under its own name
    if left:
        raise AdapterError(f"The base has no place for {min(left)} of {finished.name}.", hint="Name its own base.")
    changed = {*targets, *replaced}
    groups = [(key, _stored_name(other, names, {}, model)) for key, other in tied.items()]
    untied = {key: other for key, other in groups if key in changed or other in changed}
    return Merge(targets, replaced, {key: other for key, other in untied.items() if key not in names}, bool(untied))


def merged_tensor(weight: torch.Tensor, target: Target) -> torch.Tensor:
    """Return a target's merged weight in its own dtype and layout.

    Args:
        weight: (out_features, in_features), or the other way round where `target.transposed`.
        target: What is added.
    """
    # PEFT's order of operations, in one buffer: (out_features, in_features).
    merged = (target.lora_b.float() @ target.lora_a.float()).mul_(target.scale)
    merged.add_(weight.T if target.transposed else weight)
    if target.magnitude is not None:
        norm = torch.linalg.norm(merged, dim=1, keepdim=True)
        merged.mul_(target.magnitude.float().view(-1, 1) / norm)
    return (merged.T if target.transposed else merged).to(weight.dtype).contiguous()


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
    for name, tensors in shards.items():
        buffer = {}
        for tensor in tensors:
            buffer[tensor.name] = _merged_from(tensor, merge)
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


def _merged_from(stored: _Stored, merge: Merge) -> torch.Tensor:
    with safe_open(stored.file, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(stored.source)
    target = merge.targets.get(stored.name)
    if stored.name in merge.replaced:
        merged = merge.replaced[stored.name].to(tensor.dtype).contiguous()
        if merged.shape != tensor.shape:
            raise AdapterError(
                f"{stored.name} is {tuple(tensor.shape)} in the base, {tuple(merged.shape)} in the adapter."
            )
    elif target is None:
        # Two names of one storage cannot go into one file.
        return tensor.clone() if stored.name != stored.source else tensor
    else:
        try:
            merged = merged_tensor(tensor, target)
        except RuntimeError as error:
            raise AdapterError(f"The adapter does not fit {stored.name} {tuple(tensor.shape)}: {error}") from None
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
    with quiet(), torch.device("meta"):
        known = set(LoraConfig().to_dict()) - {"base_model_name_or_path"}
        settings = LoraConfig(**{key: value for key, value in finished.saved.config.items() if key in known})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing is trained here, and nothing kept
            return get_peft_model(empty, settings, low_cpu_mem_usage=True)


def _stored_name(name: str, names: set[str], tied: Mapping[str, str], model: Any) -> str:
    """Return the name that the base's files give a parameter: its own, or without the model's prefix, as GPT-2's have it."""
    if name in names or name in tied:
        return name
    bare = name.removeprefix(f"{model.get_base_model().base_model_prefix}.")
    if bare in names:
        return bare
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
