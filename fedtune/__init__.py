"""fedtune: federated LoRA fine-tuning of language models.

The Python API; nothing heavy is loaded before one of these is called:

    >>> import fedtune
    >>> config = fedtune.load_config(challenge="tiny").config
    >>> result = fedtune.train(config)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.budget.plan import plan
    from fedtune.config.load import load_config
    from fedtune.config.schema import FedTuneConfig
    from fedtune.federation.train import TrainResult, train

__all__ = ["FedTuneConfig", "TrainResult", "load_config", "plan", "train"]

_HOMES = {
    "FedTuneConfig": "fedtune.config.schema",
    "TrainResult": "fedtune.federation.train",
    "load_config": "fedtune.config.load",
    "plan": "fedtune.budget.plan",
    "train": "fedtune.federation.train",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fedtune' has no attribute {name!r}")
