"""Finds the keys of a config.json that keep transformers from building the model, by building it without each of them.

A model on the meta device takes no memory; nothing of a model's own code runs here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fedtune.models.check import first_line
from fedtune.runs.log import silence_libraries

Build = Callable[[Mapping[str, Any]], str | None]
"""Builds the model that a config.json describes; returns what that fails with, None where it succeeds."""


def keys_at_fault(table: Mapping[str, Any], error: Exception) -> dict[str, Any]:
    """Return the keys of a config.json, dotted, and their values, without any one of which the model can be built.

    Where none suffices, because several are wrong, those without which it fails otherwise; empty where `error` has another
    cause than config.json.

    Args:
        table: The config.json.
        error: What transformers raised.
    """
    failed = _build(table)
    if failed is None or not failed.startswith(f"{type(error).__name__}:"):
        return {}
    with silence_libraries():
        return dict(_search(table, _build, failed))


def reason(error: Exception) -> str:
    """Return an error's kind and the first line of its text, as one writes it in parentheses."""
    return f"{type(error).__name__}: {first_line(error)}"


def _search(table: Mapping[str, Any], build: Build, failed: str) -> list[tuple[str, Any]]:
    without = {
        key: build({other: value for other, value in table.items() if other != key})
        for key in table
        if key != "model_type"
    }
    found = [key for key, outcome in without.items() if outcome is None]
    found = found or [key for key, outcome in without.items() if outcome != failed]
    named: list[tuple[str, Any]] = []
    for key in found:
        inner = table[key]
        deeper = _search(inner, _inside(table, key, build), failed) if isinstance(inner, Mapping) else []
        named += [(f"{key}.{name}", value) for name, value in deeper] or [(key, inner)]
    return named


def _inside(table: Mapping[str, Any], key: str, build: Build) -> Build:
    return lambda part: build({**table, key: part})


def _build(table: Mapping[str, Any]) -> str | None:
    try:
        with silence_libraries(), torch.device("meta"):
            found = CONFIG_MAPPING[table["model_type"]].from_dict(copy.deepcopy(dict(table)))
            AutoModelForCausalLM.from_config(found)
    except Exception as error:  # transformers raises whatever it likes
        return reason(error)
    return None
