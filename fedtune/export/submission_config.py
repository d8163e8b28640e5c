"""A run's config under the leaderboard's names: flat values for a Flower app's pyproject.toml, and the config they mean.

The template's own names where it has one; what it lacks stands under fedtune's path, `fedtune.communication.wire_dtype`.
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
"""What Flower's run config can hold, by dotted name."""

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
"""fedtune's path to the leaderboard's name; what the rules fix is in the static section."""

FOUR_BIT_TYPE = "model.quantization-type"
"""`fp4`, the leaderboard's, or `nf4`; read where `model.quantization` is 4."""

_OWN = "fedtune."
_BITS = {"fp4": 4, "nf4": 4, "int8": 8, "none": 0}
_SWITCH: Mapping[str, str | bool] = {"on": True, "off": False, "auto": "auto"}
_OF_THE_PLACE = ("federation.engine", "federation.superlink")
"""Where a run ran: an address or a path there is nobody else's business, and whoever starts a Flower app chooses anew."""


def portable(config: FedTuneConfig) -> dict[str, Any]:
    """Return the config as it may leave, without what is about the place where it ran."""
    table = public_config(config)
    for path in [path for path in leaves(table) if path.startswith(_OF_THE_PLACE)]:
        section, _, key = path.rpartition(".")
        del table[section][key]
    return table


def to_flat(table: Mapping[str, Any]) -> Flat:
    """Return a portable config as flat values, the template's names first; `from_flat` reads them back."""
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
    """Return the config that flat values mean; what is left out is the challenge's.

    Raises:
        ConfigError: a name is none of them, or a value is refused; every one is named as it stands in pyproject.toml.
    """
    names = {name: path for path, name in NAMES.items()}
    names |= {_OWN + path: path for path in known_paths() if path not in NAMES and not path.startswith(_OF_THE_PLACE)}
    known = [*names, FOUR_BIT_TYPE]
    if unknown := [name for name in flat if name not in known]:
        near = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.6) for name in unknown}
        raise ConfigError([Problem(name, "there is no such key", nearest="".join(near[name])) for name in unknown])
    values = {names[name]: (name, value) for name, value in flat.items() if name != FOUR_BIT_TYPE}
    flags = {
        path: (f"{name} in pyproject.toml", _value(path, value, flat.get(FOUR_BIT_TYPE, "fp4")))
        # A strategy's name comes before its options: the options of another one are dropped with it.
        for path, (name, value) in sorted(values.items(), key=lambda item: item[0] != "strategy.name")
        if path not in ("challenge", "recipe")
    }
    chosen = {kind: str(values[kind][1]) for kind in ("challenge", "recipe") if kind in values and values[kind][1]}
    return load_config(challenge=chosen.get("challenge"), recipe=chosen.get("recipe"), flags=flags).config


def with_config(context: Context) -> Context:
    """Return `context` with fedtune's config in place of a submission's flat values; the state stays the same one.

    Raises:
        ConfigError: a value is refused.
    """
    config = from_flat(context.run_config)
    ours = copy(context)  # Flower refuses a context whose run config was changed
    ours.run_config = {"fedtune-config": config.model_dump_json(), "run-dir": ""}
    return ours


def _value(path: str, value: Any, four_bit_type: Any) -> Any:
    """Return a flat value as the config wants it; what cannot be turned stays as it is and is refused there."""
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
