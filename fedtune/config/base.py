"""What every part of the config is: frozen, strict about its keys, its fields documented in place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """A part of the config: frozen, and unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )


@dataclass(frozen=True)
class Key:
    """Facts about a config key that other packages need, written on the key: `Annotated[int, Key(resumable=True)]`."""

    resumable: bool = False
    """Whether a resumed run may change the key; it must not change a bit of the adapter."""
    publishable: Literal["whole", "name", "never"] = "whole"
    """How the value leaves in a package: as it is, a path as its last name, or not at all."""
    in_card: bool = False
    """Whether the model card's table shows the key."""


def keys_of(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every key of a section and of the sections in it, by its dotted path."""
    for name, info in section.model_fields.items():
        members = [each for each in (info.annotation, *get_args(info.annotation)) if isinstance(each, type)]
        sections = [each for each in members if issubclass(each, Section)]
        for each in sections:
            yield from keys_of(each, f"{prefix}{name}.")
        if not sections:
            yield prefix + name, info


def facts_of(info: FieldInfo) -> Key:
    """Return the facts on a key."""
    return next((each for each in info.metadata if isinstance(each, Key)), Key())
