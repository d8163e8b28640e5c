"""What is known about a challenge or a recipe beyond its config: rules, published results, the base's architecture.

Challenges and recipes are the TOML files that lie in `challenges/` and `recipes/`; there is no other list of them.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from fedtune.config.schema import FedTuneConfig
from fedtune.errors import ConfigError, Problem

Kind = Literal["challenge", "recipe"]

LEADERBOARD_CAP_MIB = 200_000
"""The leaderboard's cap on training messages; what it prints as "MB" is MiB (protocol, section 3)."""


@dataclass(frozen=True)
class Architecture:
    """Shape of a decoder with grouped-query attention: enough to know its attention adapters' shapes."""

    base: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    default_targets: tuple[str, ...]
    """PEFT's default target modules for this architecture."""


@dataclass(frozen=True)
class Preset:
    """One challenge or recipe file."""

    kind: Kind
    name: str
    config: Mapping[str, Any]
    """The config values that it sets, as a nested table."""
    challenge: str | None = None
    """The challenge that a recipe belongs to."""
    leaderboard: bool = False
    """Whether it is one of the leaderboard's challenges."""
    benchmarks: tuple[str, ...] = ()
    """The benchmarks that it is ranked on."""
    fixed: tuple[str, ...] = ()
    """Dotted paths that the leaderboard's rules fix."""
    published: Mapping[str, Any] = field(default_factory=dict)
    """Published adapter, scores and communication budget, as facts."""
    architecture: Architecture | None = None


def preset_names(kind: Kind) -> list[str]:
    """Return the names of all challenges or recipes that ship."""
    return sorted(path.stem for path in _folder(kind).glob("*.toml"))


@cache
def load_preset(kind: Kind, name: str) -> Preset:
    """Read one challenge or recipe.

    Raises:
        ConfigError: there is none of that name; the nearest is named.
    """
    names = preset_names(kind)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        raise ConfigError(
            [
                Problem(
                    kind, f"there is no {kind} {name!r}; there are {', '.join(names)}", nearest=near[0] if near else ""
                )
            ]
        )
    table = tomllib.loads((_folder(kind) / f"{name}.toml").read_text(encoding="utf-8"))
    about = table.get("about", {})
    architecture = table.get("architecture")
    return Preset(
        kind=kind,
        name=name,
        config=table.get("config", {}),
        challenge=about.get("challenge"),
        leaderboard=about.get("leaderboard", False),
        benchmarks=tuple(about.get("benchmarks", ())),
        fixed=tuple(about.get("fixed", ())),
        published=table.get("published", {}),
        architecture=architecture
        and Architecture(**{**architecture, "default_targets": tuple(architecture["default_targets"])}),
    )


def presets_of(config: FedTuneConfig) -> list[Preset]:
    """Return the challenge and the recipe that `config` started from, in that order, those of them that it has."""
    found = []
    if config.challenge is not None:
        found.append(load_preset("challenge", config.challenge))
    if config.recipe is not None:
        found.append(load_preset("recipe", config.recipe))
    return found


def known_architecture(config: FedTuneConfig) -> Architecture | None:
    """Return the architecture of `config`'s base where a preset states it, so that no network is needed."""
    for preset in reversed(presets_of(config)):
        if preset.architecture is not None and preset.architecture.base == config.model.base:
            return preset.architecture
    return None


def published_results(config: FedTuneConfig) -> Mapping[str, Any]:
    """Return what was published for `config`'s recipe, empty without one."""
    return load_preset("recipe", config.recipe).published if config.recipe else {}


def ineligible_because(config: FedTuneConfig) -> tuple[str, ...] | None:
    """Return why a run of `config` cannot be submitted to the leaderboard (protocol, section 1).

    Returns:
        An empty tuple when nothing speaks against it; None when `config` is of no leaderboard challenge.
    """
    if config.challenge is None or not (challenge := load_preset("challenge", config.challenge)).leaderboard:
        return None
    reasons = []
    for path in challenge.fixed:
        used = value_at(config, path)
        ruled = table_value(challenge.config, path)
        ruled = value_at(FedTuneConfig(), path) if ruled is None else ruled
        if used != ruled:
            reasons.append(f"{path} is {used!r}; the rules of {config.challenge} fix {ruled!r}")
    if config.communication.cap_mib > LEADERBOARD_CAP_MIB:
        reasons.append(
            f"communication.cap_mib is {config.communication.cap_mib:g}; the rules allow at most {LEADERBOARD_CAP_MIB}"
        )
    return tuple(reasons)


def value_at(config: FedTuneConfig, path: str) -> Any:
    """Return the value of `config` at a dotted path."""
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    return value


def table_value(table: Mapping[str, Any], path: str) -> Any:
    """Return the value of a nested table at a dotted path, None where there is none."""
    value: Any = table
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _folder(kind: Kind) -> Path:
    return Path(__file__).parent / f"{kind}s"
