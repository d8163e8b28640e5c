"""`fedtune export --to folder`: an adapter with everything that says what it is, and nothing else of its run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig

from fedtune.budget.ledger import Entry
from fedtune.errors import UsageError
from fedtune.evaluation.results import Record
from fedtune.export.card import card, evaluation_command, missing_benches, used_mib
from fedtune.export.finished import FinishedRun
from fedtune.export.package import Exported, Package, package, public_config, public_name, strike
from fedtune.models.adapter import CONFIG_FILE, WEIGHTS_FILE
from fedtune.models.hub import resolve_base
from fedtune.units import to_mib

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)

_ALWAYS = (
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
)
"""Keys that PEFT has had since LoRA's first release there, and that are worth reading at their defaults too."""
_NEVER = ("peft_version", "auto_mapping")
"""Keys that change nothing of the adapter."""

_RESULT_KEYS = (
    "subject",
    "bench",
    "protocol",
    "mode",
    "accuracy",
    "n",
    "k",
    "interval_95",
    "unparsed",
    "unparsed_outputs",
    "accuracy_parsed",
    "majority",
    "subsets",
    "partial",
    "comparable",
    "comparability",
    "against_base",
    "used_mib",
    "seconds",
    "batch_size",
    "prompts_sha256",
    "model_sha256",
    "adapter_sha256",
    "device",
    "compute_dtype",
    "versions",
)
"""What of a result leaves; its findings and where its questions came from may name paths."""


def folder_package(finished: FinishedRun, *, licence: str | None = None, tokenizer: bool = False) -> Package:
    """Return an adapter's package: weights, PEFT's config, card, resolved config, results, ledger summary.

    Args:
        finished: The adapter and its run.
        licence: The licence's id on the hub, for the card.
        tokenizer: Whether the base's tokenizer files go with it.

    Raises:
        UsageError: a file is a link or holds a secret; `licence` is none; results or ledger are damaged.
        MissingError: the base's tokenizer cannot be had.
    """
    return package(
        {
            WEIGHTS_FILE: finished.adapter / WEIGHTS_FILE,
            CONFIG_FILE: _json(adapter_config(finished)),
            "README.md": card(finished, licence=licence),
            **about_files(finished),
            **(base_files(finished, TOKENIZER_FILES) if tokenizer else {}),
        }
    )


def export_folder(finished: FinishedRun, out: Path, *, licence: str | None = None, tokenizer: bool = False) -> Exported:
    """Write an adapter's package to the folder `out`; raises as `folder_package` and `Package.write` do."""
    made = folder_package(finished, licence=licence, tokenizer=tokenizer)
    made.write(out)
    return Exported(out, made.sizes(), notes(finished))


def about_files(finished: FinishedRun) -> dict[str, str]:
    """Return what every package says of its run: fedtune.json, results.json and ledger.json by name."""
    return {
        "fedtune.json": _json(public_config(finished.config)),
        "results.json": _json(public_results(finished)),
        "ledger.json": _json(ledger_summary(finished)),
    }


def notes(finished: FinishedRun) -> tuple[str, ...]:
    """Return what a package of this adapter lacks, each with the command that makes it."""
    found = []
    if not finished.is_finished:
        found.append(
            f"The run has come to round {finished.rounds_done} of {finished.config.federation.rounds}; "
            f"go on with it: fedtune train --resume {finished.run.path}"
        )
    if not finished.complete_results:
        found.append(f"{finished.name} has no whole evaluation; make one: {evaluation_command(finished)}")
    elif missing := missing_benches(finished):
        found.append(f"{finished.name} is not evaluated on {', '.join(missing)}: {evaluation_command(finished)}")
    return tuple(found)


def adapter_config(finished: FinishedRun) -> dict[str, Any]:
    """Return adapter_config.json without what is null, empty or PEFT's default, so that older PEFT reads it as well.

    A PEFT older than https://github.com/huggingface/peft/pull/2038 stops at a key that it does not know, and each release
    brings new ones.
    """
    defaults = LoraConfig().to_dict()
    saved = finished.saved.config
    kept = {
        key: value
        for key, value in saved.items()
        if key in _ALWAYS
        or (key not in _NEVER and key in defaults and value not in (None, [], {}) and value != defaults[key])
    }
    base = saved.get("base_model_name_or_path")
    struck: dict[str, Any] = json.loads(strike(json.dumps(kept | {"base_model_name_or_path": public_name(str(base))})))
    return struck


def public_results(finished: FinishedRun) -> list[dict[str, Any]]:
    """Return every result of this adapter, each after the base's own where there is one, without paths and secrets."""
    found: list[Record] = []
    for record in finished.results:
        base = finished.base_result(record)
        found += [each for each in (base, record) if each is not None and each not in found]
    return [_public_result(record) for record in found]


def ledger_summary(finished: FinishedRun) -> dict[str, Any]:
    """Return the training messages up to the adapter's round, summed up; `mib` is `bytes` / 2**20.

    `bytes` is the leaderboard's count, `serialised_bytes` all that Flower serialised.
    """
    entries = finished.training_entries
    others = [entry for entry in finished.entries if entry.kind != "train"]
    return {
        "mib_is": "2**20 bytes; the FlowerTune leaderboard prints it as MB",
        "adapter": finished.name,
        "used_mib": used_mib(finished),
        "cap_mib": finished.config.communication.cap_mib,
        "total": _sums(entries),
        "directions": {way: _sums(e for e in entries if e.direction == way) for way in ("down", "up")},
        "rounds": {str(n): _sums(e for e in entries if e.round == n) for n in sorted({e.round for e in entries})},
        "clients": {str(n): _sums(e for e in entries if e.node == n) for n in sorted({e.node for e in entries})},
        "refused_messages": sum(entry.status == "refused" for entry in entries),
        "failed_messages": sum(entry.status == "error" for entry in entries),
        "lost_messages": sum(entry.status == "lost" for entry in entries),
        "not_counted": {"messages": len(others), "serialised_bytes": sum(e.serialised_bytes for e in others)},
    }


def base_files(finished: FinishedRun, names: Iterable[str]) -> dict[str, bytes]:
    """Return those of the base's files that are there and named, fetching the base if it is not cached.

    Raises:
        MissingError: the base cannot be had.
        UsageError: a file is a link out of the base's folder.
    """
    folder = resolve_base(finished.config.model).folder
    return {name: _base_file(folder, name) for name in names if (folder / name).is_file()}


def _base_file(folder: Path, name: str) -> bytes:
    real = (folder / name).resolve()
    # The hub's cache keeps contents in blobs/ and links to them from snapshots/<commit>/.
    blobs = folder.resolve().parent.parent / "blobs"
    if real.parent not in (folder.resolve(), blobs):
        raise UsageError(f"{folder / name} is a link to another place, and does not leave.", hint="Put the file there.")
    data = real.read_bytes()
    if name.endswith(".json"):
        table = json.loads(data)
        # Older versions of transformers wrote where they had loaded it from.
        if isinstance(table, dict) and {"_name_or_path", "name_or_path"} & table.keys():
            return _json({key: value for key, value in table.items() if not key.endswith("name_or_path")}).encode()
    return data


def _public_result(record: Record) -> dict[str, Any]:
    model = record.get("model")
    named = {key: record[key] for key in _RESULT_KEYS if key in record}
    if isinstance(model, Mapping):
        named["model"] = {**model, "base": public_name(str(model.get("base")))}
    struck: dict[str, Any] = json.loads(strike(json.dumps(named)))
    return struck


def _sums(entries: Iterable[Entry]) -> dict[str, float]:
    entries = list(entries)
    count_bytes = sum(entry.bytes for entry in entries)
    return {
        "messages": len(entries),
        "bytes": count_bytes,
        "mib": to_mib(count_bytes),
        "serialised_bytes": sum(entry.serialised_bytes for entry in entries),
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
