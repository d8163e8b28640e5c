"""Fills in the templates of `fedtune/export/templates/`, which hold the texts of an export."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import tomli_w
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedtune.budget.ledger import Entry
from fedtune.units import to_mib


def render(template: str, **values: Any) -> str:
    """Return the text of the template `<template>.j2`; a name in it without a value raises an UndefinedError."""
    return _environment().get_template(f"{template}.j2").render(values)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table without a newline at its end."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def paragraph(text: str) -> str:
    """Return the lines of `text` as one line."""
    return " ".join(line.strip() for line in text.strip().splitlines()) + "\n"


def shown(value: object) -> str:
    """Return a config value as a reader expects it: texts without quotation marks, lists with commas, JSON otherwise."""
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


def toml(value: object) -> str:
    """Return a value as TOML writes it."""
    return tomli_w.dumps({"v": value}).removeprefix("v = ").rstrip("\n")


def mib_of(entries: Iterable[Entry]) -> float:
    """Return the size of some messages in MiB."""
    return to_mib(sum(entry.bytes for entry in entries))


@cache
def _environment() -> Environment:
    environment = Environment(  # Markdown and TOML, so nothing is escaped
        loader=PackageLoader("fedtune.export"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"f": format, "paragraph": paragraph, "shown": shown, "toml": toml}
    environment.globals |= {"table": table}
    return environment
