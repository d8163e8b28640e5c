"""Options that several subcommands share, each written once, and the config that they add up to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fedtune.config.load import ResolvedConfig


def _names_of(kind: str) -> list[str]:
    from fedtune.config.facts import preset_names

    return preset_names("challenge" if kind == "challenge" else "recipe")


def path(text: str | Path) -> Path:
    """Return a path option's value with `~` replaced by the home folder, which shells leave alone in `--out=~/x`.

    Raises:
        typer.BadParameter: it is empty, or names the home of a user that does not exist.
    """
    return Path(path_or_name(str(text)))


def path_or_name(text: str) -> str:
    """Return the value of an option that takes a path or a name; a path's `~` is replaced by the home folder.

    Raises:
        typer.BadParameter: as for `path`.
    """
    if not text.strip():
        raise typer.BadParameter("the path is empty")
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        raise typer.BadParameter(f"there is no home folder for {text.partition('/')[0]}") from None


Challenge = Annotated[
    str | None,
    typer.Option(
        "--challenge",
        metavar="NAME",
        help="Start from a challenge: general-nlp, finance, medical, code or tiny.",
        autocompletion=lambda: _names_of("challenge"),
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="Start from a published submission's values; implies its challenge.",
        autocompletion=lambda: _names_of("recipe"),
    ),
]
Config = Annotated[
    list[Path] | None,
    typer.Option("--config", parser=path, metavar="FILE", help="A TOML or JSON config file; may be repeated."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="One config value, in TOML; may be repeated."),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        parser=path,
        metavar="PATH",
        help="Your data: a JSONL, JSON, CSV or Parquet file, or a folder with one file per client.",
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "--out",
        parser=path,
        metavar="DIR",
        show_default=False,
        help="The folder that holds the run directories; runs unless given.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the resolved config and the plan, and stop.")]


def resolve(
    *,
    challenge: str | None,
    recipe: str | None,
    config: list[Path] | None,
    settings: list[str] | None,
    data: Path | None = None,
    first_files: list[Path] | None = None,
    flags: Mapping[str, tuple[str, Any]] | None = None,
) -> ResolvedConfig:
    """Merge the shared options into one config.

    `--data` names the source; a folder also means one client per file in it. `flags` are a command's own, in the form of
    `load_config`.
    """
    from fedtune.config.load import load_config

    flags = dict(flags or {})
    if data is not None:
        flags["data.source"] = ("--data", str(data))
        if data.is_dir():
            from fedtune.data.folder import client_files

            flags["data.partitioner"] = ("--data", "files")
            flags["federation.clients"] = ("--data", len(client_files(data)))
    return load_config(
        challenge=challenge,
        recipe=recipe,
        files=[*(first_files or []), *(config or [])],
        settings=settings or [],
        flags=flags,
    )
