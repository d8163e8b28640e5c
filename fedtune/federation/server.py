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
from fedtune.runs.report import write_report

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the context's run config describes, in the run directory that it names or in a new one."""
    workspace = workspace_of(config_json_of(context))
    config = workspace.config
    name = str(context.run_config.get("run-dir", ""))
    run = RunDirectory(Path(name)) if name else create_run(RUNS, config)
    if not name:  # started by `flwr run`: train() did not prepare the directory, and will not close it
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
    if not name:
        write_report(run)
