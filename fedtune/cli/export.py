"""`fedtune export`: from a run to something that others can use."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli import options
from fedtune.cli.console import guarded, note, print_data, print_json, stderr

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fedtune.export.finished import FinishedRun
    from fedtune.export.package import Exported

_TARGETS = ("folder", "merged", "submission", "hf-hub")
_BELONGS = {
    "--tokenizer": ("folder", "hf-hub"),
    "--license": ("folder", "merged", "hf-hub"),
    "--out": ("folder", "merged", "submission"),
    "--repo": ("hf-hub",),
    "--public": ("hf-hub",),
    "--revision": ("hf-hub",),
    "--message": ("hf-hub",),
    "--draft": ("submission",),
}
"""The targets that an option says something about."""


@guarded
def export(
    run: Annotated[
        str | None,
        typer.Argument(
            parser=options.path_or_name,
            metavar="[RUN]",
            help="A run (a path, a name, or latest) or one of its adapters; the latest run unless given.",
        ),
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="TARGET", show_default=False, help="folder (unless given), merged, submission or hf-hub."
        ),
    ] = "folder",
    peft: Annotated[
        str | None,
        typer.Option(
            "--peft",
            parser=options.path_or_name,
            metavar="NAME",
            help="The run's adapter, peft_10; the last unless given.",
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
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=options.path,
            metavar="DIR",
            help="The folder to write; one in exports, named after the run, unless given.",
        ),
    ] = None,
    tokenizer: Annotated[bool, typer.Option("--tokenizer", help="Add the base's tokenizer files.")] = False,
    licence: Annotated[
        str | None, typer.Option("--license", metavar="NAME", help="The licence in the card, such as apache-2.0.")
    ] = None,
    repo: Annotated[
        str | None, typer.Option("--repo", metavar="USER/NAME", help="The repository on the hub, for --to hf-hub.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public; private unless given.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="The repository's branch; main unless given.")
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", metavar="TEXT", help="The commit's message on the hub.")
    ] = None,
    draft: Annotated[
        bool, typer.Option("--draft", help="Write a submission that is not complete, marked as a draft.")
    ] = False,
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
            help="Check a submission, fedtune's or anyone's, instead of making one.",
        ),
    ] = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Make a folder, a merged model, a leaderboard submission or a hub repository of a run's adapter.

    Example: fedtune export latest --to folder --license apache-2.0
    """
    from fedtune.errors import UsageError

    given = {
        "--tokenizer": tokenizer,
        "--license": licence is not None,
        "--out": out is not None,
        "--repo": repo is not None,
        "--public": public,
        "--revision": revision is not None,
        "--message": message is not None,
        "--draft": draft,
    }
    if check is not None:
        if run is not None or peft is not None or dry_run or any(given.values()) or to != "folder":
            raise UsageError("--check reads a submission that is there.", hint=f"Alone: fedtune export --check {check}")
        _check(check, json)
        return
    if to not in _TARGETS:
        raise UsageError(f"--to {to} is not one of {', '.join(_TARGETS)}.")
    if stray := [flag for flag, there in given.items() if there and to not in _BELONGS[flag]]:
        raise UsageError(
            f"{stray[0]} does not go with --to {to}.", hint=f"It goes with {', '.join(_BELONGS[stray[0]])}."
        )
    if to == "hf-hub" and repo is None:
        raise UsageError("--to hf-hub needs to know which repository.", hint="Name it: --repo USER/NAME")

    finished = _open(run, peft, runs)
    if to == "hf-hub":
        _publish(finished, str(repo), public, revision, message, licence, tokenizer, dry_run, json)
    elif dry_run:
        _show_plan(finished, to, *_planned(finished, to, licence, tokenizer, draft), (), json)
    else:
        exported = _write(finished, to, out or _default_out(finished, to), licence, tokenizer, draft, quiet=json)
        if json:
            print_json(
                {**_subject(finished, to), "folder": exported.folder, "files": exported.sizes, "notes": exported.notes}
            )
        else:
            _say(exported.notes, exported.sizes)
            print_data(f"{exported.folder}\n")


def _open(run: str | None, peft: str | None, runs: Path) -> FinishedRun:
    """Return the adapter that the command line means."""
    from fedtune.export.finished import open_run
    from fedtune.runs.directory import find_adapter

    if run is not None and peft is None and re.fullmatch(r"peft_\d+", Path(run).name):
        folder = find_adapter(run, runs)
        run, peft = str(folder.parent), folder.name
    return open_run(None if run == "latest" else run, peft, runs)


def _default_out(finished: FinishedRun, to: str) -> Path:
    name = finished.run.path.resolve().name
    if to != "submission":
        return Path("exports") / f"{name}-{finished.name}{'-merged' if to == 'merged' else ''}"
    # Flower takes 32 letters, digits and hyphens as an app's folder, a letter first.
    plain, end = re.sub("[^A-Za-z0-9]+", "-", name).strip("-"), f"-r{finished.round}"
    plain = plain if plain[:1].isalpha() else f"run-{plain}"
    return Path("exports") / (plain[: 32 - len(end)].rstrip("-") + end)


def _write(
    finished: FinishedRun, to: str, out: Path, licence: str | None, tokenizer: bool, draft: bool, *, quiet: bool
) -> Exported:
    if to == "folder":
        from fedtune.export.folder import export_folder

        return export_folder(finished, out, licence=licence, tokenizer=tokenizer)
    if to == "submission":
        from fedtune.export.submission import export_submission

        return export_submission(finished, out, draft=draft)
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from fedtune.export.merged import export_merged

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=quiet or not stderr.is_terminal) as bar:
        task = bar.add_task("merging", total=None)
        return export_merged(
            finished,
            out,
            licence=licence,
            listener=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _planned(
    finished: FinishedRun, to: str, licence: str | None, tokenizer: bool, draft: bool
) -> tuple[Mapping[str, int], str]:
    """Return the files that would be written, with their bytes, and the card among them."""
    if to == "merged":
        from fedtune.export.card import card
        from fedtune.export.merged import merged_sizes

        return merged_sizes(finished, licence=licence), card(finished, licence=licence, merged=True)
    if to == "submission":
        from fedtune.export.submission import submission_package

        package = submission_package(finished, draft=draft)
    else:
        from fedtune.export.folder import folder_package

        package = folder_package(finished, licence=licence, tokenizer=tokenizer)
    return package.sizes(), package.text("README.md")


def _publish(
    finished: FinishedRun,
    repo: str,
    public: bool,
    revision: str | None,
    message: str | None,
    licence: str | None,
    tokenizer: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    from fedtune.export.folder import folder_package, notes
    from fedtune.export.hub import publish

    package = folder_package(finished, licence=licence, tokenizer=tokenizer)
    done = publish(finished, package, repo, public=public, revision=revision, message=message, dry_run=dry_run)
    said = (*done.notes, *notes(finished))
    if dry_run:
        _show_plan(finished, "hf-hub", done.sizes, package.text("README.md"), said, as_json)
    elif as_json:
        print_json({**_subject(finished, "hf-hub"), **asdict(done), "notes": said})
    else:
        _say(said, done.sizes)
        note("all was there already" if done.unchanged else f"commit {done.commit}")
        print_data(f"{done.url}\n")


def _show_plan(
    finished: FinishedRun, to: str, sizes: Mapping[str, int], card: str, notes: tuple[str, ...], as_json: bool
) -> None:
    """Show what would be written or sent."""
    if as_json:
        print_json({**_subject(finished, to), "dry_run": True, "files": sizes, "card": card, "notes": notes})
        return
    _say(notes, sizes)
    width = max(map(len, sizes))
    print_data("".join(f"{name:<{width}}  {size:>15,} bytes\n" for name, size in sizes.items()))
    print_data(f"\n{card}")


def _subject(finished: FinishedRun, to: str) -> dict[str, object]:
    return {"to": to, "run": finished.run.path, "adapter": finished.name}


def _say(notes: tuple[str, ...], sizes: Mapping[str, int]) -> None:
    from fedtune.units import format_bytes

    for text in notes:
        note(text)
    note(f"{len(sizes)} files, {format_bytes(sum(sizes.values()))}")


def _check(path: Path, as_json: bool) -> None:
    """Print one line per finding; exit code 2 with any."""
    from fedtune.export.check import check

    found = check(path)
    if as_json:
        print_json(found)
    else:
        print_data("".join(f"{finding.file}: {finding.text}\n" for finding in found.findings))
        count = len(found.findings)
        said = "no findings" if not count else "1 finding" if count == 1 else f"{count} findings"
        note(f"{path}: {said}; there was to check:")
        for line in found.checked:
            note(f"  {line}")
    if found.findings:
        raise typer.Exit(2)
