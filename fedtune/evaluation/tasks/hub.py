"""Loads a benchmark's rows from the hub, through `datasets` and without running a data set's own code."""

from __future__ import annotations

from fedtune.errors import MissingError
from fedtune.evaluation.tasks.base import Row, Source
from fedtune.hub import UnreachableError, ask


class SourceError(Exception):
    """This source cannot be used; the message gives the reason, and the next source is tried."""


def require_hub() -> None:
    """Check that the hub answers, so that a dead network costs seconds, not minutes of retries.

    With HF_HUB_OFFLINE set there is no check: the cache may contain the rows.

    Raises:
        MissingError: the hub does not answer.
    """
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return
    try:
        ask(lambda: get_session().head(constants.ENDPOINT))
    except UnreachableError as error:
        raise MissingError(
            f"The benchmarks are on the hub, and {error}.",
            hint="Give the benchmarks' files with --data-dir DIR, or set HF_HUB_OFFLINE=1 if they are in the cache.",
        ) from error


def hub_rows(source: Source, part: str) -> list[Row]:
    """Return the rows of `part` from one source, in the original's fields.

    Raises:
        SourceError: the source cannot be loaded, or does not have the expected form.
    """
    if source.script and not source.parquet_export:
        raise SourceError("a script data set, which datasets 4 and later refuse")
    import datasets

    config = source.config or part or None
    try:
        if source.parquet_export:
            branch = f"hf://datasets/{source.hub_id}@{source.revision or 'refs/convert/parquet'}"
            files = f"{branch}/{config or 'default'}/{source.split}/*.parquet"
            loaded = datasets.load_dataset("parquet", data_files=files, split="train")
        else:
            loaded = datasets.load_dataset(source.hub_id, config, split=source.split, revision=source.revision)
        return list(source.rows(loaded))
    # Any exception: no such repository, gated, offline, other columns, a broken download.
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        raise SourceError(text.splitlines()[0].removesuffix(".")[:200]) from error


def describe(source: Source) -> str:
    """Return a source's name with its revision, for people and results: `cais/mmlu@c30699e8`."""
    revision = source.revision or ("refs/convert/parquet" if source.parquet_export else None)
    return f"{source.hub_id}@{revision[:8] if len(revision) == 40 else revision}" if revision else source.hub_id
