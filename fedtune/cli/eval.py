"""`fedtune eval`: score adapters on the leaderboard's benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli import options
from fedtune.cli.console import guarded, note, print_json, resumable, stdout, warn

if TYPE_CHECKING:
    from fedtune.evaluation.evaluate import BenchResult, EvalResult


@guarded
def evaluate(
    files: Annotated[
        list[Path] | None, typer.Argument(parser=options.path, metavar="[FILE]...", help="More files for --rescore.")
    ] = None,
    bench: Annotated[
        list[str] | None,
        typer.Option(
            "--bench", metavar="NAME", help="A benchmark, mmlu:stem, mmlu:anatomy, or a challenge; may be repeated."
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
            "--model",
            parser=options.path_or_name,
            metavar="MODEL",
            help="The base model; the adapter's own unless given.",
        ),
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option(
            "--quantization", metavar="KIND", help="fp4 (as the leaderboard, unless given), nf4, int8 or none."
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", parser=options.path, metavar="DIR", help="A folder with the benchmarks' questions."),
    ] = None,
    protocol: Annotated[
        str,
        typer.Option("--protocol", metavar="NAME", show_default=False, help="flowertune (unless given) or lm-eval."),
    ] = "flowertune",
    mode: Annotated[
        str,
        typer.Option(
            "--mode", metavar="MODE", show_default=False, help="fast (unless given), or official: one prompt at a time."
        ),
    ] = "fast",
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size", metavar="N", show_default=False, help="The protocol's batches; 16 unless given.", min=1
        ),
    ] = 16,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", help="The first N questions only; the result is marked partial."),
    ] = None,
    verify: Annotated[
        int,
        typer.Option(
            "--verify", metavar="N", show_default=False, help="Answer N questions both ways and compare.", min=0
        ),
    ] = 0,
    rescore: Annotated[
        list[Path] | None,
        typer.Option(
            "--rescore",
            parser=options.path,
            metavar="FILE",
            help="Score existing generations, without a model; may be repeated.",
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
            help="Where results go; the run's benchmarks folder unless given.",
        ),
    ] = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Score adapters, and the base they stand on, on the leaderboard's benchmarks.

    Example: fedtune eval --bench tiny --peft peft_10 --base
    """
    from fedtune.errors import UsageError

    if rescore:
        _rescore([*rescore, *(files or [])], json)
        return
    if files:
        raise UsageError(f"{files[0]} stands alone.", hint="Adapters follow --peft, generation files --rescore.")
    if not bench:
        raise UsageError("No benchmark is named.", hint="Example: fedtune eval --bench medmcqa --peft peft_10")
    for name, value, known in (
        ("--mode", mode, ("fast", "official")),
        ("--protocol", protocol, ("flowertune", "lm-eval")),
        ("--quantization", quantization or "fp4", ("fp4", "nf4", "int8", "none")),
    ):
        if value not in known:
            raise UsageError(f"{name} {value} is not one of {', '.join(known)}.")
    if mode == "official" and (quantization or "fp4") != "fp4":
        raise UsageError("--mode official computes on FP4 weights in float32.", hint="Leave --quantization out.")
    if protocol == "lm-eval" and (verify or mode == "official"):
        raise UsageError("--verify and --mode belong to the leaderboard's protocol.", hint="Leave --protocol out.")

    import torch

    from fedtune.cli.progress import EvalProgress
    from fedtune.evaluation.benchmarks.find import parse_bench
    from fedtune.evaluation.evaluate import EvalSettings
    from fedtune.evaluation.evaluate import evaluate as evaluate_flowertune
    from fedtune.evaluation.subjects import find_subjects

    selections = tuple(selection for text in bench for selection in parse_bench(text))
    found = find_subjects(peft or [], with_base=base, model=model, quantization=quantization or "fp4", runs=runs)
    config = found.model.model_copy(update={"compute_dtype": "fp32"}) if mode == "official" else found.model
    settings = EvalSettings(
        model=config,
        subjects=found.subjects,
        selections=selections,
        out=out or found.folder,
        mode=mode,  # type: ignore[arg-type]
        batch_size=batch_size,
        data_dir=data_dir,
        limit=limit,
        verify=verify,
    )
    score = evaluate_flowertune
    if protocol == "lm-eval":
        from fedtune.evaluation.harness import evaluate_with_harness

        score = evaluate_with_harness
    if not torch.cuda.is_available():
        note("There is no CUDA device: everything runs on the CPU, in float32.")
    progress = EvalProgress(quiet=json)
    try:
        with (
            resumable(lambda: "What was answered is kept: when there is space, the same command goes on."),
            progress.shown(),
        ):
            result = score(settings, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("What was answered is kept: the same command goes on.") from None
    if json:
        from fedtune.evaluation.evaluate import result_record

        print_json({"results": [result_record(each) for each in result.results], "file": result.file})
    else:
        _show(result)


def _show(result: EvalResult) -> None:
    """Print one table a benchmark, and what stands beside the numbers."""
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
            _say_more(row)
        if first.protocol == "flowertune":
            for path, reason in dict.fromkeys((row.answer_path, row.answer_path_reason) for row in rows):
                owners = [row.subject for row in rows if (row.answer_path, row.answer_path_reason) == (path, reason)]
                note(f"{', '.join(owners)} on {bench}: answered with {path} ({reason})")
    note(f"results {result.file}")


def _cells(row: BenchResult) -> list[str]:
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


def _say_more(row: BenchResult) -> None:
    score = row.score
    if (score.unparsed_share or 0) > 0.05:
        outputs = ", ".join(f"{_shortened(text)!r} ({count})" for text, count in score.unparsed_outputs)
        parsed = (
            "" if score.accuracy_parsed is None else f"; on the parsed answers alone it is {score.accuracy_parsed:.2%}"
        )
        warn(
            f"{row.subject} on {row.bench}: {score.unparsed_share:.1%} of the outputs are no answer in form, most often "
            f"{outputs}. The accuracy measures the prompt's form as much as the model{parsed}."
        )
    if row.agreement is not None:
        gaps = ", ".join(f"{gap:.2g}" for gap in row.agreement.smallest_gaps)
        note(
            f"{row.subject} on {row.bench}: {row.agreement.equal} of {row.agreement.asked} answers are the same one by one"
            f"{f', {row.agreement.ties} differ where rounding decides between two tokens' if row.agreement.ties else ''}; "
            f"smallest gaps of the two best logits: {gaps}"
        )


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"


def _rescore(files: list[Path], as_json: bool) -> None:
    """Score generation files that exist already."""
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
