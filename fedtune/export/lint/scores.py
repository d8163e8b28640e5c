"""Checks published scores: whether they are possible, and whether README, accuracy files and generations agree."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from fedtune.errors import FedTuneError
from fedtune.evaluation.artefacts import rescore
from fedtune.export.lint.folder import Finding, SubmissionFolder
from fedtune.export.lint.published import AVERAGE, Figure, Line, row_count, selections

_ACCURACY = re.compile(r"Accuracy:\s*(\d{1,3}(?:\.(\d{1,40}))?(?:[eE]-\d{1,2})?)\.?\s*")
_EXACT = Fraction(1, 10**12)
"""The rounding error of a double, with a margin."""


@dataclass(frozen=True)
class Artefact:
    """The result files of one benchmark."""

    bench: str
    label: str
    """The name of the adapter in the file names: `peft_10`."""
    file: str
    """The file with the result: the generations, or the accuracy if there are no generations."""
    shares: tuple[Figure, ...]
    """The accuracies that a README may give: the rescored one, and the written one if the two disagree."""
    right: str
    """The result for people: `374 of 500 right, 74.80 %`."""


def artefacts_of(folder: SubmissionFolder) -> tuple[list[Artefact], list[Finding]]:
    """Return the rescored result files of a submission, and their faults."""
    found: list[Artefact] = []
    findings: list[Finding] = []
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for kind, pattern in (("generation", "generation_*.json*"), ("acc", "acc_*.txt")):
        for name in folder.named(pattern):
            parent, _, base_name = name.rpartition("/")
            stem = base_name.removeprefix(f"{kind}_").rpartition(".")[0]
            pairs.setdefault((parent, stem), {})[kind] = name
    for (_, stem), files in sorted(pairs.items()):
        bench, label = _bench_and_label(stem)
        if bench is None:
            continue
        artefact, wrong = _artefact(folder, bench, label, files)
        findings += wrong
        if artefact:
            found.append(artefact)
    return found, findings


def scored(artefacts: Sequence[Artefact], rounds: int | None) -> list[Artefact]:
    """Return the results of the last checkpoint, `peft_<rounds>` if it is there; without numbers, those that name no base."""
    numbers = {artefact.label: number for artefact in artefacts if (number := _round_of(artefact.label)) is not None}
    if numbers:
        last = rounds if rounds in numbers.values() else max(numbers.values())
        return [artefact for artefact in artefacts if numbers.get(artefact.label) == last]
    return [artefact for artefact in artefacts if "base" not in artefact.label.lower()]


def check_scores(
    file: str, lines: Sequence[Line], artefacts: Sequence[Artefact], rounds: int | None
) -> Iterator[Finding]:
    """Yield the faults of the scores in a README.

    Args:
        file: The name of the README.
        lines: Its scores.
        artefacts: The result files of the submission.
        rounds: The number of rounds, if it is known.
    """
    truth: dict[str, list[Artefact]] = {}
    for artefact in scored(artefacts, rounds):
        truth.setdefault(artefact.bench, []).append(artefact)
    main = _main_line(lines, truth, rounds)
    for line in lines:
        wrong = [bench for bench, figure in line.scores.items() if not _is_possible(bench, figure)]
        for bench in wrong:
            yield Finding(file, _impossible(bench, line.scores[bench]))
        if line is main:
            for bench, figure in line.scores.items():
                if bench not in wrong and bench in truth and not _agrees(figure, truth[bench]):
                    wrong.append(bench)
                    result = truth[bench][0]
                    yield Finding(file, f"gives {figure.text} for {bench}; {result.file} gives {result.right}")
        yield from _check_average(file, line, truth if line is main else {}, sound=not wrong)


def missing_scores(
    file: str, lines: Sequence[Line], artefacts: Sequence[Artefact], ranked: Sequence[str]
) -> Iterator[Finding]:
    """Yield the benchmarks of the challenge without a score, or without a result file if others have one."""
    given = {bench for line in lines if not line.is_base for bench in line.scores}
    there = {artefact.bench for artefact in artefacts}
    for bench in ranked:
        if bench not in given:
            yield Finding(file, f"gives no score for {bench}, by which the challenge is ranked")
        elif there and bench not in there and bench in selections():
            yield Finding(file, f"gives a score for {bench}, but acc_{bench.replace(':', '_')}_….txt is missing")


def _artefact(
    folder: SubmissionFolder, bench: str, label: str, files: dict[str, str]
) -> tuple[Artefact | None, list[Finding]]:
    n = row_count(bench) or 0
    written, wrong = (None, []) if "acc" not in files else _written(folder, files["acc"])
    if "generation" not in files:
        if written is None:
            return None, wrong
        if not (counts := written.counts(n)):
            return None, [Finding(files["acc"], _impossible(bench, written))]
        right = f"{counts[0]} of {n} right" if len(counts) == 1 else f"{written.text}"
        return Artefact(bench, label, files["acc"], (written,), right), wrong
    name = files["generation"]
    try:
        rescored = rescore(folder.path / name)
    except FedTuneError as error:
        reason = error.message.partition(": ")[2] or error.message
        return None, [*wrong, Finding(name, f"cannot be rescored: {reason}")]
    score = rescored.score
    if score.n != n:
        return None, [*wrong, Finding(name, f"holds {score.n} rows; {bench} has {n}")]
    if rescored.benchmark != "unknown" and bench not in rescored.benchmark.split(" or "):
        return None, [*wrong, Finding(name, f"holds the questions of {rescored.benchmark}, not of {bench}")]
    share = Fraction(score.k, score.n)
    shares = [Figure("", share, Fraction(0))]
    right = f"{score.k} of {score.n} right, {score.accuracy:.2%}"
    if written is not None and not written.is_near(share):
        wrong.append(Finding(files["acc"], f"says {written.text}; {name} gives {score.accuracy!r} ({right})"))
        shares.append(written)
    if rescored.published is not None and not rescored.agrees:
        wrong.append(Finding(name, f"claims {rescored.published!r}; its rows give {score.accuracy!r} ({right})"))
    return Artefact(bench, label, name, tuple(shares), right), wrong


def _written(folder: SubmissionFolder, name: str) -> tuple[Figure | None, list[Finding]]:
    text = folder.text(name)
    match = _ACCURACY.fullmatch(text or "")
    if match is None or Fraction(match[1]) > 1:
        return None, [Finding(name, "does not hold `Accuracy: ` with a number from 0 to 1")]
    half = max(Fraction(1, 2 * 10 ** len(match[2] or "")), _EXACT)
    return Figure(match[1], Fraction(match[1]), half), []


def _bench_and_label(stem: str) -> tuple[str | None, str]:
    """Split `mmlu_stem_peft_10` into benchmark and label; `stem_peft_10` means MMLU too."""
    prefixes = {name.replace(":", "_"): name for name in selections()}
    prefixes |= {name.partition(":")[2]: name for name in selections() if ":" in name}
    for prefix in sorted(prefixes, key=len, reverse=True):
        if stem == prefix or stem.startswith(prefix + "_"):
            return prefixes[prefix], stem.removeprefix(prefix).removeprefix("_")
    return None, ""


def _round_of(text: str) -> int | None:
    match = re.search(r"(?:peft|checkpoint)[ _-]?(\d{1,6})\b", text.replace("_", " "), re.IGNORECASE)
    return int(match[1]) if match else None


def _main_line(lines: Sequence[Line], truth: dict[str, list[Artefact]], rounds: int | None) -> Line | None:
    """Return the line for the scored adapter, not for the base or another checkpoint; of several, the best match."""
    mine = [line for line in lines if not line.is_base and _round_of(line.system) in (None, rounds)]
    fits = [
        sum(bench in truth and _agrees(figure, truth[bench]) for bench, figure in line.scores.items()) for line in mine
    ]
    return mine[fits.index(max(fits))] if mine else None


def _is_possible(bench: str, figure: Figure) -> bool:
    n = row_count(bench)
    return figure.value <= 1 and (n is None or len(figure.counts(n)) > 0)


def _agrees(figure: Figure, results: Sequence[Artefact]) -> bool:
    return any(figure.is_near(share.value, share.half) for artefact in results for share in artefact.shares)


def _impossible(bench: str, figure: Figure) -> str:
    n = row_count(bench) or 1
    below = min(int(figure.value * n), n - 1)
    near = " and ".join(f"{k} of {n} ({k / n:.2%})" for k in (below, below + 1))
    return f"{bench} {figure.text}: no number of right answers among {n} gives it; the nearest are {near}"


def _check_average(file: str, line: Line, truth: dict[str, list[Artefact]], *, sound: bool) -> Iterator[Finding]:
    """Yield a wrong average; if a score is wrong, the average is compared with the result files only."""
    if line.average is None:
        return
    figures: list[Sequence[Figure]] = [list(line.scores.values())] if sound else []
    if line.scores.keys() <= truth.keys():
        figures += [[truth[bench][0].shares[index] for bench in line.scores] for index in (0, -1)]
    means = [
        (Fraction(sum(each.value for each in some), len(some)), Fraction(sum(each.half for each in some), len(some)))
        for some in figures
    ]
    if means and not any(line.average.is_near(mean, slack) for mean, slack in means):
        mean = float(means[0][0])
        yield Finding(file, f"gives {line.average.text} as {AVERAGE} of {', '.join(line.scores)}; it is {mean:.2%}")
