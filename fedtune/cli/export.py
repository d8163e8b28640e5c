"""`fedtune export`: exports an adapter of a run in one of the forms that `fedtune/export/targets/` defines."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import click
import typer

from fedtune.cli import options
from fedtune.cli.console import guarded, note, print_data, print_json, stderr
from fedtune.errors import UsageError
from fedtune.export.target import targets

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fedtune.export.checkpoint import RunCheckpoint
    from fedtune.export.target import Listener, Target


@guarded
def _export(
    run: Annotated[
        str | None,
        typer.Argument(
            parser=options.path_or_name,
            metavar="[RUN]",
            help="A run (a path, a name, or latest) or one of its adapters; the latest run unless given.",
        ),
    ] = None,
    to: str = "folder",
    peft: Annotated[
        str | None,
        typer.Option(
            "--peft",
            parser=options.path_or_name,
            metavar="NAME",
            help="The adapter of the run, such as peft_10; the last unless given.",
        ),
    ] = None,
    runs: Annotated[
        Path,
        typer.Option(
            "--runs",
            parser=options.path,
            metavar="DIR",
            show_default=False,
            help="The folder that holds the run directories.",
        ),
    ] = Path("runs"),
    *,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="List the files with their sizes and show the card; write and send nothing."),
    ] = False,
    check: Annotated[
        Path | None,
        typer.Option(
            "--check",
            parser=options.path,
            metavar="PATH",
            help="Check an existing submission, whoever wrote it, instead of exporting a run.",
        ),
    ] = None,
    json: options.Json = False,
    debug: options.Debug = False,
    **target_options: Any,
) -> None:
    """Export an adapter of a run as a folder, a merged model, a leaderboard submission or a hub repository.

    Example: fedtune export latest --to folder --license apache-2.0
    """
    given = {name: value for name, value in target_options.items() if value is not None and value is not False}
    if check is not None:
        if run is not None or peft is not None or dry_run or given or to != "folder":
            raise UsageError(
                "--check reads an existing submission and exports nothing.",
                hint=f"Use it without other options: fedtune export --check {check}",
            )
        _check(check, json)
        return
    target = _target(to, given)
    checkpoint = _open(run, peft, runs)
    subject = {"to": to, "run": checkpoint.run.path, "adapter": checkpoint.name}
    if dry_run:
        plan = target.plan(checkpoint)
        if json:
            print_json({**subject, "dry_run": True, "files": plan.sizes, "card": plan.card, "notes": plan.notes})
            return
        _show_notes(plan.notes, plan.sizes)
        width = max(map(len, plan.sizes))
        print_data("".join(f"{name:<{width}}  {size:>15,} bytes\n" for name, size in plan.sizes.items()))
        print_data(f"\n{plan.card}")
        return
    with _progress(hidden=json) as listener:
        result = target.write(checkpoint, listener)
    if json:
        print_json(subject | vars(result))
        return
    _show_notes(result.notes, result.sizes)
    if result.status:
        note(result.status)
    print_data(f"{result.location}\n")


def make_command() -> Callable[..., None]:
    """Return the command with the options of all targets that `targets()` finds."""

    @functools.wraps(_export)
    def export(**values: Any) -> None:
        _export(**values)

    shared = dict(signature(_export, eval_str=True).parameters)
    del shared["target_options"]
    names = sorted(targets())
    to = typer.Option(
        "folder",
        "--to",
        click_type=click.Choice(names),
        metavar="TARGET",
        show_default=False,
        help=f"One of {', '.join(names)}; folder unless given.",
    )
    shared["to"] = shared["to"].replace(default=to)
    positional = [each for each in shared.values() if each.kind is not Parameter.KEYWORD_ONLY]
    keywords = [each for each in shared.values() if each.kind is Parameter.KEYWORD_ONLY]
    export.__signature__ = signature(_export).replace(  # type: ignore[attr-defined]
        parameters=[*positional, *_target_parameters(), *keywords]
    )
    return export


def _target_parameters() -> list[Parameter]:
    """Return a parameter for each option of each target; options of the same name are one."""
    parameters: dict[str, Parameter] = {}
    for target in targets().values():
        types = get_type_hints(target)
        for name, option in target.options().items():
            parser = options.path if Path in get_args(types[name]) else None
            is_switch = types[name] is bool
            default = typer.Option(
                False if is_switch else None, option.flag, metavar=option.metavar, help=option.help, parser=parser
            )
            kind = bool if is_switch else types[name] | None
            parameters.setdefault(name, Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind))
    return list(parameters.values())


def _target(name: str, given: Mapping[str, Any]) -> Target:
    """Return the target with the options that the user gave.

    Raises:
        UsageError: an option belongs to another target, or one that the target needs is missing.
    """
    kind = targets()[name]
    for given_name in given:
        owners = {each.name: each.options()[given_name] for each in targets().values() if given_name in each.options()}
        if name not in owners:
            flag = next(iter(owners.values())).flag
            raise UsageError(f"{flag} does not go with --to {name}.", hint=f"It goes with --to {', '.join(owners)}.")
    for field in fields(kind):  # type: ignore[arg-type]
        if field.default is MISSING and field.name not in given:
            option = kind.options()[field.name]
            raise UsageError(f"--to {name} needs {option.flag}.", hint=f"Add {option.flag} {option.metavar}")
    return kind(**given)


def _open(run: str | None, peft: str | None, runs: Path) -> RunCheckpoint:
    """Return the adapter that the command line names."""
    from fedtune.export.checkpoint import open_run
    from fedtune.runs.directory import find_adapter

    if run is not None and peft is None and re.fullmatch(r"peft_\d+", Path(run).name):
        folder = find_adapter(run, runs)
        run, peft = str(folder.parent), folder.name
    return open_run(None if run == "latest" else run, peft, runs)


@contextmanager
def _progress(*, hidden: bool) -> Iterator[Listener]:
    """Show a progress bar as soon as the listener is called."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=hidden or not stderr.is_terminal) as bar:
        task = bar.add_task("writing", total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def _show_notes(notes: tuple[str, ...], sizes: Mapping[str, int]) -> None:
    from fedtune.units import format_bytes

    for text in notes:
        note(text)
    note(f"{len(sizes)} files, {format_bytes(sum(sizes.values()))}")


def _check(path: Path, as_json: bool) -> None:
    """Print one line per finding; exit code 2 if there is one."""
    from fedtune.export.lint.check import check

    found = check(path)
    if as_json:
        print_json(found)
    else:
        print_data("".join(f"{finding.file}: {finding.text}\n" for finding in found.findings))
        count = len(found.findings)
        said = "no findings" if not count else "1 finding" if count == 1 else f"{count} findings"
        note(f"{path}: {said}; checked:")
        for line in found.checked:
            note(f"  {line}")
    if found.findings:
        raise typer.Exit(2)


export = make_command()
