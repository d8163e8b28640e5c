"""Merge defaults, challenge, recipe, config files, `--set` and flags into one frozen config, and say where values come from.

Order, the later winning: defaults < challenge < recipe < `--config` files < `--set` < named flags.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fedtune.config.base import keys_of
from fedtune.config.facts import load_preset, table_value
from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies import STRATEGIES
from fedtune.errors import ConfigError, Problem, UsageError

Table = dict[str, Any]


@dataclass(frozen=True)
class ResolvedConfig:
    """A config and where its values came from."""

    config: FedTuneConfig
    origins: Mapping[str, str] = field(default_factory=dict)
    """Dotted path to origin, for every value that is not a default."""
    named: frozenset[str] = frozenset()
    """Every dotted path that some source gives a value to, be it the default's."""


def load_config(
    *,
    challenge: str | None = None,
    recipe: str | None = None,
    files: Sequence[Path] = (),
    settings: Sequence[str] = (),
    flags: Mapping[str, tuple[str, Any]] | None = None,
) -> ResolvedConfig:
    """Merge all sources of config values and validate the result.

    Args:
        challenge: Name of a challenge, as given by `--challenge`.
        recipe: Name of a recipe, as given by `--recipe`; it implies its challenge.
        files: TOML or JSON files, later ones winning.
        settings: `key.path=value` strings, the value in TOML; a bare word is a string.
        flags: Dotted path to (flag, value) for every other named flag that was given.

    Raises:
        ConfigError: some values are refused; carries every problem with its dotted path.
        UsageError: a file cannot be read or a setting cannot be parsed.
    """
    user: list[tuple[str, Table]] = [(str(path), read_table(path)) for path in files]
    user += [(f"--set {setting}", parse_setting(setting)) for setting in settings]
    user += [(flag, nested(path, value)) for path, (flag, value) in (flags or {}).items()]
    user += [
        (f"--{kind}", {kind: name}) for kind, name in (("challenge", challenge), ("recipe", recipe)) if name is not None
    ]

    chosen: Table = {}
    for _, table in user:
        chosen.update({kind: table[kind] for kind in ("challenge", "recipe") if isinstance(table.get(kind), str)})

    presets: list[tuple[str, Table]] = []
    if "recipe" in chosen:
        preset = load_preset("recipe", chosen["recipe"])
        wanted = chosen.setdefault("challenge", preset.challenge)
        if wanted != preset.challenge:
            raise ConfigError(
                [Problem("recipe", f"{preset.name} belongs to the challenge {preset.challenge}, not to {wanted}")]
            )
        presets.append((f"recipe {preset.name}", {"challenge": wanted, **preset.config}))
    if "challenge" in chosen:
        preset = load_preset("challenge", chosen["challenge"])
        presets.insert(0, (f"challenge {preset.name}", dict(preset.config)))

    merged: Table = {"strategy": {"name": "fedavg"}}
    origins: dict[str, str] = {}
    for origin, table in [*presets, *user]:
        merge(merged, table)
        origins.update(dict.fromkeys(leaves(table), origin))
    try:
        config = FedTuneConfig.model_validate_json(json.dumps(merged), strict=True)
    except ValidationError as error:
        raise ConfigError(problems_of(error, origins)) from None
    defaults = FedTuneConfig().model_dump(mode="json")
    dumped = config.model_dump(mode="json")
    changed = {path for path in leaves(dumped) if table_value(dumped, path) != table_value(defaults, path)}
    effective = {path: origin for path, origin in origins.items() if path in changed}
    return ResolvedConfig(config, effective, frozenset(origins))


def parse_setting(setting: str, flag: str = "--set") -> Table:
    """Parse one `--set key.path=value`, or the like of another flag, into a nested table.

    Raises:
        UsageError: there is no `=`, or the value is neither TOML nor a bare word.
    """
    path, equals, text = setting.partition("=")
    path, text = path.strip(), text.strip()
    if not equals or not path or not all(path.split(".")):
        raise UsageError(
            f"{flag} {setting!r} is not of the form key.path=value.", hint=f"Example: {flag} adapter.rank=16"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if text[:1] in ("[", "{", '"', "'"):
            raise UsageError(
                f"The value of {flag} {setting!r} is not valid TOML.",
                hint=f"""Quote strings inside lists: {flag} 'adapter.targets=["q_proj", "v_proj"]'""",
            ) from None
        value = text
    return nested(path, value)


def read_table(path: Path, kind: str = "config file") -> Table:
    """Read a TOML or JSON config file into a nested table.

    Args:
        path: The file.
        kind: What it is, for the error.

    Raises:
        UsageError: the file is missing, unreadable, or not a table.
    """
    try:
        text = path.read_text(encoding="utf-8")
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"The {kind} {path} cannot be read: {reason}.") from None
    except ValueError as error:
        raise UsageError(f"The {kind} {path} cannot be parsed: {error}.") from None
    if not isinstance(table, dict):
        raise UsageError(f"The {kind} {path} holds no table of keys.")
    return table


def to_toml(resolved: ResolvedConfig) -> str:
    """Return the config as TOML that `--config` reads back, with the origin of every non-default value as a comment."""
    table = resolved.config.model_dump(mode="json", exclude_none=True)
    lines = _toml_lines(table, "", resolved.origins)
    for name, section in table.items():
        if isinstance(section, dict):
            lines += ["", f"[{name}]", *_toml_lines(section, f"{name}.", resolved.origins)]
    return "\n".join(lines).strip() + "\n"


def _toml_lines(table: Table, prefix: str, origins: Mapping[str, str]) -> list[str]:
    lines = []
    for key, value in table.items():
        if isinstance(value, dict):
            continue
        # tomli_w writes a list over several lines; one line reads better here.
        text = ", ".join(_toml_value(item) for item in value) if isinstance(value, list) else ""
        line = f"{key} = [{text}]" if isinstance(value, list) else f"{key} = {_toml_value(value)}"
        origin = origins.get(prefix + key)
        lines.append(f"{line}  # {origin}" if origin else line)
    return lines


def _toml_value(value: Any) -> str:
    return tomli_w.dumps({"v": value}).removeprefix("v = ").rstrip("\n")


def known_paths() -> list[str]:
    """Return every dotted path of the config, strategy options included."""
    return sorted({path for path, _ in keys_of(FedTuneConfig)})


def problems_of(error: ValidationError, origins: Mapping[str, str]) -> list[Problem]:
    """Translate pydantic's errors into problems, one a path, with origin and nearest key."""
    paths = known_paths()
    sections = {path.rpartition(".")[0] for path in paths}
    tags = set(STRATEGIES)
    problems: dict[str, Problem] = {}
    for detail in error.errors():
        parts = [str(part) for part in detail["loc"]]
        if parts[:1] == ["strategy"] and parts[1:2] and parts[1] in tags:
            del parts[1]
        path = ".".join(parts)
        # A union's members report below the field itself: `adapter.targets.tuple[str, ...]`.
        while path not in paths and path not in sections and path.rpartition(".")[0] in paths:
            path = path.rpartition(".")[0]
        for known in paths:
            if path.startswith(known + "."):
                path = known
        if detail["type"] == "extra_forbidden" and isinstance(detail["input"], dict):
            unknown = list(leaves(detail["input"], f"{path}.")) or [path]
        else:
            unknown = [path]
        for leaf in unknown:
            nearest = _nearest(leaf, paths) if detail["type"] == "extra_forbidden" else ""
            origin = origins.get(leaf) or next((o for p, o in origins.items() if p.startswith(leaf + ".")), "")
            problems.setdefault(leaf, Problem(leaf, _explain(leaf, detail, paths), origin, nearest))
    return list(problems.values())


def _nearest(path: str, paths: Sequence[str]) -> str:
    """Return the known path that a misspelt one most likely means, or an empty string."""
    if path in paths:
        return ""
    key = path.rpartition(".")[2]
    same_key = [known for known in paths if known.rpartition(".")[2] == key]
    candidates = difflib.get_close_matches(path, same_key or paths, n=1, cutoff=0.0 if same_key else 0.6)
    return candidates[0] if candidates else ""


def _explain(path: str, detail: ErrorDetails, paths: Sequence[str]) -> str:
    given = json.dumps(detail.get("input"), default=str)
    match detail["type"]:
        case "extra_forbidden":
            return "is an option of another strategy.name" if path in paths else "there is no such key"
        case "model_type" | "model_attributes_type":
            return f"{given} is a single value; this is a section with keys of its own"
        case "value_error":
            return str(detail["ctx"]["error"])
        case "union_tag_invalid":
            return f"{detail['ctx']['tag']!r} is not one of {detail['ctx']['expected_tags']}"
        case _ if path == "adapter.targets":
            return f"{given} is neither 'default', 'all-linear' nor a list of module names"
        case "literal_error":
            return f"{given} is not one of {detail['ctx']['expected']}"
        case "missing":
            return "is missing"
        case _:
            message = detail["msg"].removeprefix("Input ")
            return f"{given} {message}" if message != detail["msg"] else f"{given}: {message}"


def nested(path: str, value: Any) -> Table:
    """Return `{"a": {"b": value}}` for the dotted path `a.b`."""
    for part in reversed(path.split(".")):
        value = {part: value}
    return dict(value)


def merge(base: Table, update: Mapping[str, Any]) -> None:
    """Merge `update` into `base` in place, table by table; another strategy starts with none of the former's options."""
    for key, value in update.items():
        if isinstance(value, Mapping):
            old = base.get(key)
            other = key == "strategy" and "name" in value and isinstance(old, dict) and old.get("name") != value["name"]
            base[key] = {} if other or not isinstance(old, dict) else old
            merge(base[key], value)
        else:
            base[key] = value


def leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every value in a nested table."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key
