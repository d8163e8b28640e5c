"""Hub data sets through `flwr_datasets.FederatedDataset`: a preflight that answers soon, the load, the local cache.

The hub's own clients retry an unreachable hub for minutes; the preflight asks once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import datasets
import httpx
from datasets.naming import camelcase_to_snakecase
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RevisionResolutionError

from fedtune.errors import MissingError, UsageError
from fedtune.hub import UnreachableError, ask_about

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubCopy:
    """The version of a hub data set that a run uses."""

    commit: str
    """Commit hash, 40 hex digits."""
    folder: Path | None
    """Where the local cache holds it ready to read; None if it must be downloaded."""


def load_hub(source: str, revision: str | None, split: str) -> datasets.Dataset:
    """Load one split of a hub data set, from the local cache where that holds the wanted commit.

    Raises:
        MissingError: the hub cannot be reached, or does not give out this data set or revision.
        UsageError: the data set has no such split, or is not one that can be loaded without running its code.
    """
    copy = find_copy(source, revision)
    try:
        if copy.folder is not None:
            return read_cached(source, copy.folder, split)
        return download(source, copy.commit, split)
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"The data set {source} cannot be loaded: {_first_line(error)}", hint="Check data.source and data.split."
        ) from error
    except (OSError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        raise MissingError(
            f"The data set {source} cannot be downloaded from {constants.ENDPOINT}: {_first_line(error)}",
            hint="Try again, or give a local copy with --data FILE.",
        ) from error


def find_copy(source: str, revision: str | None) -> HubCopy:
    """Return which commit of a hub data set `revision` means, asking the hub unless the cache answers for certain.

    With the hub out of reach the local cache decides: the newest copy in it when no revision is asked for.

    Raises:
        MissingError: the hub says no (with the reason), or it cannot be reached and the cache does not help.
    """
    # The endpoint and the cache are part of the key: the same answer holds for the whole process otherwise.
    return _find_copy(source, revision, constants.ENDPOINT, Path(datasets.config.HF_DATASETS_CACHE))


@cache
def _find_copy(source: str, revision: str | None, endpoint: str, cache_folder: Path) -> HubCopy:
    cached = cached_copies(source, cache_folder)
    if revision in cached:
        return HubCopy(revision, cached[revision])
    try:
        commit = ask_about("data set", source, lambda: _ask(source, revision, endpoint), revision)
    except UnreachableError as error:
        known = next(iter(cached), None) if revision is None else _remembered(source, revision)
        if known in cached:
            return HubCopy(known, cached[known])
        held = f" The cache holds revision {', '.join(cached)}." if cached else ""
        raise MissingError(
            f"The data set {source}{f' at revision {revision}' if revision else ''} is not in the local cache, "
            f"and {error}.{held}",
            hint="Give a local copy with --data FILE, connect to the network, or set HF_HOME to a cache that holds it.",
        ) from None
    return HubCopy(commit, cached.get(commit))


def cached_copies(source: str, cache_folder: Path) -> dict[str, Path]:
    """Return commit to folder of every prepared copy of a data set in the cache of `datasets`, the newest first."""
    name = "___".join([*source.split("/")[:-1], camelcase_to_snakecase(source.split("/")[-1])])
    found = [path.parent for path in cache_folder.glob(f"{name}/*/*/*/dataset_info.json")]
    # Of several configurations of one commit the default one stays, being the last.
    found.sort(key=lambda path: path.parts[-3] == "default")
    copies = {path.name: path for path in found if _COMMIT.fullmatch(path.name)}
    return dict(sorted(copies.items(), key=lambda item: item[1].stat().st_mtime, reverse=True))


def download(source: str, commit: str | None, split: str) -> datasets.Dataset:
    """Load one split through `FederatedDataset`, in the data set's own order.

    Raises:
        ValueError: there is no such split. Whatever else `datasets` raises passes through.
    """
    # Imported here because it takes seconds, which a refused preflight need not wait for.
    from flwr_datasets import FederatedDataset
    from flwr_datasets.partitioner import IidPartitioner

    federated = FederatedDataset(
        dataset=source, partitioners={split: IidPartitioner(num_partitions=1)}, shuffle=False, revision=commit
    )
    # Not `load_split`: that reports the data set's name to a telemetry server.
    return federated.partitioners[split].dataset


def read_cached(source: str, folder: Path, split: str) -> datasets.Dataset:
    """Return one split of the prepared copy in `folder` of the cache; a ValueError says there is no such split."""
    config_name, version, commit = folder.parts[-3:]
    builder = Cache(
        repo_id=source,
        dataset_name=source.split("/")[-1],
        config_name=config_name,
        version=version,
        hash=commit,
        cache_dir=str(folder.parents[3]),
    )
    return builder.as_dataset(split)


def _ask(source: str, revision: str | None, endpoint: str) -> str:
    api = HfApi(endpoint=endpoint)
    # This call also notes the commit in the cache, so that a named revision is known without the hub later.
    commit: str = api.resolve_revision(source, repo_type="dataset", revision=revision).resolved
    if api.dataset_info(source, revision=commit).gated:
        api.auth_check(source, repo_type="dataset")
    return commit


def _remembered(source: str, revision: str) -> str | None:
    """Return the commit that a branch or tag meant when the hub was last asked, from the local cache."""
    try:
        return HfApi().resolve_revision(source, repo_type="dataset", revision=revision, local_files_only=True).resolved
    except RevisionResolutionError:
        return None


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
    return f"{line}."
