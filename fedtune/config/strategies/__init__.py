"""The options of every strategy: a union told apart by `name`, one class per algorithm.

Every module here is searched for option classes, so a new strategy is a new module. Its algorithm is the module of the same
name in `fedtune/federation/strategies/`; a strategy without one is FedAvg on what its options say travels.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args

from pydantic import Field

from fedtune.config.strategies.base import StrategyOptions


def _find() -> Iterator[tuple[str, type[StrategyOptions]]]:
    for module in sorted(iter_modules(__path__), key=lambda module: module.name):
        for value in vars(import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, StrategyOptions):
                for name in get_args(value.model_fields["name"].annotation):
                    yield name, value


STRATEGIES = dict(_find())
"""The option classes by `strategy.name`, in the order in which they are documented."""

if TYPE_CHECKING:
    StrategyConfig = StrategyOptions
else:
    StrategyConfig: Any = Annotated[Union[tuple(STRATEGIES.values())], Field(discriminator="name")]  # noqa: UP007
