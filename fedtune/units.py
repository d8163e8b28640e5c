"""Bytes and their names: conversion between units happens here and nowhere else.

The leaderboard prints mebibytes and calls them "MB"; fedtune calls them MiB.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction

MB = 10**6
MiB = 2**20
GB = 10**9
GiB = 2**30


def to_mib(count_bytes: int) -> float:
    """Return `count_bytes` in mebibytes (2**20 bytes), the leaderboard's "MB" (protocol, section 3)."""
    return count_bytes / MiB


def format_bytes(count_bytes: float) -> str:
    """Return `count_bytes` for people: "512 B", "4.0 KiB", "104.05 MiB", "1.95 GiB"."""
    if count_bytes < 1024:
        return f"{count_bytes:.0f} B"
    if count_bytes < MiB:
        return f"{count_bytes / 1024:.1f} KiB"
    if count_bytes < 10 * GiB:
        return f"{count_bytes / MiB:,.2f} MiB"
    return f"{count_bytes / GiB:,.2f} GiB"


def format_seconds(seconds: float) -> str:
    """Return `seconds` for people: "8 s", "3 min 20 s", "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


_SIZE_UNITS = {
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate(("k", "M", "G", "T"), start=1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate(("K", "M", "G", "T"), start=1)},
    "KB": 1000,
}
_RATE_UNITS = {
    **{f"{letter}bit/s": Fraction(1000**power, 8) for power, letter in enumerate(("", "k", "M", "G"))},
    **{f"{name}/s": Fraction(size) for name, size in _SIZE_UNITS.items()},
}


def parse_bytes(text: str) -> int:
    """Return the number of bytes that `text` names: "5GB", "200000 MiB", "1.5GiB", "512B".

    kB, MB, GB and TB are powers of 1000; KiB, MiB, GiB and TiB are powers of 1024. A part of a byte is dropped.

    Raises:
        ValueError: no positive number with one of these units; the text says what is accepted.
    """
    size = int(_quantity(text, {name: Fraction(size) for name, size in _SIZE_UNITS.items()}, "5GB or 200000MiB"))
    if size == 0:
        raise ValueError(f"{text!r} is less than a byte")
    return size


def parse_rate(text: str) -> float:
    """Return the bytes per second that `text` names: "20Mbit/s", "1 Gbit/s", "2.5MB/s", "10MiB/s".

    Raises:
        ValueError: no positive number with one of these units; the text says what is accepted.
    """
    return float(_quantity(text, _RATE_UNITS, "20Mbit/s or 2.5MB/s"))


def _quantity(text: str, units: Mapping[str, Fraction], example: str) -> Fraction:
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([A-Za-z/]+)", text.strip())
    if match is None or match[2] not in units:
        raise ValueError(f"{text!r} is not a number with one of {', '.join(units)}, such as {example}")
    value = Fraction(match[1]) * units[match[2]]
    if value <= 0:
        raise ValueError(f"{text!r} is not above zero")
    return value
