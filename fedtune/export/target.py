"""The `Target` interface: a form that `fedtune export --to NAME` gives to one adapter of a run.

To add a target, write one module in `fedtune/export/targets/`: a frozen dataclass whose fields are the options of the target,
and `TARGET`, which names the class. The command line imports these modules to list their options, so they import torch,
transformers and other slow libraries inside methods only.
"""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Protocol, get_type_hints

if TYPE_CHECKING:
    from fedtune.export.checkpoint import RunCheckpoint

Listener = Callable[[int, int], None]
"""Called during a long export with the bytes written so far and the total."""


@dataclass(frozen=True)
class Option:
    """The command-line option that sets a field of a target; the annotation of the field holds it."""

    flag: str
    help: str
    metavar: str | None = None
    """How the help names the value; None for a switch."""


# Options that several targets have.
Out = Annotated[
    Path | None, Option("--out", "The folder to write; one in exports, named after the run, unless given.", "DIR")
]
Tokenizer = Annotated[bool, Option("--tokenizer", "Add the tokenizer files of the base model.")]
Licence = Annotated[str | None, Option("--license", "The licence in the card, such as apache-2.0.", "NAME")]


@dataclass(frozen=True)
class Plan:
    """What an export would write."""

    sizes: Mapping[str, int]
    """Bytes by file name."""
    card: str
    """The text of README.md."""
    notes: tuple[str, ...] = ()
    """What the user should know, one sentence each."""


class Result(Protocol):
    """What an export has written: a dataclass, whose fields `--json` prints."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes by file name."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, one sentence each."""

    @property
    def location(self) -> str:
        """The folder or the address of the export."""

    @property
    def status(self) -> str:
        """How the export ended, if `location` does not say it all."""


@dataclass(frozen=True)
class Exported:
    """The folder that an export has written."""

    folder: Path
    files: Mapping[str, int]
    """Bytes by file name."""
    notes: tuple[str, ...] = ()
    """What the user should know: what is missing, what was checked and with what result."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """The same as `files`."""
        return self.files

    @property
    def location(self) -> str:
        """The path of the folder."""
        return str(self.folder)

    @property
    def status(self) -> str:
        """Empty: a folder that exists is complete."""
        return ""


class Target(ABC):
    """One form of an export; the fields of a subclass, a frozen dataclass, are its options.

    A switch has the default False, every other option the default None, or no default if the user must give it.
    """

    name: ClassVar[str]
    """What `--to` calls it."""

    @abstractmethod
    def plan(self, checkpoint: RunCheckpoint) -> Plan:
        """Return what `write` would write, for `--dry-run`; nothing is written or sent."""

    @abstractmethod
    def write(self, checkpoint: RunCheckpoint, listener: Listener | None = None) -> Result:
        """Export an adapter of a run, completely or not at all."""

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Return the options of this target by field name."""
        hints = get_type_hints(cls, include_extras=True)
        notes = {name: getattr(hint, "__metadata__", (None,))[0] for name, hint in hints.items()}
        return {name: note for name, note in notes.items() if isinstance(note, Option)}


def targets() -> dict[str, type[Target]]:
    """Return every target by name: the `TARGET` of each module in `fedtune/export/targets/`."""
    package = import_module("fedtune.export.targets")  # whose modules import this one
    modules = (import_module(f"{package.__name__}.{info.name}") for info in pkgutil.iter_modules(package.__path__))
    return {module.TARGET.name: module.TARGET for module in modules}
