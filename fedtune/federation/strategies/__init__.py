"""One file per algorithm, named as `strategy.name` names it; each has a `build(config, shapes)`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fedtune.budget.count import Shapes
from fedtune.config.schema import FedTuneConfig

if TYPE_CHECKING:
    from fedtune.federation.strategies.base import Algorithm


def build_algorithm(config: FedTuneConfig, shapes: Shapes) -> Algorithm:
    """Return the algorithm that `config` names, for an adapter of `shapes`."""
    module = import_module(f"{__name__}.{config.strategy.name.replace('-', '_')}")
    algorithm: Algorithm = module.build(config, shapes)
    return algorithm
