"""Files that targets write beside the weights: PEFT's config, results, ledger summary, files of the base model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig

from fedtune.budget.ledger import Entry
from fedtune.config.schema import ModelConfig
from fedtune.errors import UsageError
from fedtune.evaluation.results import Record
from fedtune.export.card import card
from fedtune.export.checkpoint import RunCheckpoint
from fedtune.export.package import Package, package, public_config, public_name, redact_table, to_json
from fedtune.models.base import load_tokenizer
from fedtune.models.hub import resolve_base
from fedtune.units import to_mib

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
)
_MODEL_FILES = ("generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")

_ALWAYS = (
    *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules", "bias"),
    *("fan_in_fan_out", "inference_mode"),
)
"""Keys that every PEFT with LoRA knows, and that inform the reader at their defaults too."""
_NEVER = ("peft_version", "auto_mapping")
"""Keys without effect on the adapter."""

_RESULT_KEYS = (
    *("subject", "bench", "protocol", "mode", "accuracy", "n", "k", "interval_95", "unparsed", "unparsed_outputs"),
    *("accuracy_parsed", "majority", "subsets", "partial", "comparable", "comparability", "against_base", "used_mib"),
    *(
        "seconds",
        "batch_size",
        "prompts_sha256",
        "model_sha256",
        "adapter_sha256",
        "device",
        "compute_dtype",
        "versions",
    ),
)
"""Keys of a result that are published; others, such as its findings, may contain paths."""


def about_files(checkpoint: RunCheckpoint) -> dict[str, str]:
    """Return the files about the run in every adapter or model: fedtune.json, results.json and ledger.json by name."""
    return {
        "fedtune.json": to_json(public_config(checkpoint.config)),
        "results.json": to_json(public_results(checkpoint)),
        "ledger.json": to_json(ledger_summary(checkpoint)),
    }


def adapter_config(checkpoint: RunCheckpoint) -> dict[str, Any]:
    """Return adapter_config.json without null, empty and default values, so that older versions of PEFT can read it.

    PEFT before https://github.com/huggingface/peft/pull/2038 refuses a key that it does not know, and each release adds keys.
    """
    defaults = LoraConfig().to_dict()
    saved = checkpoint.saved.config
    kept = {
        key: value
        for key, value in saved.items()
        if key in _ALWAYS
        or (key not in _NEVER and key in defaults and value not in (None, [], {}) and value != defaults[key])
    }
    base = saved.get("base_model_name_or_path")
    return redact_table(kept | {"base_model_name_or_path": public_name(str(base))})


def public_results(checkpoint: RunCheckpoint) -> list[dict[str, Any]]:
    """Return the results of this adapter without paths and secrets, each after the base model's result if there is one."""
    found: list[Record] = []
    for record in checkpoint.results:
        base = checkpoint.base_result(record)
        found += [each for each in (base, record) if each is not None and each not in found]
    return [_public_result(record) for record in found]


def ledger_summary(checkpoint: RunCheckpoint) -> dict[str, Any]:
    """Return sums over the training messages up to the adapter's round; `mib` is `bytes` / 2**20.

    `bytes` is the leaderboard's count, `serialised_bytes` the size of the messages as Flower serialised them.
    """
    entries = checkpoint.training_entries
    others = [entry for entry in checkpoint.entries if entry.kind != "train"]
    return {
        "mib_is": "2**20 bytes; the FlowerTune leaderboard prints it as MB",
        "adapter": checkpoint.name,
        "used_mib": checkpoint.used_mib,
        "cap_mib": checkpoint.config.communication.cap_mib,
        "total": _sums(entries),
        "directions": {way: _sums(e for e in entries if e.direction == way) for way in ("down", "up")},
        "rounds": {str(n): _sums(e for e in entries if e.round == n) for n in sorted({e.round for e in entries})},
        "clients": {str(n): _sums(e for e in entries if e.node == n) for n in sorted({e.node for e in entries})},
        "refused_messages": sum(entry.status == "refused" for entry in entries),
        "failed_messages": sum(entry.status == "error" for entry in entries),
        "lost_messages": sum(entry.status == "lost" for entry in entries),
        "not_counted": {"messages": len(others), "serialised_bytes": sum(e.serialised_bytes for e in others)},
    }


def base_files(checkpoint: RunCheckpoint, names: Iterable[str]) -> dict[str, bytes]:
    """Return the files among `names` that the base model has; the base is downloaded if it is not cached.

    Raises:
        MissingError: the base cannot be loaded.
        UsageError: a file is a link that leaves the folder of the base.
    """
    folder = resolve_base(checkpoint.config.model).folder
    return {name: _base_file(folder, name) for name in names if (folder / name).is_file()}


def model_files(checkpoint: RunCheckpoint, *, untied: bool, licence: str | None = None) -> Package:
    """Return the files of a merged model except for its weights: config, tokenizer, model card and files about the run.

    Args:
        checkpoint: The adapter and its run.
        untied: Whether weights that config.json ties differ in the merged model.
        licence: The id of the licence on the hub, for the card.

    Raises:
        As `base_files`, `card` and `package`.
    """
    config = checkpoint.config.model
    # The code of the base model is exported only if the run was allowed to use it.
    code = [path.name for path in resolve_base(config).folder.glob("*.py")] if config.trust_remote_code else []
    files = base_files(checkpoint, ("config.json", *_MODEL_FILES, *TOKENIZER_FILES, *code))
    if untied:
        table = json.loads(files["config.json"])
        table["tie_word_embeddings"] = False
        files["config.json"] = (json.dumps(table, indent=2) + "\n").encode()
    files |= _with_trained_end(files, config)
    about = about_files(checkpoint)
    return package({**files, "README.md": card(checkpoint, licence=licence, merged=True), **about})


def _with_trained_end(files: Mapping[str, bytes], config: ModelConfig) -> dict[str, bytes]:
    """Return config.json and generation_config.json with the end-of-text token used in training, if they lack it.

    End-of-text tokens that the files name already stay, if the base model has an embedding for them.
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


def _base_file(folder: Path, name: str) -> bytes:
    real = (folder / name).resolve()
    # The cache of the hub keeps contents in blobs/ and links to them from snapshots/<commit>/.
    blobs = folder.resolve().parent.parent / "blobs"
    if real.parent not in (folder.resolve(), blobs):
        raise UsageError(
            f"{folder / name} is a link to a file outside its folder and is not exported.",
            hint="Replace the link with the file.",
        )
    data = real.read_bytes()
    if name.endswith(".json"):
        table = json.loads(data)
        # Older versions of transformers recorded the path that they had loaded the model from.
        if isinstance(table, dict) and {"_name_or_path", "name_or_path"} & table.keys():
            return to_json({key: value for key, value in table.items() if not key.endswith("name_or_path")}).encode()
    return data


def _public_result(record: Record) -> dict[str, Any]:
    model = record.get("model")
    named = {key: record[key] for key in _RESULT_KEYS if key in record}
    if isinstance(model, Mapping):
        named["model"] = {**model, "base": public_name(str(model.get("base")))}
    return redact_table(named)


def _sums(entries: Iterable[Entry]) -> dict[str, float]:
    entries = list(entries)
    count_bytes = sum(entry.bytes for entry in entries)
    return {
        "messages": len(entries),
        "bytes": count_bytes,
        "mib": to_mib(count_bytes),
        "serialised_bytes": sum(entry.serialised_bytes for entry in entries),
    }
