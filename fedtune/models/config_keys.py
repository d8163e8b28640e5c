"""Finds the keys of a base's JSON files that transformers cannot use, by trying each file without each of its keys.

A model on the meta device takes no memory; nothing of a model's own code runs here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fedtune.models.check import first_line
from fedtune.models.compat import CONFIG_MAPPING
from fedtune.models.stored import read_table
from fedtune.runs.atomic import write_text
from fedtune.runs.log import silence_libraries

Build = Callable[[Mapping[str, Any]], object]
"""Makes of a JSON object what transformers makes of it, or raises."""

_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_SEARCHED = 64
"""Objects with more keys than that are named as a whole."""


@dataclass(frozen=True)
class Fault:
    """The keys of one file that transformers cannot use."""

    file: str
    keys: dict[str, Any]
    """Value by key, dotted; where there are several, they do not fit each other, or more than one is wrong."""

    @property
    def names(self) -> str:
        """The keys, as one writes them in a sentence."""
        return " or ".join(self.keys)

    def __str__(self) -> str:
        values = [f"{key} = {_shortened(json.dumps(value))}" for key, value in self.keys.items()]
        return f"{' or '.join(values)} in its {self.file}"


def fault_of_model(folder: Path, base: str, error: Exception) -> Fault | None:
    """Return the keys of config.json or generation_config.json that made transformers raise `error`; None for another cause."""
    builds = {"config.json": _build_model, "generation_config.json": _build_generation_config}
    return _first_fault(folder, base, builds, error)


def fault_of_tokenizer(folder: Path, base: str, error: Exception) -> Fault | None:
    """Return the keys of a tokenizer's small files that made transformers raise `error`; None for another cause."""
    # One folder for all attempts: texts of errors, which name it, are compared.
    with TemporaryDirectory() as beside:
        for path in folder.iterdir():
            if path.is_file() and path.suffix not in (".safetensors", ".py"):
                (Path(beside) / path.name).symlink_to(path.resolve())

        def building(file: Path) -> Build:
            def build(table: Mapping[str, Any]) -> object:
                write_text(file, json.dumps(table))
                try:
                    return AutoTokenizer.from_pretrained(beside, local_files_only=True).all_special_ids
                finally:
                    file.unlink()
                    file.symlink_to((folder / file.name).resolve())

            return build

        return _first_fault(folder, base, {name: building(Path(beside) / name) for name in _TOKENIZER_FILES}, error)


def reason(error: Exception) -> str:
    """Return an error's kind and the first line of its text, as one writes it in parentheses."""
    return f"{type(error).__name__}: {first_line(error)}"


def _first_fault(folder: Path, base: str, builds: Mapping[str, Build], error: Exception) -> Fault | None:
    for file, build in builds.items():
        if not (folder / file).is_file():
            continue
        table = read_table(folder / file, base)
        failed = _outcome(build, table)
        if (
            failed is not None
            and failed.startswith(f"{type(error).__name__}:")
            and (keys := _search(table, build, failed))
        ):
            return Fault(file, dict(keys))
    return None


def _search(table: Mapping[str, Any], build: Build, failed: str) -> list[tuple[str, Any]]:
    """Return the keys without each of which `build` succeeds, then those without which the same failure names other values.

    Where it never succeeds, because several keys are wrong, they are those without which it fails otherwise.
    """
    outcomes = {
        key: _outcome(build, {other: value for other, value in table.items() if other != key})
        for key in table
        if key != "model_type"
    }
    found = [key for key, outcome in outcomes.items() if outcome is None]
    kind = failed.partition(":")[0] if found else ""
    found += [key for key, outcome in outcomes.items() if outcome not in (None, failed) and outcome.startswith(kind)]
    named: list[tuple[str, Any]] = []
    for key in found:
        inner = table[key]
        deeper = []
        if isinstance(inner, Mapping) and len(inner) <= _SEARCHED:
            deeper = _search(inner, _inside(table, key, build), failed)
        named += [(f"{key}.{name}", value) for name, value in deeper] or [(key, inner)]
    return named


def _inside(table: Mapping[str, Any], key: str, build: Build) -> Build:
    return lambda part: build({**table, key: part})


def _outcome(build: Build, table: Mapping[str, Any]) -> str | None:
    """Return what building fails with, None where it succeeds."""
    try:
        with silence_libraries():
            build(copy.deepcopy(dict(table)))
    except Exception as error:  # transformers raises whatever it likes
        return reason(error)
    return None


def _build_model(table: Mapping[str, Any]) -> object:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[table["model_type"]].from_dict(dict(table)))


def _build_generation_config(table: Mapping[str, Any]) -> object:
    return GenerationConfig.from_dict(dict(table))


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"
