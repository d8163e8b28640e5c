"""Reads what a base model's folder says about its weights, before any weight is loaded.

config.json, the other tables, the index of shards and the headers of the safetensors files are enough to find damaged files,
weights that are stored quantized, and code that the model wants to run. Importing this file loads neither torch nor transformers.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.config.schema import ModelConfig
from fedtune.errors import ConfigError, MissingError, Problem

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

NAMED = 3
"""So many names of a kind are written out; the rest is counted."""

_TABLES = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
FULL_PRECISION = {"F64", "F32", "F16", "BF16"}
_UNQUANTIZED = FULL_PRECISION | {"BOOL", "I64", "C64"}
_SCALES = re.compile(r"\.(qweight|qzeros|SCB|weight_scale|weight_scale_inv|weight_scale_2|weight_packed|absmax)$")
_BNB_4BIT = re.compile(r"\.quant_state\.bitsandbytes__(\w+)$")
_DECLARATIONS = ("quantization_config", "compression_config")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
"""Keys of config.json that say how many tokens a row may have, first the one that counts."""
_SIZES = {
    *POSITIONS,
    *(
        "vocab_size",
        "hidden_size",
        "d_model",
        "n_embd",
        "num_hidden_layers",
        "n_layer",
        "num_attention_heads",
        "n_head",
    ),
}
"""Keys of config.json whose values are counts and sizes."""
_LARGEST = {"num_hidden_layers": 10_000, "n_layer": 10_000}
_LARGEST_SIZE = 2**40
_COPY_AGAIN = "Copy the base model's files again, or choose another model.base."
_ELSEWHERE = "choose a model.base that is stored in full precision"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file, as its header describes it."""

    dtype: str
    """safetensors' name of the number format, such as `BF16`."""
    shape: tuple[int, ...]
    file: str
    """Name of the file that holds it."""


Headers = Mapping[str, StoredTensor]
"""All tensors of a base model's files by name."""


def name_some(names: Collection[str]) -> str:
    """Return the first few names, sorted, and how many more there are."""
    rest = len(names) - NAMED
    return ", ".join(sorted(names)[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def read_table(path: Path, base: str) -> dict[str, Any]:
    """Return the JSON object in a file of the base model.

    Raises:
        MissingError: the file cannot be read, or is not a JSON object.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise _damaged(base, path.name, str(reason)) from error
    if not isinstance(table, dict):
        raise _damaged(base, path.name, f"it holds a JSON {type(table).__name__} instead of an object")
    return table


def weight_files(folder: Path, base: str) -> list[Path]:
    """Return the safetensors files that hold the weights: the single one, or the shards that the index names.

    Raises:
        MissingError: the index is damaged, or a shard is not there.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = _index(folder, base)
    names = sorted(set(index.values()))
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise MissingError(
            f"The base model {base} lacks {len(absent)} of its weight files, such as {absent[0]}.",
            hint="Copy the missing files, or choose another model.base.",
        )
    return [folder / name for name in names]


def read_headers(folder: Path, base: str) -> dict[str, StoredTensor]:
    """Return every tensor that the base's files hold, after checking that files and index agree.

    Raises:
        MissingError: a file is truncated or no safetensors file, the index is damaged, or index and shards disagree.
    """
    files = weight_files(folder, base)
    headers: dict[str, StoredTensor] = {}
    twice: set[str] = set()
    for file in files:
        of_file = _header(file, base)
        twice |= headers.keys() & of_file.keys()
        headers |= of_file
    if twice:
        raise MissingError(f"Two weight files of the base model {base} hold {name_some(twice)}.", hint=_COPY_AGAIN)
    if not headers:
        raise MissingError(f"The weight files of the base model {base} hold no tensor.", hint=_COPY_AGAIN)
    numbered = {path.name for path in folder.glob("model-?????-of-?????.safetensors")}
    if files[0].name == WEIGHTS:
        if numbered:
            log.warning("%s holds %s and shards beside it; the shards are not used", base, WEIGHTS)
        return headers
    index = _index(folder, base)
    if unnamed := numbered - {file.name for file in files}:
        raise MissingError(f"The index of the base model {base} does not name {name_some(unnamed)}.", hint=_COPY_AGAIN)
    absent = {name for name, file in index.items() if name not in headers or headers[name].file != file}
    unknown = headers.keys() - index.keys()
    if absent or unknown:
        found = [f"the index names {name_some(absent)}, which its shard does not hold"] if absent else []
        found += [f"shards hold {name_some(unknown)}, which the index does not name"] if unknown else []
        raise MissingError(f"Index and shards of the base model {base} disagree: {'; '.join(found)}.", hint=_COPY_AGAIN)
    return headers


def check_tables(folder: Path, base: str) -> None:
    """Check that every small JSON file of a base model is a JSON object.

    Raises:
        MissingError: one is damaged.
    """
    for name in ("config.json", *_TABLES):
        if name == "config.json" or (folder / name).is_file():
            read_table(folder / name, base)


def check_weights_named(table: Mapping[str, Any], base: str) -> None:
    """Refuse a config.json that sends transformers to other weights or code than the folder's own.

    Raises:
        ConfigError: it names another file of weights, or code for attention or experts in another repository.
    """
    for key, value in _leaves(table):
        if key == "transformers_weights" and value not in (None, WEIGHTS, INDEX):
            raise ConfigError([Problem("model.base", f"config.json of {base} names other weights, {value!r}")])
        if key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            problem = (
                f"config.json of {base} asks for {key} {value!r}, code of another repository, which fedtune never runs"
            )
            raise ConfigError([Problem("model.base", problem)])


def check_values(table: Mapping[str, Any], base: str) -> None:
    """Refuse a config.json with sizes that no model has, or with an empty declaration of quantized weights.

    Raises:
        MissingError: the first such key is named.
    """
    for key, value in _tables(table):
        largest = _LARGEST.get(key, _LARGEST_SIZE if key in _SIZES else math.inf)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in (*_SIZES, "rope_theta") and number and not 0 < value <= largest:
            bounds = "above 0" if not value > 0 else f"at most {largest:,}"
            raise MissingError(
                f"config.json of {base} has {key} = {str(value)[:30]}, which must be {bounds}.",
                hint=f"Correct {key} in config.json, or choose another model.base.",
            )
        if key in (*_DECLARATIONS, "quantization") and value is not None and not value:
            raise MissingError(
                f"config.json of {base} has {key} = {json.dumps(value)}, which names no quantization.",
                hint=f"Remove {key} from config.json if the weights are in full precision, or choose another model.base.",
            )


def check_quantization(config: ModelConfig, table: Mapping[str, Any], headers: Headers | None = None) -> bool:
    """Return whether the weights are stored as `config.quantization` asks; False where they are stored in full precision.

    Args:
        config: Which base, and how its weights shall be held.
        table: The base's config.json.
        headers: The base's tensors; without them only config.json is judged.

    Raises:
        ConfigError: the weights are stored in a quantized form other than the one that `config` asks for.
        MissingError: config.json names a quantized form that the files do not hold.
    """
    declared = _declared(table)
    if declared is None:
        if headers is not None and (name := _quantized_tensor(headers)):
            problem = (
                f"{config.base} stores quantized weights, such as {name} ({headers[name].dtype}), which its config.json does "
                f"not declare, and {config.quantization} is asked for; {_ELSEWHERE}"
            )
            raise ConfigError([Problem("model.quantization", problem)])
        return False
    stored, text = declared
    if stored is None:
        problem = (
            f"{config.base} is stored as {text}, which fedtune does not load, and {config.quantization} is asked for; "
            f"{_ELSEWHERE} with --set model.base=NAME"
        )
        raise ConfigError([Problem("model.quantization", problem)])
    if stored != config.quantization:
        problem = (
            f"{config.base} is stored as {text}, and {config.quantization} is asked for: --set model.quantization={stored} "
            f"(fedtune eval --quantization {stored}), or {_ELSEWHERE}"
        )
        raise ConfigError([Problem("model.quantization", problem)])
    if headers is not None:
        kinds = {match[1] for name in headers if (match := _BNB_4BIT.search(name))}
        kinds |= {"int8"} if any(name.endswith(".SCB") for name in headers) else set()
        if kinds != {stored}:
            found = ", ".join(sorted(kinds)) or "no quantized weights"
            raise MissingError(
                f"config.json of {config.base} says that the weights are stored as {stored}; its files hold {found}.",
                hint="Copy config.json and weights from the same place, or choose another model.base.",
            )
    return True


def stored_form(table: Mapping[str, Any]) -> str | None:
    """Return the value of `model.quantization` that a config.json declares its weights to be stored as; None for any other."""
    declared = _declared(table)
    return declared[0] if declared else None


def _declared(table: Mapping[str, Any]) -> tuple[str | None, str] | None:
    """Return `model.quantization`'s value for the form that config.json declares, None for others, and the form in words."""
    found = [value for key, value in _tables(table) if key in _DECLARATIONS and value]
    if isinstance(mlx := table.get("quantization"), Mapping):
        found.append(mlx)
    if not found:
        return None
    declared = found[0]
    if not isinstance(declared, Mapping):
        return None, f"{declared!r}"
    method = str(declared.get("quant_method") or "").lower()
    if not method and (declared.get("load_in_4bit") or declared.get("load_in_8bit")):
        method = "bitsandbytes"
    if method != "bitsandbytes":
        bits = declared.get("bits", declared.get("w_bit"))
        return None, f"{method or 'an unnamed quantization'}{f' with {bits} bits' if bits else ''}"
    if declared.get("load_in_8bit"):
        return "int8", "bitsandbytes int8"
    kind = str(declared.get("bnb_4bit_quant_type", "fp4"))
    storage = str(declared.get("bnb_4bit_quant_storage", "uint8")).removeprefix("torch.")
    if not declared.get("load_in_4bit") or kind not in ("nf4", "fp4") or storage != "uint8":
        return None, f"bitsandbytes {kind} in {storage}"
    return kind, f"bitsandbytes {kind}"


def _quantized_tensor(headers: Headers) -> str | None:
    """Return the name of a tensor that only quantized weights have."""
    for name, tensor in headers.items():
        # A mask of GPT-2's has the shape (1, 1, positions, positions) and may be stored as bytes.
        matrix = len(tensor.shape) >= 2 and tensor.shape[:2] != (1, 1)
        if tensor.dtype not in _UNQUANTIZED and (matrix or name.endswith(".weight")):
            return name
        if tensor.dtype == "I64" and name.endswith(".weight"):
            return name
        if _SCALES.search(name):
            return name
    return None


def _index(folder: Path, base: str) -> dict[str, str]:
    index = read_table(folder / INDEX, base)
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table:
        raise _damaged(base, INDEX, "it has no weight_map")
    for file in table.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise _damaged(
                base, INDEX, f"its weight_map names {file!r}, which is no safetensors file of the same folder"
            )
    if not isinstance(index.get("metadata"), dict):
        raise MissingError(
            f"The {INDEX} of the base model {base} has no object under the key metadata, which transformers needs.",
            hint=f'Add "metadata": {{}} to {INDEX}, or copy that file again.',
        )
    return table


def _header(file: Path, base: str) -> dict[str, StoredTensor]:
    """Return a safetensors file's tensors by name, after checking that the file is as long as they need."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError
            table = json.loads(stream.read(length))
        entries = {name: entry for name, entry in table.items() if name != "__metadata__"}
        tensors = {
            name: StoredTensor(str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), file.name)
            for name, entry in entries.items()
        }
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except OSError as error:
        raise _unreadable(base, file.name, str(error.strerror)) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise _unreadable(base, file.name, "it is no safetensors file, or truncated") from error
    if size != 8 + length + end:
        raise _unreadable(base, file.name, f"it has {size:,} bytes instead of {8 + length + end:,}")
    return tensors


def _tables(table: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key of a JSON value with its own value, at any depth."""
    if isinstance(table, Mapping):
        for key, value in table.items():
            yield str(key), value
            yield from _tables(value)
    elif isinstance(table, list):
        for value in table:
            yield from _tables(value)


def _leaves(table: Any) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in _tables(table) if not isinstance(value, Mapping | list))


def own_code(table: Mapping[str, Any]) -> set[str]:
    """Return the classes that a config.json or tokenizer_config.json asks to load from code, at any depth of the table."""
    found: set[str] = set()
    for key, value in _tables(table):
        if key == "auto_map":
            found |= set(_strings(value))
    return found


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)


def _damaged(base: str, name: str, reason: str) -> MissingError:
    return MissingError(f"The {name} of the base model {base} cannot be read: {reason}.", hint=_COPY_AGAIN)


def _unreadable(base: str, name: str, reason: str) -> MissingError:
    return MissingError(f"The weights of {base} cannot be read: {name}: {reason}.", hint=_COPY_AGAIN)
