"""One file per algorithm, named as `strategy.name` names it, with a function `build(config, shapes)`.

A strategy whose options alone make it differ from FedAvg has no file here.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.base import Shapes

if TYPE_CHECKING:
    from fedtune.federation.strategies.base import Algorithm, ClientPart
    from fedtune.models.adapter import AdapterTensors


def build_algorithm(config: FedTuneConfig, shapes: Shapes) -> Algorithm:
    """Return the algorithm that `config` names, for an adapter of `shapes`."""
    module = _module(config)
    if module is None:
        from fedtune.federation.strategies.base import Algorithm

        return Algorithm(config, shapes)
    algorithm: Algorithm = module.build(config, shapes)
    return algorithm


def client_part(config: FedTuneConfig, received: AdapterTensors, kept: AdapterTensors) -> ClientPart | None:
    """Return what the strategy adds to training on a client, from the message's tensors and the client's state."""
    build = getattr(_module(config), "client_part", None)
    return build(received, kept) if build else None


def _module(config: FedTuneConfig) -> ModuleType | None:
    name = f"{__name__}.{config.strategy.name.replace('-', '_')}"
    return import_module(name) if find_spec(name) else None
