"""inputs.json: fingerprints of the local files that a run reads, so that a resumed run reads the same ones.

A file is known by its size and a sha256: of all its bytes, or, above 64 MiB (a base model's weights), of its first MiB, where
safetensors keeps names, shapes and types, and of 1,024 blocks of 4 KiB at equal distances up to its end. Training moves nearly
all weights, so another model of the same shape differs in every block; a single flipped bit may lie between them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import TypeAdapter, ValidationError

from fedtune.errors import MissingError
from fedtune.runs.atomic import write_json

WHOLE_BYTES = 64 * 2**20
"""Files up to this size are hashed whole."""

_HEAD_BYTES, _BLOCKS, _BLOCK_BYTES = 2**20, 1024, 4096


@dataclass(frozen=True)
class Fingerprint:
    """What a file is known by."""

    bytes: int
    """Its size."""
    sha256: str
    """Of its bytes, in hex."""
    sampled: bool = False
    """Whether the sha256 is of blocks at equal distances only."""

    def __str__(self) -> str:
        return f"{self.bytes:,} bytes, sha256 {self.sha256[:12]}…{' of samples' if self.sampled else ''}"


@dataclass(frozen=True)
class Inputs:
    """The local files that a run reads, by name; empty where they came from the hub, whose revision the config holds."""

    data: Mapping[str, Fingerprint]
    """The data file, or those of a folder."""
    base: Mapping[str, Fingerprint]
    """The base model's weights, configuration and tokenizer."""

    def changes(self, now: Inputs) -> list[str]:
        """Return what is not the same in `now`, one sentence per file."""
        return [
            *(f"data file {text}" for text in _changes(self.data, now.data)),
            *(f"base model's {text}" for text in _changes(self.base, now.base)),
        ]

    def missing(self, now: Inputs) -> list[str]:
        """Return the names of the files that are not there any more."""
        return [*_missing(self.data, now.data), *_missing(self.base, now.base)]


def fingerprint(path: Path) -> Fingerprint:
    """Return the fingerprint of a file.

    Raises:
        MissingError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size <= WHOLE_BYTES:
                return Fingerprint(size, hashlib.file_digest(file, "sha256").hexdigest())
            return Fingerprint(size, _sampled_sha256(file, size), sampled=True)
    except OSError as error:
        raise MissingError(f"{path} cannot be read: {error.strerror}.") from None


def fingerprints(paths: Sequence[Path]) -> dict[str, Fingerprint]:
    """Return the fingerprints of files by their names, in name order."""
    return {path.name: fingerprint(path) for path in sorted(paths)}


def write_inputs(path: Path, inputs: Inputs) -> None:
    """Write `inputs` to the file `path`."""
    write_json(path, asdict(inputs))


def read_inputs(path: Path) -> Inputs | None:
    """Return what `write_inputs` wrote, None where there is no such file.

    Raises:
        MissingError: the file is damaged.
    """
    try:
        return TypeAdapter(Inputs).validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise MissingError(
            f"{path} cannot be read ({reason}), so nothing shows that the run would go on with the same data.",
            hint="Restore the file from a backup, or start a new run.",
        ) from None


def _sampled_sha256(file: BinaryIO, size: int) -> str:
    digest = hashlib.sha256(file.read(_HEAD_BYTES))
    last = size - _BLOCK_BYTES
    for number in range(_BLOCKS):
        file.seek(_HEAD_BYTES + (last - _HEAD_BYTES) * number // (_BLOCKS - 1))
        digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _changes(before: Mapping[str, Fingerprint], now: Mapping[str, Fingerprint]) -> list[str]:
    if len(before) == len(now) == 1:  # a single file may have another name
        ((_, old),), ((name, new),) = before.items(), now.items()
        return [] if old == new else [f"{name}: {old} when the run was started, {new} now"]
    found = [f"{name}: there when the run was started, missing now" for name in _missing(before, now)]
    found += [f"{name}: not there when the run was started" for name in sorted(set(now) - set(before))]
    found += [
        f"{name}: {before[name]} when the run was started, {now[name]} now"
        for name in sorted(set(before) & set(now))
        if before[name] != now[name]
    ]
    return found


def _missing(before: Mapping[str, Fingerprint], now: Mapping[str, Fingerprint]) -> list[str]:
    return [] if len(before) == len(now) == 1 else sorted(set(before) - set(now))
