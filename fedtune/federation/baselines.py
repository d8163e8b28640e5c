"""What the federation is worth: each client alone, and all data in one place, trained for as many steps as one client does.

A lone client runs the run's own schedule, round by round, on its own rows and never shares; the pooled run does the same on
everybody's rows. Same base, same initial adapter, same learning rates, same number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedtune.config.schema import FedTuneConfig
from fedtune.data.order import steps_of_round
from fedtune.data.tokenize import TokenizedRows
from fedtune.federation.workspace import Workspace, workspace_of
from fedtune.models.adapter import initial_tensors, write_adapter
from fedtune.training.local import train_locally
from fedtune.training.schedule import learning_rate

POOLED = "pooled"


@dataclass(frozen=True)
class Baseline:
    """One adapter trained without a federation."""

    name: str
    """`client_<partition>` or `pooled`."""
    folder: Path
    """The adapter."""
    rows: int
    """Rows that it was trained on."""


def train_baselines(
    config: FedTuneConfig, run: Path, listener: Callable[[str, int], None] | None = None
) -> list[Baseline]:
    """Train every client alone and all data in one place, and write the adapters under `run/baselines`.

    Args:
        config: The run's config.
        run: The run directory.
        listener: Is told which baseline is at which round.
    """
    workspace = workspace_of(config.model_dump_json())
    parts = {f"client_{number}": workspace.rows(number) for number in range(config.federation.clients)}
    parts[POOLED] = pool([parts[f"client_{number}"] for number in range(config.federation.clients)])
    return [
        Baseline(name, _train_alone(workspace, run / "baselines" / name, rows, number, listener, name), len(rows))
        for number, (name, rows) in enumerate(parts.items())
    ]


def pool(parts: list[TokenizedRows]) -> TokenizedRows:
    """Return all clients' rows as one client's."""
    return TokenizedRows(
        input_ids=tuple(ids for part in parts for ids in part.input_ids),
        prompt_lengths=np.concatenate([part.prompt_lengths for part in parts]),
        total=sum(part.total for part in parts),
        skipped=sum(part.skipped for part in parts),
    )


def _train_alone(
    workspace: Workspace,
    folder: Path,
    rows: TokenizedRows,
    number: int,
    listener: Callable[[str, int], None] | None,
    name: str,
) -> Path:
    config, adapted = workspace.config, workspace.adapted
    adapted.load(initial_tensors(adapted, config.seed))
    for server_round in range(1, config.federation.rounds + 1):
        if listener is not None:
            listener(name, server_round)
        steps = steps_of_round(
            len(rows),
            config.training,
            seed=config.seed,
            partition=number,
            server_round=server_round,
            reshuffle=config.data.reshuffle,
        )
        train_locally(
            adapted,
            rows,
            steps,
            config.training,
            learning_rate=learning_rate(config.training, server_round, config.federation.rounds),
            seed=(config.seed, server_round, number),
            gradient_checkpointing=config.model.gradient_checkpointing,
        )
    write_adapter(
        folder,
        adapted.tensors(),
        config.adapter,
        base_name=config.model.base,
        revision=workspace.base.revision,
        target_modules=adapted.target_modules,
    )
    return folder
