"""Converts a run's config to the flat values in the pyproject.toml of a Flower app, and back.

A key has the name of the leaderboard's template if there is one, and otherwise fedtune's, as in
`fedtune.communication.wire_dtype`. Submissions import this module: its name and `with_config` must stay.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

from fedtune.config.facts import table_value
from fedtune.config.load import known_paths, leaves, load_config
from fedtune.config.schema import FedTuneConfig
from fedtune.errors import ConfigError, Problem
from fedtune.export.package import public_config

if TYPE_CHECKING:
    from flwr.app import Context

Flat = dict[str, str | int | float | bool]
"""Values as Flower's run config has them, by dotted name."""

NAMES: Mapping[str, str] = {
    "model.base": "model.name",
    "model.quantization": "model.quantization",
    "model.gradient_checkpointing": "model.gradient-checkpointing",
    "adapter.rank": "model.lora.peft-lora-r",
    "adapter.alpha": "model.lora.peft-lora-alpha",
    "adapter.dropout": "model.lora.peft-lora-dropout",
    "adapter.targets": "model.lora.peft-target-modules",
    "adapter.rslora": "model.lora.peft-use-rslora",
    "adapter.dora": "model.lora.peft-use-dora",
    "checkpoint.save_every": "train.save-every-round",
    "training.learning_rate_max": "train.learning-rate-max",
    "training.learning_rate_min": "train.learning-rate-min",
    "training.sequence_length": "train.seq-length",
    "training.batch_size": "train.training-arguments.per-device-train-batch-size",
    "training.accumulation": "train.training-arguments.gradient-accumulation-steps",
    "training.epochs": "train.training-arguments.num-train-epochs",
    "training.max_steps": "train.training-arguments.max-steps",
    "training.optimizer": "train.training-arguments.optim",
    "training.weight_decay": "train.training-arguments.weight-decay",
    "training.gradient_clip": "train.training-arguments.max-grad-norm",
    "strategy.name": "strategy.name",
    "strategy.proximal_mu": "strategy.proximal-mu",
    "federation.fraction": "strategy.fraction-train",
    "federation.rounds": "num-server-rounds",
    "data.source": "static.dataset.name",
    "federation.clients": "static.num-supernodes",
}
"""fedtune's key to the leaderboard's name; the rules fix the values of the static section."""

FOUR_BIT_TYPE = "model.quantization-type"
"""`fp4`, the leaderboard's, or `nf4`; used if `model.quantization` is 4."""

_OWN = "fedtune."
_BITS = {"fp4": 4, "nf4": 4, "int8": 8, "none": 0}
_SWITCH: Mapping[str, str | bool] = {"on": True, "off": False, "auto": "auto"}
_LOCAL = ("federation.engine", "federation.superlink", "federation.ray_address")
"""Prefixes of the keys that say where the run ran; they are private, and whoever runs the app sets them again."""


def portable(config: FedTuneConfig) -> dict[str, Any]:
    """Return the config as it may be published, without the keys that say where the run ran."""
    table = public_config(config)
    for path in [path for path in leaves(table) if path.startswith(_LOCAL)]:
        section, _, key = path.rpartition(".")
        del table[section][key]
    return table


def to_flat(table: Mapping[str, Any]) -> Flat:
    """Return a portable config as flat values, the template's names first; `from_flat` is the inverse."""
    flat: Flat = {}
    for path in sorted(
        leaves(table), key=lambda path: (list(NAMES).index(path) if path in NAMES else len(NAMES), path)
    ):
        value = table_value(table, path)
        match path:
            case "model.quantization":
                flat[FOUR_BIT_TYPE] = "nf4" if value == "nf4" else "fp4"
                value = _BITS[value]
            case "model.gradient_checkpointing":
                value = _SWITCH[value]
            case "training.optimizer":
                value = "adamw_torch" if value == "adamw" else value
        if isinstance(value, list):
            value = ",".join(value)
        flat[NAMES.get(path, _OWN + path)] = "" if value is None else value
    return flat


def from_flat(flat: Mapping[str, Any]) -> FedTuneConfig:
    """Return the config for flat values; missing keys have the values of the challenge.

    Raises:
        ConfigError: a name is unknown or a value is invalid; all problems are listed with their names in pyproject.toml.
    """
    names = {name: path for path, name in NAMES.items()}
    names |= {_OWN + path: path for path in known_paths() if path not in NAMES and not path.startswith(_LOCAL)}
    known = [*names, FOUR_BIT_TYPE]
    if unknown := [name for name in flat if name not in known]:
        near = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.6) for name in unknown}
        raise ConfigError([Problem(name, "there is no such key", nearest="".join(near[name])) for name in unknown])
    values = {names[name]: (name, value) for name, value in flat.items() if name != FOUR_BIT_TYPE}
    flags = {
        path: (f"{name} in pyproject.toml", _value(path, value, flat.get(FOUR_BIT_TYPE, "fp4")))
        # The strategy's name comes before its options: it removes the options of another strategy.
        for path, (name, value) in sorted(values.items(), key=lambda item: item[0] != "strategy.name")
        if path not in ("challenge", "recipe")
    }
    chosen = {kind: str(values[kind][1]) for kind in ("challenge", "recipe") if kind in values and values[kind][1]}
    return load_config(challenge=chosen.get("challenge"), recipe=chosen.get("recipe"), flags=flags).config


def with_config(context: Context) -> Context:
    """Return a copy of `context`, with the same state, that holds fedtune's config in place of the flat values.

    Raises:
        ConfigError: a value is invalid.
    """
    config = from_flat(context.run_config)
    changed = copy(context)  # Flower refuses a context whose run config was changed
    changed.run_config = {"fedtune-config": config.model_dump_json(), "run-dir": ""}
    return changed


def _value(path: str, value: Any, four_bit_type: Any) -> Any:
    """Return a flat value as the config has it; a value that cannot be converted stays, and the config refuses it."""
    if path == "model.quantization":
        return {4: four_bit_type, 8: "int8", 0: "none"}.get(value, value) if isinstance(value, int) else value
    if path == "model.gradient_checkpointing":
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
    if path == "training.optimizer":
        return "adamw" if value == "adamw_torch" else value
    is_list = isinstance(table_value(FedTuneConfig().model_dump(mode="json"), path), list)
    if isinstance(value, str) and (is_list or (path == "adapter.targets" and value not in ("default", "all-linear"))):
        return [part.strip() for part in value.split(",") if part.strip()]
    return None if value == "" else value
