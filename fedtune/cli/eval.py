"""`fedtune eval`: score adapters on the leaderboard's benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedtune.cli import options
from fedtune.cli.console import guarded, note, print_json, resumable, stdout, warn

if TYPE_CHECKING:
    from fedtune.evaluation.results import BenchmarkResult, EvalResult


def _bench_names() -> list[str]:
    from fedtune.evaluation.tasks.registry import bench_names

    return bench_names()


@guarded
def evaluate(
    files: Annotated[
        list[Path] | None,
        typer.Argument(parser=options.path, metavar="[FILE]...", help="More generation files for --rescore."),
    ] = None,
    bench: Annotated[
        list[str] | None,
        typer.Option(
            "--bench",
            metavar="NAME",
            help="A benchmark, mmlu:stem, mmlu:anatomy, or a challenge; may be repeated.",
            autocompletion=_bench_names,
        ),
    ] = None,
    peft: Annotated[
        list[str] | None,
        typer.Option(
            "--peft",
            parser=options.path_or_name,
            metavar="ADAPTER",
            help="A path, a hub id, or an adapter of the latest run; may be repeated.",
        ),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Also score the base model without adapter.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", parser=options.path_or_name, metavar="MODEL", help="The base model; by default the adapter's."
        ),
    ] = None,
    quantization: Annotated[
        Literal["fp4", "nf4", "int8", "none"],
        typer.Option(
            "--quantization",
            show_default=False,
            help="Of the base model's weights; fp4 by default, as on the leaderboard.",
        ),
    ] = "fp4",
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", parser=options.path, metavar="DIR", help="A folder with the benchmarks' questions."),
    ] = None,
    protocol: Annotated[
        Literal["flowertune", "lm-eval"],
        typer.Option(
            "--protocol",
            show_default=False,
            help="The leaderboard's (flowertune, the default), or lm-eval's own tasks.",
        ),
    ] = "flowertune",
    mode: Annotated[
        Literal["fast", "official"],
        typer.Option(
            "--mode", show_default=False, help="fast (the default): in batches; official: one prompt at a time."
        ),
    ] = "fast",
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size", metavar="N", show_default=False, help="The protocol's batches; 16 by default.", min=1
        ),
    ] = 16,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", help="Only the first N questions; the result is marked as partial."),
    ] = None,
    verify: Annotated[
        int,
        typer.Option(
            "--verify", metavar="N", show_default=False, help="Also answer N questions one by one, and compare.", min=0
        ),
    ] = 0,
    rescore: Annotated[
        list[Path] | None,
        typer.Option(
            "--rescore",
            parser=options.path,
            metavar="FILE",
            help="Score an existing generation file, without a model; may be repeated.",
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
            help="Folder of the results; by default the run's benchmarks folder.",
        ),
    ] = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Score adapters and their base model on the leaderboard's benchmarks.

    Example: fedtune eval --bench tiny --peft peft_10 --base
    """
    from fedtune.errors import UsageError

    if rescore:
        _rescore([*rescore, *(files or [])], json)
        return
    if files:
        raise UsageError(
            f"{files[0]} does not belong to an option.",
            hint="Name adapters with --peft, and generation files with --rescore.",
        )
    if not bench:
        raise UsageError("No benchmark is named.", hint="Example: fedtune eval --bench medmcqa --peft peft_10")
    if mode == "official" and quantization != "fp4":
        raise UsageError("--mode official computes on FP4 weights in float32.", hint="Omit --quantization.")
    if protocol == "lm-eval" and (verify or mode == "official"):
        raise UsageError("--verify and --mode belong to the leaderboard's protocol.", hint="Omit --protocol.")

    import torch

    from fedtune.cli.progress import EvalDisplay
    from fedtune.evaluation.driver import evaluate as score
    from fedtune.evaluation.settings import EvalSettings
    from fedtune.evaluation.subjects import find_subjects
    from fedtune.evaluation.tasks.registry import parse_bench

    selections = tuple(selection for text in bench for selection in parse_bench(text))
    found = find_subjects(peft or [], with_base=base, model=model, quantization=quantization, runs=runs)
    settings = EvalSettings(
        model=found.model.model_copy(update={"compute_dtype": "fp32"}) if mode == "official" else found.model,
        subjects=found.subjects,
        selections=selections,
        out=out or found.folder,
        mode=mode,
        batch_size=batch_size,
        data_dir=data_dir,
        limit=limit,
        verify=verify,
        protocol=protocol,
    )
    if not torch.cuda.is_available():
        note("There is no CUDA device: the evaluation runs on the CPU, in float32.")
    display = EvalDisplay(quiet=json)
    try:
        with (
            resumable(lambda: "The answers so far are kept: when there is space, run the same command again."),
            display.shown(),
        ):
            result = score(settings, display)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("The answers so far are kept: run the same command again to continue.") from None
    if json:
        print_json({"results": [each.to_record() for each in result.results], "file": result.file})
    else:
        _show(result)


def _show(result: EvalResult) -> None:
    """Print one table per benchmark, and the remarks about its numbers."""
    from rich.table import Table

    for bench in dict.fromkeys(each.bench for each in result.results):
        rows = [each for each in result.results if each.bench == bench]
        first = rows[0]
        kind = first.mode if first.protocol == "flowertune" else "log-likelihood, not comparable with the leaderboard"
        table = Table(title=f"{bench} · {first.protocol} · {kind}", title_justify="left")
        for heading in ("subject", "accuracy", "95 % interval", "n", "unparsed", "against base", "MiB", "questions/s"):
            table.add_column(heading, justify="left" if heading == "subject" else "right")
        for row in rows:
            table.add_row(*_cells(row))
        stdout.print(table)
        if first.partial:
            warn(f"{bench}: partial: {first.partial}")
        for text in dict.fromkeys(text for row in rows for text in row.findings):
            owners = [row.subject for row in rows if text in row.findings]
            about = bench if len(owners) == len(rows) else f"{', '.join(owners)} on {bench}"
            warn(f"{about}: {text}")
        for row in rows:
            _print_remarks(row)
        if first.protocol == "flowertune":
            for path, reason in dict.fromkeys((row.answer_path, row.answer_path_reason) for row in rows):
                owners = [row.subject for row in rows if (row.answer_path, row.answer_path_reason) == (path, reason)]
                note(f"{', '.join(owners)} on {bench}: answered with {path} ({reason})")
    note(f"results {result.file}")


def _cells(row: BenchmarkResult) -> list[str]:
    score, test = row.score, row.against_base
    return [
        row.subject,
        f"{score.accuracy:.2%}" + (" (partial)" if row.partial else ""),
        f"{row.interval.low:.1%} – {row.interval.high:.1%}",
        f"{score.n:,}",
        "–" if score.unparsed_share is None else f"{score.unparsed_share:.1%}",
        "" if test is None else f"{test.difference:+.2%} (p = {test.p_value:.2g})",
        "" if row.used_mib is None else f"{row.used_mib:,.2f}",
        f"{row.questions_per_second:,.1f}",
    ]


def _print_remarks(row: BenchmarkResult) -> None:
    score = row.score
    if (score.unparsed_share or 0) > 0.05:
        outputs = ", ".join(f"{_shortened(text)!r} ({count})" for text, count in score.unparsed_outputs)
        parsed = "" if score.accuracy_parsed is None else f"; on the parsed answers it is {score.accuracy_parsed:.2%}"
        warn(
            f"{row.subject} on {row.bench}: {score.unparsed_share:.1%} of the outputs are unparsed answers, most often "
            f"{outputs}. The accuracy depends on the form of the answers as much as on the model's knowledge{parsed}."
        )
    if row.agreement is not None:
        gaps = ", ".join(f"{gap:.2g}" for gap in row.agreement.smallest_gaps)
        note(
            f"{row.subject} on {row.bench}: {row.agreement.equal} of {row.agreement.asked} answers equal one-by-one generation"
            f"{f', {row.agreement.ties} differ only by rounding' if row.agreement.ties else ''}; "
            f"smallest gaps between the two best logits: {gaps}"
        )


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"


def _rescore(files: list[Path], as_json: bool) -> None:
    """Score existing generation files."""
    from rich.table import Column, Table

    from fedtune.evaluation.artefacts import rescore
    from fedtune.evaluation.statistics import wilson

    results = [rescore(path) for path in files]
    if as_json:
        print_json(
            [
                {
                    "file": each.path,
                    "benchmark": each.benchmark,
                    "official_questions": each.verified,
                    "accuracy": each.score.accuracy,
                    "n": each.score.n,
                    "k": each.score.k,
                    "unparsed": each.score.unparsed,
                    "accuracy_parsed": each.score.accuracy_parsed,
                    "published_accuracy": each.published,
                    "agrees": each.agrees,
                }
                for each in results
            ]
        )
        return
    table = Table(
        Column("file", overflow="fold"),
        "benchmark",
        "accuracy",
        "95 % interval",
        "n",
        "unparsed",
        "on parsed",
        "published",
    )
    for each in results:
        score, interval = each.score, wilson(each.score.k, each.score.n)
        table.add_row(
            each.path.name,
            each.benchmark,
            repr(score.accuracy),
            f"{interval.low:.1%} – {interval.high:.1%}",
            f"{score.n:,}",
            "–" if score.unparsed_share is None else f"{score.unparsed_share:.1%}",
            "–" if score.accuracy_parsed is None else f"{score.accuracy_parsed:.2%}",
            "" if each.published is None else "the same" if each.agrees else f"not {each.published!r}",
        )
    stdout.print(table)
