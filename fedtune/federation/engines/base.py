"""The interface of an engine, and how an engine is found by its name.

An engine decides where clients run and how messages reach them; the ServerApp and the ClientApp are the same on all of them.
A new engine is one file in this folder: `name_of_it.py` with a subclass of `Engine`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import ClassVar

from fedtune.config.schema import FedTuneConfig
from fedtune.runs.directory import RunDirectory

_ENGINES: dict[str, type[Engine]] = {}


class Engine(ABC):
    """Runs federations. One object serves one call of `train`."""

    is_local: ClassVar[bool] = True
    """Whether this process can read the clients' data and base model; otherwise they are on data owners' nodes."""
    joins_arrays: ClassVar[bool] = False
    """Whether all arrays of a message travel as one. The message sizes in `config` and `budget` follow the same rule."""

    def __init_subclass__(cls, *, name: str) -> None:
        """Register the engine under the name that `federation.engine` gives."""
        _ENGINES[name] = cls

    def check(self, config: FedTuneConfig) -> None:  # noqa: B027  # nothing to check is a valid answer
        """Refuse a config that this engine cannot run, before the base model is loaded.

        Raises:
            UsageError: the config contradicts itself, or what the engine finds.
            MissingError: something that the engine needs is not installed or does not answer.
        """

    def prepare(self, config: FedTuneConfig) -> AbstractContextManager[None]:  # noqa: ARG002
        """Start what takes a while, such as other processes, and end it after the block, however the block ends."""
        return nullcontext()

    def rounds_done(self, run: RunDirectory) -> int:
        """Return the last committed round of a run."""
        state = run.last_state()
        return int(state.name.removeprefix("round-")) if state else 0

    @abstractmethod
    def run(self, config: FedTuneConfig, run: RunDirectory) -> None:
        """Run the remaining rounds inside the block of `prepare`; raise what the ServerApp raises.

        Raises:
            FederationError: too few usable replies in a round, or the engine failed.
            CapError: the communication cap would be passed.
        """


def engine_named(name: str) -> Engine:
    """Return a new engine for a value of `federation.engine`."""
    import_module(f"{__package__}.{name.replace('-', '_')}")
    return _ENGINES[name]()


def without_data_set(config: FedTuneConfig) -> FedTuneConfig:
    """Return the config without its data set: data owners do not train on one that a challenge names."""
    return config.model_copy(update={"data": config.data.model_copy(update={"source": None, "revision": None})})
