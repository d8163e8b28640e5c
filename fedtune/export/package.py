"""A package: the files of an export by name, with a manifest that holds the sha256 of each.

The code that makes a package names every file; no folder is copied. Links are refused, texts are searched for secrets, and
local paths are cut to their last part.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fedtune.config.base import facts_of, keys_of
from fedtune.config.schema import BUILTIN_TINY, FedTuneConfig
from fedtune.errors import MissingError, UsageError
from fedtune.runs.atomic import write_folder
from fedtune.runs.directory import file_sha256

MANIFEST = "manifest.json"

_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bAKIA[0-9A-Z]{16}\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|://[^/\s:@]+:[^/\s@]+@"
)
"""Tokens of the hub and of common services, private keys, and addresses that contain a password."""


@dataclass(frozen=True)
class Package:
    """Files by their names inside the package, each as its content or as the path of the file that holds it."""

    files: Mapping[str, bytes | Path]

    def sizes(self) -> dict[str, int]:
        """Return bytes by name, the manifest included, in name order."""
        files = {**self.files, MANIFEST: self.manifest()}
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in sorted(files.items())
        }

    def digests(self) -> dict[str, str]:
        """Return the sha256 of every file, in name order."""
        return {
            name: hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else file_sha256(content)
            for name, content in sorted(self.files.items())
        }

    def text(self, name: str) -> str:
        """Return the content of a text file."""
        content = self.files[name]
        return content.decode("utf-8") if isinstance(content, bytes) else content.read_text(encoding="utf-8")

    def manifest(self) -> bytes:
        """Return manifest.json: the sha256 of every other file."""
        return (json.dumps(self.digests(), indent=2) + "\n").encode()

    def write(self, folder: Path) -> None:
        """Write the package to `folder`, completely or not at all; a former export there is replaced.

        Raises:
            UsageError: `folder` holds other files.
            MissingError: the parent of `folder` cannot be created.
        """
        prepare_folder(folder)

        def fill(new_folder: Path) -> None:
            self.copy_to(new_folder)
            (new_folder / MANIFEST).write_bytes(self.manifest())

        write_folder(folder, fill)

    def copy_to(self, folder: Path) -> None:
        """Write the files into `folder`, without the manifest."""
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())


def prepare_folder(folder: Path) -> None:
    """Check that an export may replace `folder`, and create its parent.

    Raises:
        UsageError: `folder` holds files that no export wrote.
        MissingError: its parent cannot be created.
    """
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and _is_export(folder))):
        raise UsageError(f"{folder} already holds other files.", hint="Choose another --out.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MissingError(f"{folder} cannot be created: {error.strerror}.", hint="Choose another --out.") from None


def _is_export(folder: Path) -> bool:
    """Whether the manifest of an export names every file in a folder."""
    try:
        named = {MANIFEST, *json.loads((folder / MANIFEST).read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError):
        named = set()
    return all(path.relative_to(folder).as_posix() in named for path in folder.rglob("*") if not path.is_dir())


def package(files: Mapping[str, bytes | str | Path]) -> Package:
    """Return a package of `files`.

    Raises:
        UsageError: a file is a link or not a regular file, or a text contains what looks like a secret.
    """
    checked: dict[str, bytes | Path] = {}
    for name, content in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name:
            raise ValueError(f"{name!r} is not a file name inside a package")
        if isinstance(content, Path):
            if content.is_symlink() or not content.is_file():
                raise UsageError(
                    f"{content} is a link or not a regular file and is not exported.",
                    hint="Replace it with the file itself.",
                )
            checked[name] = content
            data = b"" if content.suffix == ".safetensors" else content.read_bytes()
        else:
            data = content.encode("utf-8") if isinstance(content, str) else content
            checked[name] = data
        if found := secret_in(data.decode("utf-8", "replace")):
            raise UsageError(
                f"{name} contains what looks like a secret ({found}…).", hint="Remove it and export again."
            )
    return Package(checked)


def secret_in(text: str) -> str:
    """Return the first six characters of a secret in `text`, or an empty text if there is none."""
    match = _SECRET.search(text)
    return match[0][:6] if match else ""


def public_config(config: FedTuneConfig) -> dict[str, Any]:
    """Return the resolved config as it may be published: without addresses, local folders and secrets."""
    table = config.model_dump(mode="json")
    for path, info in keys_of(FedTuneConfig):
        section, _, name = path.rpartition(".")
        how, holder = facts_of(info).publishable, table[section] if section else table
        if how == "never":
            holder[name] = info.get_default()
        elif how == "name" and holder[name] is not None:
            holder[name] = public_name(holder[name])
    return redact_table(table)


def redact(text: str) -> str:
    """Return `text` with everything that looks like a secret replaced by `[removed]`."""
    return _SECRET.sub("[removed]", text)


def redact_table(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with everything that looks like a secret replaced."""
    redacted: dict[str, Any] = json.loads(redact(json.dumps(table)))
    return redacted


def to_json(value: Any) -> str:
    """Return `value` as the text of a JSON file."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def hub_base(config: FedTuneConfig) -> str | None:
    """Return the id of the base model on the hub; None for a local folder and for a builtin model.

    Only models from the hub have a revision in the run's config, so a folder named like an id is not mistaken for one.
    """
    return config.model.base if config.model.revision and is_hub_id(config.model.base) else None


def hub_data(config: FedTuneConfig) -> str | None:
    """Return the id of the data set on the hub; None for local data."""
    source = config.data.source
    return source if source is not None and config.data.revision and is_hub_id(source) else None


def public_name(source: str) -> str:
    """Return the public name of a base model or data set: a hub id or builtin name as it is, the last part of a local path."""
    if source == BUILTIN_TINY or is_hub_id(source):
        return redact(source)
    return redact(re.split(r"[/\\]", source.rstrip("/\\"))[-1])


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a hub id (`owner/name`) and is not a local folder or file."""
    return (
        re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", name) is not None
        and "--" not in name
        and ".." not in name
        and not Path(name).exists()
    )
