"""A submission folder as it was found, anyone's: its files by name, read without trust."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fedtune.errors import MissingError, UsageError

_PASSED_OVER = ("__pycache__", "node_modules", "runs")
_MOST_FILES = 20_000
_LONGEST_TEXT_BYTES = 50_000_000


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    file: str
    """The file's name inside the folder."""
    text: str
    """What is wrong with it, and what was expected."""


@dataclass(frozen=True)
class SubmissionFolder:
    """A folder's files, none of them followed out of it."""

    path: Path
    files: tuple[str, ...]
    """Regular files by their names inside the folder, the shallowest first; hidden folders are passed over."""
    links: tuple[str, ...]

    def named(self, pattern: str) -> list[str]:
        """Return the files whose last name fits `pattern`."""
        return [name for name in self.files if fnmatchcase(name.rpartition("/")[2], pattern)]

    def first(self, pattern: str) -> str | None:
        """Return the shallowest file whose last name fits `pattern`, None where there is none."""
        return next(iter(self.named(pattern)), None)

    def text(self, name: str) -> str | None:
        """Return a file's text; None where it is no UTF-8 text, cannot be read or is far too long."""
        try:
            if (self.path / name).stat().st_size > _LONGEST_TEXT_BYTES:
                return None
            return (self.path / name).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            return None


def open_folder(path: Path) -> SubmissionFolder:
    """List a folder.

    Raises:
        MissingError: there is none.
        UsageError: it holds far more files than a submission.
    """
    if not path.is_dir():
        raise MissingError(
            f"There is no folder {path}.", hint="Name a submission's folder: fedtune export --check PATH"
        )
    files: list[str] = []
    links: list[str] = []
    for folder, names, here in os.walk(path):
        places = [Path(folder) / name for name in (*names, *here)]
        links += [place.relative_to(path).as_posix() for place in places if place.is_symlink()]
        names[:] = [name for name in names if not name.startswith(".") and name not in _PASSED_OVER]
        files += [(Path(folder) / name).relative_to(path).as_posix() for name in here]
        if len(files) > _MOST_FILES:
            raise UsageError(f"{path} holds more than {_MOST_FILES:,} files; it is no submission.")
    regular = [name for name in files if (path / name).is_file() and not (path / name).is_symlink()]
    return SubmissionFolder(
        path, tuple(sorted(regular, key=lambda name: (name.count("/"), name))), tuple(sorted(links))
    )


def flat_table(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested table's values by dotted name, as Flower's run config has them."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flat_table(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
