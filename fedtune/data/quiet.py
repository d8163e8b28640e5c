"""Keeps third-party progress bars, log lines and warnings off the user's terminal."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import huggingface_hub


@contextmanager
def quiet() -> Iterator[None]:
    """Run a block in which `datasets` and the hub client show no warnings or log lines; errors still raise.

    Bars of `datasets` are off too; the hub client's stay, since a download may take minutes.
    """
    bars_disabled = datasets.are_progress_bars_disabled()
    libraries = (datasets.logging, huggingface_hub.logging)
    verbosities = [library.get_verbosity() for library in libraries]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datasets.disable_progress_bars()
        for library in libraries:
            library.set_verbosity_error()
        try:
            yield
        finally:
            for library, verbosity in zip(libraries, verbosities, strict=True):
                library.set_verbosity(verbosity)
            if not bars_disabled:
                datasets.enable_progress_bars()
