"""What a committed state remembers of the run's files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import MissingError
from fedtune.federation.progress import Prefix

LINES = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(committed=LINES, later=LINES, cut=st.integers(0, 40), at=st.integers(0, 39))
def test_only_the_very_bytes_pass_or_those_without_the_last_line(
    tmp_path_factory: pytest.TempPathFactory, committed: list[str], later: list[str], cut: int, at: int
) -> None:
    path = tmp_path_factory.mktemp("prefix") / "lines"
    text = "".join(f"{line}\n" for line in committed)
    prefix = Prefix(path)
    for line in committed:  # grown in steps, as round after round
        with path.open("a") as file:
            file.write(f"{line}\n")
        prefix.grow()
    path.write_text(text + "".join(f"{line}\n" for line in later))
    again = Prefix(path)
    again.check(prefix.marks, 1)
    assert again.marks == prefix.marks
    without_last = text[: text.rstrip("\n").rfind("\n") + 1]
    shorter = text[: max(0, len(text) - 1 - cut)]
    path.write_text(shorter)
    if shorter == without_last:
        Prefix(path).check(prefix.marks, 1)
    else:
        with pytest.raises(MissingError, match=r"is shorter than|holds other lines than"):
            Prefix(path).check(prefix.marks, 1)
    position = at % len(text)
    path.write_text(text[:position] + "x" + text[position + 1 :])
    with pytest.raises(MissingError, match="holds other lines than when round 1"):
        Prefix(path).check(prefix.marks, 1)


def test_a_state_of_an_older_version_is_not_compared(tmp_path: Path) -> None:
    Prefix(tmp_path / "none").check((), 1)
