"""comm_cost.txt in both forms, and the figures that READMEs give."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.budget.comm_cost import check_figure, figures_of, read_comm_cost
from fedtune.budget.ledger import Entry, comm_cost_lines
from fedtune.errors import MissingError, UsageError

PART = 109_100_720  # two clients' adapters of the medical recipe


def lines(rounds: int, part: int = PART) -> list[str]:
    return comm_cost_lines(
        Entry(number, 0, direction, "train", part, part)  # type: ignore[arg-type]
        for number in range(1, rounds + 1)
        for direction in ("down", "up")
    )


@pytest.mark.parametrize("between", ["\n", "", " ", "\r\n"])
def test_both_forms(tmp_path: Path, between: str) -> None:
    path = tmp_path / "comm_cost.txt"
    path.write_text(between.join(lines(10)))
    cost = read_comm_cost(path)
    assert cost.rounds == ((104.05, 104.05),) * 10
    assert (cost.used_mib, cost.cap_mib, cost.findings) == (2080.93, 200_000.0, ())
    assert cost.down_mib == cost.up_mib == pytest.approx(1040.5)


@given(st.lists(st.integers(1, 2**45), min_size=1, max_size=30), st.sampled_from(["\n", ""]))
def test_what_we_write_is_read(tmp_path_factory: pytest.TempPathFactory, parts: list[int], between: str) -> None:
    entries = [Entry(n // 2 + 1, 0, ("down", "up")[n % 2], "train", part, 0) for n, part in enumerate(parts)]  # type: ignore[arg-type]
    path = tmp_path_factory.mktemp("cost") / "comm_cost.txt"
    path.write_text(between.join(comm_cost_lines(entries)))
    cost = read_comm_cost(path)
    assert cost.findings == ()
    assert cost.used_mib == float(f"{sum(parts) / 2**20:.2f}")
    assert len(cost.rounds) == (len(parts) + 1) // 2
    assert (cost.rounds[-1][1] is None) == (len(parts) % 2 == 1)


def test_a_file_that_contradicts_itself(tmp_path: Path) -> None:
    path = tmp_path / "comm_cost.txt"
    one = lines(3)
    path.write_text("\n".join([*one[:2], *one[3:]]))
    (finding,) = read_comm_cost(path).findings
    assert finding == "entry 3 says 416.19 MB, and 208.09 + 104.05 is 312.14"


@pytest.mark.parametrize("text", ["", "nothing here", "Communication budget: used 1 MB"])
def test_no_line_of_the_form(tmp_path: Path, text: str) -> None:
    path = tmp_path / "comm_cost.txt"
    path.write_text(text)
    with pytest.raises(UsageError, match="holds no line"):
        read_comm_cost(path)


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "comm_cost.txt"
    one = lines(2)
    path.write_text("\n".join([one[0], one[1][:40], one[2]]))
    with pytest.raises(UsageError, match="damaged before its entry 2: 'Communication budget: used"):
        read_comm_cost(path)
    path.write_text("\n".join(one) + "\ntail")
    with pytest.raises(UsageError, match="damaged before its entry 5: 'tail'"):
        read_comm_cost(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="UTF-8"):
        read_comm_cost(path)
    with pytest.raises(MissingError, match="cannot be read"):
        read_comm_cost(tmp_path / "none.txt")


USED = 2080.9310913085938


@pytest.mark.parametrize(
    ("figure", "matches"),
    [
        ("2080.93", True),
        ("2080.93 MB", True),
        ("2,080.93 MiB", True),
        ("2080.9311 Megabytes", True),
        ("2080.9", True),
        ("2081 MB", True),
        ("2.03 GB", True),
        ("2.03 GiB", True),
        ("2080.94", False),
        ("2080.92 MB", False),
        ("2080", False),
        ("2182.01 MB", False),
        ("2.18 GB", False),
    ],
)
def test_figures(figure: str, matches: bool) -> None:
    """2,182,014,400 bytes are 2080.93 MiB and 2182.01 MB of 10**6."""
    found = check_figure(figure, USED)
    assert found.matches == matches
    assert ("powers of 1000" in found.explanation) == (figure in ("2182.01 MB", "2.18 GB"))


def test_a_rounded_total_matches_as_far_as_it_goes() -> None:
    assert check_figure("2080.9311", 2080.93, rounded=True).matches
    assert not check_figure("2080.94", 2080.93, rounded=True).matches
    assert not check_figure("2080.9311", 2080.93).matches


@pytest.mark.parametrize("figure", ["", "much", "2080.93 apples", "-5", "1e3", "nan"])
def test_what_is_no_figure(figure: str) -> None:
    with pytest.raises(UsageError, match="no communication figure"):
        check_figure(figure, USED)


def test_figures_of_a_readme(tmp_path: Path) -> None:
    """The forms that submissions use: under a heading, in a sentence, in a table; VRAM and the cap are not meant."""
    readme = tmp_path / "README.md"
    readme.write_text(
        "# Medical\n\nVRAM: 25.3 GB\n\n### Communication Budget\n\n37446.40 Megabytes of 200,000 MB\n\n"
        "## Set-up\n\n5 GB of disk\n\n"
        "| communication | 2,080.93 MB |\n"
    )
    assert figures_of(readme, 200_000.0) == ["37446.40 Megabytes", "2,080.93 MB"]
    readme.write_text("# Medical\n\nVRAM: 25.3 GB\n")
    with pytest.raises(UsageError, match="gives no communication figure"):
        figures_of(readme, 200_000.0)
