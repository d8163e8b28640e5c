"""Bytes and their names: conversion between units happens here and nowhere else.

The leaderboard prints mebibytes and calls them "MB"; fedtune calls them MiB.
"""

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
