"""The ServerApp: makes the initial adapter and runs the rounds, on whatever engine has started it."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtune.federation.rounds import Rounds
from fedtune.federation.workspace import config_json_of, workspace_of
from fedtune.models.adapter import initial_tensors
from fedtune.runs.atomic import write_json
from fedtune.runs.directory import RUNS, RunDirectory, create_run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the context's run config describes, in the run directory that it names or in a new one."""
    workspace = workspace_of(config_json_of(context))
    config = workspace.config
    if name := str(context.run_config.get("run-dir", "")):
        run = RunDirectory(Path(name))
    else:
        run = create_run(RUNS, config)
        write_json(run.config_file, config.model_dump(mode="json"))
    adapted = workspace.adapted
    Rounds(
        grid,
        config,
        run,
        initial=initial_tensors(adapted, config.seed),
        target_modules=adapted.target_modules,
        revision=workspace.base.revision,
    ).go()
