"""What leaves a run: named files, each from an allow-list, with a sha256 for every one.

Nothing is copied because it lies in a folder: every file is named here by the code that makes a package. Links, and whatever
lies outside the run, are refused; texts are searched for secrets, and local paths are cut to their last name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fedtune.config.schema import BUILTIN_TINY, FedTuneConfig
from fedtune.errors import MissingError, UsageError
from fedtune.runs.atomic import write_folder
from fedtune.runs.directory import file_sha256

MANIFEST = "manifest.json"

_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bAKIA[0-9A-Z]{16}\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|://[^/\s:@]+:[^/\s@]+@"
)
"""Tokens of the hub and of common services, private keys, and addresses with a password in them."""


@dataclass(frozen=True)
class Package:
    """Files by their names inside the package: content, or the regular file that holds it."""

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
        """Return one of the package's texts."""
        content = self.files[name]
        return content.decode("utf-8") if isinstance(content, bytes) else content.read_text(encoding="utf-8")

    def manifest(self) -> bytes:
        """Return manifest.json: the sha256 of every other file."""
        return (json.dumps(self.digests(), indent=2) + "\n").encode()

    def write(self, folder: Path) -> None:
        """Write the package to `folder`, whole or not at all; what an export wrote there before is replaced.

        Raises:
            UsageError: `folder` holds something else.
        """
        make_room(folder)

        def fill(beside: Path) -> None:
            for name, content in {**self.files, MANIFEST: self.manifest()}.items():
                target = beside / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content if isinstance(content, bytes) else content.read_bytes())

        write_folder(folder, fill)


@dataclass(frozen=True)
class Exported:
    """What an export to a folder has made."""

    folder: Path
    sizes: Mapping[str, int]
    """Bytes by file name."""
    notes: tuple[str, ...] = ()
    """What the user should know: what is missing, what was checked and came out how."""


def make_room(folder: Path) -> None:
    """Make sure that an export can be written to `folder`.

    Raises:
        UsageError: it holds something that no export made.
        MissingError: its parent cannot be made.
    """
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and _may_go(folder))):
        raise UsageError(f"{folder} holds something else already.", hint="Choose another --out.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MissingError(f"{folder} cannot be made: {error.strerror}.", hint="Choose another --out.") from None


def _may_go(folder: Path) -> bool:
    """Whether a folder holds nothing but what the manifest of an export names."""
    try:
        named = {MANIFEST, *json.loads((folder / MANIFEST).read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError):
        named = set()
    return all(path.relative_to(folder).as_posix() in named for path in folder.rglob("*") if not path.is_dir())


def package(files: Mapping[str, bytes | str | Path]) -> Package:
    """Return a package of `files`.

    Raises:
        UsageError: a file is a link or no regular file, or a text holds what looks like a secret; both are named.
    """
    checked: dict[str, bytes | Path] = {}
    for name, content in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name:
            raise ValueError(f"{name!r} is no name inside a package")
        if isinstance(content, Path):
            if content.is_symlink() or not content.is_file():
                raise UsageError(
                    f"{content} is a link or no regular file, and does not leave the run.", hint="Put the file there."
                )
            checked[name] = content
            data = b"" if content.suffix == ".safetensors" else content.read_bytes()
        else:
            data = content.encode("utf-8") if isinstance(content, str) else content
            checked[name] = data
        if found := secret_in(data.decode("utf-8", "replace")):
            raise UsageError(f"{name} holds what looks like a secret ({found}…).", hint="Remove it and export again.")
    return Package(checked)


def secret_in(text: str) -> str:
    """Return the first characters of a secret in `text`, too few to use; empty without one."""
    match = _SECRET.search(text)
    return match[0][:6] if match else ""


def public_config(config: FedTuneConfig) -> dict[str, Any]:
    """Return the resolved config as it may leave: paths cut to their last name, addresses left out, secrets struck out."""
    table = config.model_dump(mode="json")
    table["model"]["base"] = public_name(config.model.base)
    if config.data.source is not None:
        table["data"]["source"] = public_name(config.data.source)
    for private in ("superlink", "superlink_ca"):  # addresses and files of whoever trained it
        table["federation"][private] = None
    table["federation"]["ray_address"] = ""
    struck: dict[str, Any] = json.loads(strike(json.dumps(table)))
    return struck


def strike(text: str) -> str:
    """Return `text` without what looks like a secret."""
    return _SECRET.sub("[removed]", text)


def hub_base(config: FedTuneConfig) -> str | None:
    """Return the base's id on the hub; None for a folder, even one that is named like an id, and a builtin model.

    What came from the hub has its commit in the run's config.
    """
    return config.model.base if config.model.revision and is_hub_id(config.model.base) else None


def hub_data(config: FedTuneConfig) -> str | None:
    """Return the data set's id on the hub, None where it did not come from there."""
    source = config.data.source
    return source if source is not None and config.data.revision and is_hub_id(source) else None


def public_name(source: str) -> str:
    """Return how a base or a data set is called outside: a hub id or builtin name as it is, a local path's last name."""
    if source == BUILTIN_TINY or is_hub_id(source):
        return strike(source)
    return strike(re.split(r"[/\\]", source.rstrip("/\\"))[-1])


def is_hub_id(name: str) -> bool:
    """Whether `name` is a repository's id on the hub (`owner/name`) and no folder or file here."""
    return (
        re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", name) is not None
        and "--" not in name
        and ".." not in name
        and not Path(name).exists()
    )
