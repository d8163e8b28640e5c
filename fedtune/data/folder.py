"""Which files of a folder are clients' data; light, because the command line counts them before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from fedtune.errors import UsageError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""The kinds of data file that fedtune reads."""

_NOT_DATA = ("readme", "license", "licence")


def client_files(folder: Path) -> list[Path]:
    """Return a folder's data files, sorted by name; hidden files, README, LICENSE and sub-folders are passed over.

    Raises:
        UsageError: the folder cannot be read or holds no data file.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise UsageError(f"The folder {folder} cannot be read: {error.strerror}.") from None
    paths = [path for path in paths if not path.name.lower().startswith(_NOT_DATA)]
    if not paths:
        raise UsageError(f"The folder {folder} holds no data file.", hint=f"fedtune reads {', '.join(SUFFIXES)}.")
    return paths
