"""Reads the scores in a README: Markdown tables of either layout and lists, in percent or as fractions.

| benchmark | accuracy |        |         | STEM  | Humanities | Avg   |        - **MedQA**: 59.31 %
| --------- | -------- |        | ------- | ----- | ---------- | ----- |
| MedQA     | 59.31    |        | Acc (%) | 66.13 | 60.87      | 63.50 |
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from math import ceil, floor

from fedtune.config.facts import load_preset, preset_names
from fedtune.evaluation.tasks.base import Selection
from fedtune.evaluation.tasks.registry import all_tasks, parse_bench

AVERAGE = "average"

_CELL = re.compile(r"(\d{1,3}(?:[.,]\d{1,12})?|[.,]\d{1,12})\s*(%)?(?:\s*[(±+].*)?")
_SEPARATOR = re.compile(r"\|?(?:\s*:?-+:?\s*\|)*\s*:?-+:?\s*\|?")
_ITEM = re.compile(r"\s*[-*+•]\s+([^:=]{2,40})[:=]\s*(.{1,40})")
_NO_SCORE = re.compile(
    r".*\b(rows|questions|samples|correct|right|unparsed|invalid|interval|ci|delta|diff\w*|changes?|gain|improv\w*|chance|random|"
    r"std|loss)\b.*|.*[±Δ].*|#|n|k|size|count|total|time|seconds|minutes|rank|split"
)
"""Headings of numbers that are not accuracies."""
_BASE = re.compile(r"\b(base|baselines?|base model|before|zero.?shot|without|vanilla|pre.?trained|original)\b")


@dataclass(frozen=True)
class Figure:
    """One published accuracy."""

    text: str
    """The figure as written."""
    value: Fraction
    """The accuracy from 0 to 1."""
    half: Fraction
    """Half of the last digit, the largest rounding error."""

    def counts(self, n: int) -> range:
        """Return the numbers of right answers among `n` that round to this figure."""
        return range(max(0, ceil((self.value - self.half) * n)), min(n, floor((self.value + self.half) * n)) + 1)

    def is_near(self, share: Fraction, slack: Fraction = Fraction(0)) -> bool:
        """Whether `share`, known up to `slack`, may be rounded to this figure."""
        return abs(self.value - share) <= self.half + slack


@dataclass(frozen=True)
class Line:
    """The scores of one system: a row of a wide table, a column of a long one, or a list."""

    system: str
    """The heading as written."""
    scores: dict[str, Figure] = field(default_factory=dict)
    """By benchmark, `medqa` or `mmlu:stem`, those of the code challenge included."""
    average: Figure | None = None

    @property
    def is_base(self) -> bool:
        """Whether the scores are those of the model before fine-tuning, or of a baseline."""
        return _BASE.search(self.system.lower()) is not None


def published(text: str) -> list[Line]:
    """Return the scores in the text of a README; tables that name no benchmark are skipped."""
    found = [line for table in _tables(text) for line in _lines_of(table)]
    found += [line for items in _lists(text) for line in _lines_of([["", ""], *items])]
    return found


def bench_of(name: str) -> str | None:
    """Return the benchmark that a heading names, `average` for the mean, or None.

    >>> bench_of("**MMLU (Social Sciences)**"), bench_of("Avg."), bench_of("Model")
    ('mmlu:social_sciences', 'average', None)
    """
    plain = re.sub(r"[^a-z0-9+]", "", re.sub(r"\(?%\)?|accuracy|acc\b|score|pass@1", "", name.lower()))
    return _names().get(plain) or _names().get(plain.removeprefix("mmlu"))


@cache
def row_count(bench: str) -> int | None:
    """Return the number of rows of a benchmark, None if it is unknown (the code challenge)."""
    selection = selections().get(bench)
    if selection is None:
        return None
    if selection.expected is None and selection.task.shipped is not None:
        return sum(1 for line in selection.task.shipped.read_bytes().splitlines() if line.strip())
    return selection.expected


@cache
def selections() -> dict[str, Selection]:
    """Return every benchmark and ranked category by name."""
    return {selection.name: selection for name in all_tasks() for selection in parse_bench(name)}


@cache
def _names() -> dict[str, str]:
    """Return benchmarks by the names in READMEs, without spaces and punctuation."""
    ours = {re.sub(r"[^a-z0-9+]", "", name.rpartition(":")[2].lower()): name for name in selections()}
    code = {re.sub(r"[^a-z0-9+]", "", name): name for name in load_preset("challenge", "code").benchmarks}
    other = {
        "ss": "mmlu:social_sciences",
        "social": "mmlu:social_sciences",
        "socialscience": "mmlu:social_sciences",
        "multiplejs": "multipl-e-js",
        "multiplec++": "multipl-e-cpp",
    }
    return {**code, **other, **ours, **dict.fromkeys(("average", "avg", "mean"), AVERAGE)}


def challenge_of(names: Sequence[str]) -> str | None:
    """Return the challenge that all benchmarks in `names` rank; None without one, or without names."""
    fitting = [each for each in preset_names("challenge") if names and set(names) <= set(ranked(each))]
    return fitting[0] if len(fitting) == 1 else None


@cache
def ranked(challenge: str) -> tuple[str, ...]:
    """Return the benchmarks that rank a challenge."""
    return load_preset("challenge", challenge).benchmarks


def _tables(text: str) -> Iterator[list[list[str]]]:
    """Yield the tables of a Markdown text as rows of cells, the heading first."""
    lines = [*text.splitlines(), ""]
    index = 1
    while index < len(lines):
        head, rule = lines[index - 1], lines[index].strip()
        index += 1
        if "|" in head and "-" in rule and len(rule) < 1000 and _SEPARATOR.fullmatch(rule):
            end = next(number for number in range(index, len(lines)) if "|" not in lines[number])
            yield [_cells(row) for row in (head, *lines[index:end])]
            index = end + 1


def _cells(row: str) -> list[str]:
    inner = row.strip().removeprefix("|").removesuffix("|")
    return [re.sub(r"[*_`~\\]", " ", cell).strip() for cell in re.split(r"(?<!\\)\|", inner)]


def _lists(text: str) -> Iterator[list[list[str]]]:
    """Yield the lists of `name: number` as rows of two cells."""
    items: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if match := _ITEM.fullmatch(line[:200].replace("**", "").replace("`", "")):
            items.append([match[1].strip(), match[2].strip()])
        elif items:
            yield items
            items = []


def _lines_of(table: list[list[str]]) -> Iterator[Line]:
    """Yield the systems of a table: its rows if the heading names benchmarks, its columns if the first column does."""
    heading = table[0]
    wide = {index: bench for index, cell in enumerate(heading) if (bench := bench_of(cell))}
    if set(wide.values()) - {AVERAGE}:
        rows = [(row[0] if row and 0 not in wide else "", row) for row in table[1:]]
        columns = [(name, {bench: _at(row, index) for index, bench in wide.items()}) for name, row in rows]
    else:
        names = [(bench, row) for row in table[1:] if row and (bench := bench_of(row[0]))]
        width = max((len(row) for _, row in names), default=0)
        columns = [(_at(heading, index), {bench: _at(row, index) for bench, row in names}) for index in range(1, width)]
    for system, cells in columns:
        if _NO_SCORE.fullmatch(system.lower()):
            continue
        figures = _figures(cells)
        average = figures.pop(AVERAGE, None)
        if figures:
            yield Line(system, figures, average)


def _at(row: Sequence[str], index: int) -> str:
    return row[index] if index < len(row) else ""


def _figures(cells: dict[str, str]) -> dict[str, Figure]:
    """Return the cells that are accuracies: fractions if no number is above 1 or has a per cent sign, else percent."""
    matches = {bench: match for bench, cell in cells.items() if (match := _CELL.fullmatch(cell))}
    numbers = {bench: Fraction(match[1].replace(",", ".")) for bench, match in matches.items()}
    if any(number > 100 for number in numbers.values()):
        return {}  # counts of rows or milliseconds, not accuracies
    as_shares = all(number <= 1 for number in numbers.values()) and not any(match[2] for match in matches.values())
    scale = Fraction(1) if as_shares else Fraction(1, 100)
    figures = {}
    for bench, match in matches.items():
        decimals = len(re.split("[.,]", match[1])[1]) if re.search("[.,]", match[1]) else 0
        figures[bench] = Figure(match[0], numbers[bench] * scale, scale * Fraction(1, 2 * 10**decimals))
    return figures
