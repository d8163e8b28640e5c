"""The progress of an evaluation, as its listener receives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class EvalProgress:
    """How many questions of one benchmark a subject has answered."""

    subject: str
    bench: str
    done: int
    total: int
    right: int
    """Right answers among those that are done."""
    seconds: float
    """Time spent on the answers of this process."""
    answered: int
    """Questions that this process answered."""


Listener = Callable[[EvalProgress], None]
