"""fedtune: federated LoRA fine-tuning of language models.

The Python API; nothing heavy is loaded before one of these is called:

    >>> import fedtune
    >>> config = fedtune.load_config(challenge="tiny").config
    >>> result = fedtune.train(config)
    >>> fedtune.export_folder(fedtune.open_run(str(result.run)), Path("my-adapter"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.budget.plan import plan
    from fedtune.config.load import load_config
    from fedtune.config.schema import FedTuneConfig
    from fedtune.evaluation.driver import evaluate
    from fedtune.evaluation.settings import EvalSettings
    from fedtune.export.checkpoint import open_run
    from fedtune.export.publish import publish
    from fedtune.export.targets.folder import export_folder
    from fedtune.export.targets.merged import export_merged
    from fedtune.export.targets.submission import export_submission
    from fedtune.federation.train import TrainResult, train

__all__ = [
    "EvalSettings",
    "FedTuneConfig",
    "TrainResult",
    "evaluate",
    "export_folder",
    "export_merged",
    "export_submission",
    "load_config",
    "open_run",
    "plan",
    "publish",
    "train",
]

_HOMES = {
    "EvalSettings": "fedtune.evaluation.settings",
    "FedTuneConfig": "fedtune.config.schema",
    "TrainResult": "fedtune.federation.train",
    "evaluate": "fedtune.evaluation.driver",
    "export_folder": "fedtune.export.targets.folder",
    "export_merged": "fedtune.export.targets.merged",
    "export_submission": "fedtune.export.targets.submission",
    "load_config": "fedtune.config.load",
    "open_run": "fedtune.export.checkpoint",
    "plan": "fedtune.budget.plan",
    "publish": "fedtune.export.publish",
    "train": "fedtune.federation.train",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fedtune' has no attribute {name!r}")
