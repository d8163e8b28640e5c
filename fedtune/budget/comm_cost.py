"""The leaderboard's comm_cost.txt, ours or anyone's, and the figure that a README gives for it.

    Communication budget: used 104.05 MB (+104.05 MB this round) / 200,000 MB

One such line a direction (down, up) and round, with line breaks between them or without. "MB" is 2**20 bytes there (protocol,
section 3).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedtune.errors import MissingError, UsageError
from fedtune.units import MB, MiB

_LINE = re.compile(
    r"Communication budget: used ([0-9][0-9,]*\.[0-9]+) MB \(\+([0-9][0-9,]*\.[0-9]+) MB this round\) / ([0-9][0-9,.]*) MB"
)
_FIGURE = re.compile(r"([0-9][0-9,]*(?:\.[0-9]+)?)\s*(MB|MiB|[Mm]egabytes?|GB|GiB|[Gg]igabytes?)\b")
_ROUNDED = 0.005 + 1e-9
"""The file's figures have two decimals."""


@dataclass(frozen=True)
class CommCost:
    """A comm_cost.txt, summed up; all figures are the file's own, in MiB."""

    path: Path
    rounds: tuple[tuple[float, float | None], ...]
    """Each round's messages down and up; None for a last round that has no line up."""
    down_mib: float
    up_mib: float
    used_mib: float
    """The total that the last line gives."""
    cap_mib: float
    findings: tuple[str, ...]
    """Where the file contradicts itself."""


@dataclass(frozen=True)
class FigureCheck:
    """One published figure, held against what was used."""

    figure: str
    """As it was written."""
    matches: bool
    explanation: str


def read_comm_cost(path: Path) -> CommCost:
    """Read a comm_cost.txt.

    Raises:
        MissingError: there is no such file.
        UsageError: it holds no line of that form, or something else beside them; the place is named.
    """
    text = read_text(path)
    lines = list(_LINE.finditer(text))
    if not lines:
        raise UsageError(f"{path} holds no line of the form {_example()!r}.")
    ends = [0, *(line.end() for line in lines)]
    starts = [*(line.start() for line in lines), len(text)]
    for number, (start, end) in enumerate(zip(ends, starts, strict=True), start=1):
        if between := text[start:end].strip():
            raise UsageError(f"{path} is damaged before its entry {number}: {between[:60]!r} is no line of its form.")
    entries = [tuple(float(group.replace(",", "")) for group in line.groups()) for line in lines]
    added = [plus for _, plus, _ in entries]
    before, findings = 0.0, []
    for number, (used, plus, _) in enumerate(entries, start=1):
        if abs(before + plus - used) > 3 * _ROUNDED:
            findings.append(f"entry {number} says {used:.2f} MB, and {before:.2f} + {plus:.2f} is {before + plus:.2f}")
        before = used
    ups: list[float | None] = [*added[1::2], *([None] if len(added) % 2 else [])]
    return CommCost(
        path=path,
        rounds=tuple(zip(added[::2], ups, strict=True)),
        down_mib=sum(added[::2]),
        up_mib=sum(added[1::2]),
        used_mib=entries[-1][0],
        cap_mib=entries[-1][2],
        findings=tuple(findings),
    )


def figures_of(readme: Path, cap_mib: float) -> list[str]:
    """Return the communication figures in a README: numbers with MB or GB in a line, or under a heading, on communication.

    The cap itself is not one of them.

    Raises:
        MissingError: there is no such file.
        UsageError: there is no such figure in it.
    """
    figures = []
    for line in _lines_on_communication(read_text(readme)):
        for match in _FIGURE.finditer(line):
            if float(match[1].replace(",", "")) != cap_mib:
                figures.append(f"{match[1]} {match[2]}")
    if not figures:
        raise UsageError(
            f"{readme} gives no communication figure (a number with MB under a heading or in a line on communication).",
            hint="Give the figure itself: --figure 2080.93",
        )
    return list(dict.fromkeys(figures))


def check_figure(figure: str, used_mib: float, *, rounded: bool = False) -> FigureCheck:
    """Say whether a published figure is `used_mib`, rounded to as many decimals as the figure has.

    A figure without a unit, or in MB, is in the leaderboard's MB, which are MiB.

    Args:
        figure: A number, with or without MB, MiB, GB or GiB.
        used_mib: What was used.
        rounded: `used_mib` itself is known to two decimals only.

    Raises:
        UsageError: `figure` is no such number.
    """
    match = _FIGURE.fullmatch(figure if re.search("[A-Za-z]", figure) else f"{figure} MB")
    if match is None:
        raise UsageError(f"{figure!r} is no communication figure.", hint="Example: --figure 2080.93")
    number, unit = match[1].replace(",", ""), match[2].upper()[0]
    scale = 1 if unit == "M" else 1024
    half = max(0.5 * 10.0 ** -len(number.partition(".")[2]), _ROUNDED / scale if rounded else 0.0) + 1e-9
    why = f"{used_mib:,.2f} MiB were used"
    matches = abs(float(number) - used_mib / scale) <= half
    decimal = used_mib * MiB / MB / (1 if unit == "M" else 1000)
    if not matches and abs(float(number) - decimal) <= 2 * half:
        why += f"; it is the figure in powers of 1000, and the leaderboard's {unit}B are powers of 1024"
    return FigureCheck(figure, matches, why)


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        MissingError: there is none.
        UsageError: it is no UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no UTF-8 text.") from None
    except OSError as error:
        raise MissingError(f"{path} cannot be read: {error.strerror}.") from None


def _lines_on_communication(text: str) -> Iterator[str]:
    under = False
    for line in text.splitlines():
        about = "communication" in line.lower()
        if line.lstrip().startswith("#"):
            under = about
        if under or about:
            yield line


def _example() -> str:
    return "Communication budget: used 104.05 MB (+104.05 MB this round) / 200,000 MB"
