"""What the federation is worth: each client alone, and all data in one place, trained for as many steps as one client does.

A lone client runs the run's own schedule, round by round, on its own rows and never shares. The pooled run does the same on
everybody's rows, each step as large as those of a round's clients together, so that it sees as many rows as the federation. Same
base, same initial adapter, same learning rates, same number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fedtune.config.schema import FedTuneConfig, TrainingConfig
from fedtune.data.order import steps_of_round
from fedtune.data.tokenize import TokenizedRows
from fedtune.federation.workspace import Workspace, workspace_of
from fedtune.models.adapter import initial_tensors, write_adapter
from fedtune.models.shapes import read_back
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
    baselines = []
    for number, (name, rows) in enumerate(parts.items()):
        share = config.federation.clients_per_round if name == POOLED else 1
        training = config.training.model_copy(update={"batch_size": config.training.batch_size * share})
        folder = run / "baselines" / name
        _train_alone(workspace, folder, rows, training, number, partial(listener, name) if listener else None)
        baselines.append(Baseline(name, folder, len(rows)))
    return baselines


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
    training: TrainingConfig,
    number: int,
    listener: Callable[[int], None] | None,
) -> None:
    """Run a whole run's rounds on `rows`, and write the adapter; `number` sets the order of rows apart from others'."""
    config, adapted = workspace.config, workspace.adapted
    adapted.load(initial_tensors(adapted, config.seed))
    for server_round in range(1, config.federation.rounds + 1):
        if listener is not None:
            listener(server_round)
        steps = steps_of_round(
            len(rows),
            training,
            seed=config.seed,
            partition=number,
            server_round=server_round,
            reshuffle=config.data.reshuffle,
        )
        train_locally(
            adapted,
            rows,
            steps,
            training,
            learning_rate=learning_rate(training, server_round, config.federation.rounds),
            seed=(config.seed, server_round, number),
            gradient_checkpointing=config.model.gradient_checkpointing,
        )
    write_adapter(
        folder,
        adapted.tensors(),
        config.adapter,
        base_name=config.model.base,
        revision=workspace.base.revision,
        resolved=adapted.resolved,
        read_back=partial(read_back, config.model) if number == 0 else None,
    )
