"""What fits under a cap: the largest rank, number of rounds or of clients, and a table of ranks, targets and wire dtypes."""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fedtune.budget.plan import Plan, plan, shapes_of
from fedtune.config.schema import CommunicationConfig, FedTuneConfig
from fedtune.config.strategies.base import Shapes
from fedtune.errors import CapError, FedTuneError
from fedtune.units import to_mib

What = Literal["rank", "rounds", "clients"]
Targets = Literal["default", "all-linear"] | tuple[str, ...]

PATHS: dict[What, str] = {"rank": "adapter.rank", "rounds": "federation.rounds", "clients": "federation.clients"}
"""The config key that each of them is."""

RANKS = (4, 8, 16, 32, 64)
TARGETS: tuple[Targets, ...] = (
    ("q_proj", "v_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    "default",
    "all-linear",
)
WIRE_DTYPES: tuple[str, ...] = typing.get_args(CommunicationConfig.model_fields["wire_dtype"].annotation)


@dataclass(frozen=True)
class Fit:
    """The largest value under a cap."""

    what: What
    value: int
    config: FedTuneConfig
    """The config with that value."""
    plan: Plan
    next_bytes: int
    """What the next larger value would send; over the cap."""


@dataclass(frozen=True)
class GridRow:
    """One rank and choice of targets."""

    rank: int
    targets: str
    total_bytes: dict[str, int] | None
    """The run's messages both ways by wire dtype; None where the shapes cannot be known."""
    unknown_because: str = ""


def with_value(config: FedTuneConfig, what: What, value: int) -> FedTuneConfig:
    """Return `config` with another rank, number of rounds or number of clients."""
    section, key = PATHS[what].split(".")
    return config.model_copy(update={section: getattr(config, section).model_copy(update={key: value})})


def fit(config: FedTuneConfig, what: What, cap_mib: float) -> Fit:
    """Return the largest rank, number of rounds, or number of clients whose run stays under `cap_mib`.

    More clients mean more of them in a round, at the config's fraction. More of anything never sends less, so that the
    search is exact.

    Raises:
        CapError: not even the smallest value stays under the cap.
        MissingError, ConfigError: as `plan` does.
    """
    shapes = None if what == "rank" else shapes_of(config)
    known: dict[int, Plan] = {}

    def bytes_of(value: int) -> int:
        if value not in known:
            known[value] = plan(with_value(config, what, value), shapes)
        return known[value].total_bytes

    value = largest(bytes_of, int(cap_mib * 2**20))
    needed = max(config.federation.required_replies, config.strategy.replies_needed)
    if value == 0 or known[value].clients_per_round < needed:
        of_smallest = to_mib(bytes_of(max(1, value)))
        why = f"{needed} clients a round (federation.min_success, strategy.name)" if value else f"{PATHS[what]} = 1"
        raise CapError(
            f"Not even {why} stays under {cap_mib:,.2f} MiB: {PATHS[what]} = {max(1, value)} sends {of_smallest:,.2f} MiB.",
            hint="Choose another of --fit rank, rounds, clients, or a narrower communication.wire_dtype.",
        )
    return Fit(what, value, with_value(config, what, value), known[value], bytes_of(value + 1))


def largest(bytes_of: Callable[[int], int], cap_bytes: int) -> int:
    """Return the largest value from 1 whose bytes do not pass the cap, 0 when none is.

    `bytes_of` never falls as its argument grows. It is close to linear, so the search starts at a linear guess and asks it
    about four times; it doubles its steps from there and bisects where the guess is wrong.
    """
    if bytes_of(1) > cap_bytes:
        return 0
    guess = 1 + (cap_bytes - bytes_of(1)) // max(1, bytes_of(2) - bytes_of(1))
    low, high, step = 1, guess + 1, 1
    if bytes_of(guess) <= cap_bytes:
        low = guess
        while bytes_of(high) <= cap_bytes:
            low, step = high, 2 * step
            high += step
    else:
        high = guess
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bytes_of(middle) <= cap_bytes else (low, middle)
    return low


def grid(config: FedTuneConfig) -> list[GridRow]:
    """Return what the run would send for a range of ranks, targets and wire dtypes, the config's own among them.

    Targets that come to the same modules are one row; where shapes cannot be known the row says why.
    """
    targets_by_name = {targets_name(targets): targets for targets in (config.adapter.targets, *TARGETS)}
    rows: list[GridRow] = []
    seen: list[Shapes] = []
    for name, targets in targets_by_name.items():
        unknown = ""
        for rank in sorted({*RANKS, config.adapter.rank}):
            adapter = config.adapter.model_copy(update={"rank": rank, "targets": targets})
            changed = config.model_copy(update={"adapter": adapter})
            try:
                shapes = None if unknown else shapes_of(changed)
            except FedTuneError as error:
                unknown, shapes = error.message, None
            if shapes is None:
                rows.append(GridRow(rank, name, None, unknown))
                continue
            if shapes in seen:
                break
            seen.append(shapes)
            totals = {dtype: plan(_with_dtype(changed, dtype), shapes).total_bytes for dtype in WIRE_DTYPES}
            rows.append(GridRow(rank, name, totals))
    return rows


def targets_name(targets: Targets) -> str:
    """Return targets as one word: "q_proj,v_proj"."""
    return targets if isinstance(targets, str) else ",".join(targets)


def _with_dtype(config: FedTuneConfig, dtype: str) -> FedTuneConfig:
    return config.model_copy(update={"communication": config.communication.model_copy(update={"wire_dtype": dtype})})
