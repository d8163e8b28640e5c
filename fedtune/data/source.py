"""Where the rows come from: the data set that ships with fedtune, local files, a folder of files, or the hub."""

from __future__ import annotations

import contextlib
from pathlib import Path

import datasets
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from fedtune.config.schema import BUILTIN_TINY, DataConfig
from fedtune.data.files import column_texts, read_file, read_folder
from fedtune.data.folder import SUFFIXES
from fedtune.data.hub import find_copy, load_hub
from fedtune.data.prompt import fields_of
from fedtune.errors import ConfigError, MissingError, Problem
from fedtune.runs.log import silence_libraries

BUILTIN_FOLDER = Path(__file__).parent / "builtin" / "tiny"


def load_rows(config: DataConfig, seed: int) -> datasets.Dataset:
    """Load all rows as one table, shuffled with `seed` as `flwr_datasets.FederatedDataset` does before it partitions.

    The files of a folder follow one another, sorted by name, before the shuffle. Nothing is written to disk but the
    hub's own cache.

    Raises:
        ConfigError: `data.source` is missing, is no possible source, or the built-in set has no such split.
        MissingError: the file, folder or hub data set is not there or cannot be reached.
        UsageError: a file cannot be read as what its suffix says, or a value has no text; names the line.
    """
    with silence_libraries():
        path = local_path(config)
        if path is None:
            rows = _with_texts(load_hub(str(config.source), config.revision, config.split), config)
        elif path.is_dir():
            rows = datasets.concatenate_datasets(list(read_folder(path, needed_columns(config)).values()))
        else:
            rows = read_file(path, needed_columns(config))
        return rows.shuffle(seed=seed, keep_in_memory=True)


def load_files(config: DataConfig) -> dict[str, datasets.Dataset]:
    """Load a folder with one file per client: file name to table, sorted by name, rows in the file's order.

    Raises:
        ConfigError: `data.source` is not a folder.
        MissingError, UsageError: as for `load_rows`.
    """
    path = local_path(config)
    if path is None or not path.is_dir():
        raise ConfigError(
            [Problem("data.partitioner", f"files needs a folder with one file a client, which {config.source} is not")]
        )
    with silence_libraries():
        return read_folder(path, needed_columns(config))


def needed_columns(config: DataConfig) -> set[str]:
    """Return the columns that the templates and the partitioner name."""
    named = {config.partition_by} if config.partition_by else set()
    return {*fields_of(config.instruction), *fields_of(config.response), *named}


def _with_texts(rows: datasets.Dataset, config: DataConfig) -> datasets.Dataset:
    """Return a hub data set with the templates' columns as text, by the rule that holds for files.

    The column that partitions stay with its type, whose order decides which client gets which value.
    """
    table = rows.with_format("arrow")
    columns = rows.column_names
    for name in {*fields_of(config.instruction), *fields_of(config.response)} - {config.partition_by}:
        if name not in columns or rows.features[name] in (datasets.Value("string"), datasets.Value("large_string")):
            continue
        texts = column_texts(
            table[:][name],
            name,
            lambda row: f"The data set {config.source}, split {config.split}, row {row + 1}",
            strict=True,
        )
        rows = rows.remove_columns(name).add_column(name, texts, feature=datasets.Value("string"))
    return rows.select_columns(columns)


def resolved_revision(config: DataConfig) -> str | None:
    """Return the commit of the hub data set that this config means now, or None for a source that is not on the hub.

    Raises:
        ConfigError, MissingError: as for `load_rows`.
    """
    if local_path(config) is not None:
        return None
    with silence_libraries():
        return find_copy(str(config.source), config.revision).commit


def local_path(config: DataConfig) -> Path | None:
    """Return the file or folder that `data.source` means, or None when it means a data set on the hub.

    Raises:
        ConfigError: there is no source, or no such built-in data set or split.
        MissingError: the source looks like a path and is not there.
    """
    source = config.source
    if not source:
        raise ConfigError([Problem("data.source", "is missing; give a file with --data FILE, or a hub id")])
    if source.startswith("builtin:"):
        return _builtin(source, config.split)
    looks_local = source.startswith((".", "/", "~")) or Path(source).suffix.lower() in SUFFIXES
    # What no file system takes as a name (too long, an unknown ~user) is as good as not there.
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        path = Path(source).expanduser()
        if path.exists():
            return path
    try:
        validate_repo_id(source)
    except HFValidationError:
        looks_local = True
    if looks_local:
        raise MissingError(f"There is no file or folder {source}.", hint="Check the path given by --data.")
    return None


def _builtin(source: str, split: str) -> Path:
    if source != BUILTIN_TINY:
        raise ConfigError([Problem("data.source", f"there is no {source}", nearest=BUILTIN_TINY)])
    path = BUILTIN_FOLDER / f"{split}.jsonl"
    if not path.is_file():
        splits = ", ".join(sorted(found.stem for found in BUILTIN_FOLDER.glob("*.jsonl")))
        raise ConfigError([Problem("data.split", f"{source} has no split {split}; it has {splits}")])
    return path
