"""Sizes and rates as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.units import GB, GiB, MiB, parse_bytes, parse_rate


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512B", 512),
        ("1kB", 1000),
        ("1KB", 1000),
        ("1 KiB", 1024),
        ("5GB", 5 * GB),
        ("5 GB", 5 * GB),
        ("1.5GiB", 3 * GiB // 2),
        ("200000MiB", 200_000 * MiB),
        ("0.1MB", 100_000),  # exact, where floats would not be
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("20Mbit/s", 2.5e6),
        ("100 Mbit/s", 12.5e6),
        ("1Gbit/s", 125e6),
        ("64kbit/s", 8000.0),
        ("8bit/s", 1.0),
        ("2.5MB/s", 2.5e6),
        ("10MiB/s", 10 * 2**20),
        ("3kB/s", 3000.0),
        ("7B/s", 7.0),
    ],
)
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "GB",
        "5 gb",
        "5Mb",
        "-5GB",
        "0GB",
        "5e9B",
        "nan B",
        "inf GB",
        "5,000MB",
        "5GB/s",
        "5  GB",
        "٥GB",
        "5GB x",
    ],
)
def test_unparseable_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a number with one of|is not above zero|less than a byte"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["", "20", "20Mbit", "20MB", "20mbit/s", "20 Mb/s", "0kbit/s", "fast"])
def test_unparseable_rates(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a number with one of|is not above zero"):
        parse_rate(text)


@given(st.text(max_size=20) | st.from_regex(r"[0-9.]{1,4} ?[kMG]i?(B|bit)(/s)?", fullmatch=True))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    for parse in (parse_bytes, parse_rate):
        try:
            size = parse(text)
        except ValueError:
            continue
        assert size > 0
        assert text.strip()[0].isdecimal()


@given(st.integers(1, 10**15 - 1), st.sampled_from(["B", "kB", "MB", "GB", "KiB", "MiB", "GiB"]))
def test_whole_numbers_are_exact(number: int, unit: str) -> None:
    size = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]
    assert parse_bytes(f"{number}{unit}") == number * size
