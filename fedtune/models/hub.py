"""Finds the folder that a base model is loaded from: built in, on disk, in the hub's cache, or fetched into it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from fedtune.config.schema import BUILTIN_TINY, ModelConfig
from fedtune.errors import ConfigError, MissingError, Problem
from fedtune.hub import UnreachableError, ask_about
from fedtune.models.stored import weight_files

WEIGHTS = ["*.safetensors"]
OTHERS = ["*.json", "*.txt", "*.jinja", "tokenizer*"]
IGNORED = ["*/*", "consolidated*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.h5", "*.msgpack"]
"""Other formats' copies of the same weights, and pickles."""


@dataclass(frozen=True)
class ResolvedBase:
    """Where a base model lies, and which one it is."""

    folder: Path
    revision: str | None
    """The commit on the hub; None for a local folder or a built-in model."""


def resolve_base(config: ModelConfig, *, only_config: bool = False) -> ResolvedBase:
    """Return the folder of `config.base`, fetching what is needed and not yet cached.

    Of a repository on the hub only safetensors, tokenizer and configuration files are fetched, at one commit; its
    Python files only with `trust_remote_code`. `only_config` fetches no weights: enough to know the model's shapes.
    Where the hub cannot be reached, a cached copy is used.

    Raises:
        MissingError: there is no such model, it may not be read, it has no safetensors, or the hub cannot be reached
            and nothing is cached (within 15 s).
        ConfigError: code from the hub is to run, and no commit is pinned.
    """
    if config.base == BUILTIN_TINY:
        return ResolvedBase(_checked(Path(__file__).parent / "builtin" / "tiny", config.base, only_config), None)
    path = Path(config.base).expanduser()
    if path.is_dir():
        return ResolvedBase(_checked(path, config.base, only_config), None)
    if config.base.startswith((".", "/", "~")) or config.base.count("/") > 1:
        raise MissingError(
            f"There is no folder {config.base}.", hint="Name a folder that exists or a model on the hub: owner/name."
        )
    pinned = re.fullmatch(r"[0-9a-f]{40}", config.revision or "")
    if config.trust_remote_code and not pinned:
        raise ConfigError([Problem("model.revision", "code from the hub runs only at a commit hash of 40 hex digits")])
    if pinned and (cached := _cached(config, only_config)):
        return cached
    try:
        commit, names = _ask_hub("base model", config.base, config.revision)
    except UnreachableError as error:
        if cached := _cached(config, only_config):
            return cached
        raise MissingError(
            f"The base model {config.base} is not cached, and {error}.",
            hint="Check the network, give a folder with `--set model.base=FOLDER`, or try `--challenge tiny`, "
            "which needs no network.",
        ) from None
    _check_names(names, config.base, only_config)
    try:
        folder = _snapshot(config, commit, only_config)
    except Exception as error:
        raise MissingError(
            f"Fetching {config.base} from {constants.ENDPOINT} broke off ({type(error).__name__}).",
            hint="Run the same command again: what has been fetched is kept.",
        ) from error
    return ResolvedBase(_checked(Path(folder), config.base, only_config), commit)


def _snapshot(config: ModelConfig, revision: str | None, only_config: bool, *, local: bool = False) -> str:
    """Return the folder in the hub's cache, after fetching what it lacks unless `local`."""
    code = ["*.py"] if config.trust_remote_code else []
    patterns = ["config.json", *code] if only_config else WEIGHTS + OTHERS + code
    return snapshot_download(
        config.base, revision=revision, allow_patterns=patterns, ignore_patterns=IGNORED, local_files_only=local
    )


def _cached(config: ModelConfig, only_config: bool) -> ResolvedBase | None:
    """Return the complete cached copy of `config.base` at its revision, None without one."""
    try:
        folder = Path(_snapshot(config, config.revision, only_config, local=True))
        return ResolvedBase(_checked(folder, config.base, only_config), folder.name)
    except (EntryNotFoundError, HFValidationError, MissingError):
        return None


def fetch_adapter(name: str) -> Path:
    """Return the folder of an adapter on the hub, fetching its two files if they are not cached.

    Raises:
        MissingError: there is no such adapter, it may not be read, its weights are no safetensors, or the hub cannot be
            reached and nothing is cached.
    """
    patterns = ["adapter_config.json", "adapter_model.safetensors"]
    try:
        commit, names = _ask_hub("adapter", name)
    except UnreachableError as error:
        try:
            return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        except (EntryNotFoundError, HFValidationError):
            raise MissingError(
                f"The adapter {name} is neither a folder nor cached, and {error}.",
                hint="Check the network, or name a folder.",
            ) from None
    if absent := set(patterns) - names:
        raise MissingError(
            f"The repository {name} has no {', '.join(sorted(absent))}; fedtune reads adapters as safetensors.",
            hint="Name a repository that holds a PEFT adapter.",
        )
    try:
        return Path(snapshot_download(name, revision=commit, allow_patterns=patterns))
    except Exception as error:
        raise MissingError(
            f"Fetching {name} from {constants.ENDPOINT} broke off ({type(error).__name__}).",
            hint="Run the same command again: what has been fetched is kept.",
        ) from error


def _ask_hub(kind: str, name: str, revision: str | None = None) -> tuple[str, set[str]]:
    """Return the commit that a repository's revision means on the hub, and the names of its files."""
    info = ask_about(kind, name, lambda: HfApi().model_info(name, revision=revision), revision)
    if info.sha is None:
        raise UnreachableError(f"{constants.ENDPOINT} names no commit of it")
    return str(info.sha), {file.rfilename for file in info.siblings or ()}


def _checked(folder: Path, base: str, only_config: bool) -> Path:
    """Return `folder` if a base model can be loaded from it."""
    names = {path.name for path in folder.glob("*")}
    _check_names(names, base, only_config)
    if not only_config:
        weight_files(folder, base)
    return folder


def _check_names(names: set[str], base: str, only_config: bool) -> None:
    """Check the file names of a model's top folder."""
    # transformers would quietly load the adapter's own base, from wherever that says, and put the adapter on top.
    if "adapter_config.json" in names:
        raise MissingError(f"{base} is an adapter, not a base model.", hint="Name its base with `--set model.base=…`.")
    if "config.json" not in names:
        raise MissingError(f"The base model {base} has no config.json.", hint="Choose another model.base.")
    if not only_config and not names & {"model.safetensors", "model.safetensors.index.json"}:
        raise MissingError(
            f"The base model {base} has no weights as safetensors; fedtune loads no pickles.",
            hint="Choose another model.base, or a revision that has them.",
        )
