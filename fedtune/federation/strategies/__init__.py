"""One file per algorithm, named as `strategy.name` names it; each builds a Flower strategy from its options."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fedtune.config.schema import StrategyOptions

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy


def build_strategy(options: StrategyOptions) -> Strategy:
    """Return the Flower strategy that `options` describe.

    Sampling is not its business: it is shown a grid with this round's clients only, and takes all of them.
    """
    strategy: Strategy = import_module(f"{__name__}.{options.name}").build(options)
    return strategy
