"""The leaderboard's training text, and the templates that make instruction and response from a row's columns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from fedtune.data.values import ValueRefusedError, to_text
from fedtune.errors import ConfigError, Problem, UsageError

HEADER = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


def render_prompt(instruction: str) -> str:
    """Return the training text up to and including `### Response:` (protocol, section 1)."""
    return f"{HEADER}\n### Instruction:\n{instruction}\n### Response:"


def render_text(instruction: str, response: str) -> str:
    """Return the whole training text: the prompt, one space, the response (protocol, section 1)."""
    return f"{render_prompt(instruction)} {response}"


def fill(template: str, row: Mapping[str, Any], path: str = "data.instruction") -> str:
    """Return `template` with each `{column}` replaced by the row's value; `{{` and `}}` are literal braces.

    The values are not looked into: braces in them stay as they are. A missing value becomes an empty string.

    Args:
        template: `data.instruction` or `data.response` of the config.
        row: Column name to value.
        path: Dotted path of the template, for the error.

    Raises:
        ConfigError: the row has no such column; names the template, the column and the columns that exist.
        UsageError: a value has no text (see `fedtune/data/values.py`); names the column.
    """

    def value(match: re.Match[str]) -> str:
        name: str | None = match[1]
        if name is None:
            return match[0][0]
        if name not in row:
            raise ConfigError([unknown_column(path, name, list(row))])
        try:
            return to_text(row[name]) or ""
        except ValueRefusedError as error:
            raise UsageError(f"A value of the column {name!r} is {error}.") from None

    return _FIELD.sub(value, template)


def fields_of(template: str) -> list[str]:
    """Return the names of the columns that a template has, each once, in their order."""
    return list(dict.fromkeys(match[1] for match in _FIELD.finditer(template) if match[1] is not None))


def unknown_column(path: str, name: str, columns: list[str]) -> Problem:
    """Return the problem of a config value at `path` that names a column which the data does not have."""
    nearest = get_close_matches(name, columns, n=1)
    return Problem(
        path, f"the data has no column {name!r}; it has {', '.join(map(repr, columns))}", nearest="".join(nearest)
    )
