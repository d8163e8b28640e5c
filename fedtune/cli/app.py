"""The `fedtune` command: words in, words out. Heavy imports wait inside the subcommands, so that --help is instant."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from fedtune.cli import budget, export, node, train
from fedtune.cli import eval as evaluation
from fedtune.cli.console import report
from fedtune.cli.streams import prepare_streams

app = typer.Typer(
    name="fedtune",
    help="Federated LoRA fine-tuning of language models: train it where the data lies, score it, count its bytes, hand it on.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fedtune {version('fedtune')}")
        raise typer.Exit


@app.callback()
def fedtune(
    _: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """Federated LoRA fine-tuning of language models."""


app.command("train")(train.train)
app.command("eval")(evaluation.evaluate)
app.command("budget")(budget.budget)
app.command("export")(export.export)
app.command("node")(node.node)


def main() -> None:
    """Entry point of the `fedtune` command."""
    # torch's CPU threads wait for each other by spinning; on a machine that others use as well, that takes the time of the
    # very thread that is waited for. To be said before torch is imported; the user's own setting stands.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    prepare_streams()
    try:
        try:
            app(args=with_optional_values(sys.argv[1:]))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has read enough
        sys.exit(1)
    except OSError as error:  # of --help and of what is written at the end; commands end their own errors
        report(error)
        sys.exit(3)


def with_optional_values(words: list[str]) -> list[str]:
    """Let `--resume` stand without a value: it then means the latest run."""
    filled = []
    for position, word in enumerate(words):
        filled.append(word)
        if word == "--resume" and (position + 1 == len(words) or words[position + 1].startswith("-")):
            filled.append("latest")
    return filled


if __name__ == "__main__":
    main()
