"""A table that a sweep prints when its last test is done, whatever pytest captures and whichever tests failed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

Rows = list[Sequence[str]]


def printed(request: pytest.FixtureRequest, header: Sequence[str]) -> Iterator[Rows]:
    """Yield the list of the table's rows, and print it afterwards: the body of a fixture."""
    rows: Rows = []
    yield rows
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():  # type: ignore[union-attr]
        print()  # noqa: T201
        for row in [header, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())  # noqa: T201
