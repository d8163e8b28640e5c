"""The ServerApp: makes the initial adapter and runs the rounds, on whatever engine has started it."""

from __future__ import annotations

import logging
import re
from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtune.config.facts import known_architecture
from fedtune.federation.rounds import Rounds
from fedtune.federation.workspace import config_json_of, workspace_of
from fedtune.models.adapter import initial_tensors
from fedtune.models.hub import resolve_base
from fedtune.models.shapes import adapter_form, read_back
from fedtune.models.targets import check_strategy
from fedtune.runs.atomic import write_json
from fedtune.runs.directory import RUNS, RunDirectory, create_run
from fedtune.runs.log import run_log
from fedtune.runs.report import write_report

app = ServerApp()
log = logging.getLogger(__name__)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the context's run config describes, in the run directory that it names or in a new one."""
    config_json = config_json_of(context)
    name = str(context.run_config.get("run-dir", ""))
    run = RunDirectory(Path(name)) if name else create_run(RUNS, workspace_of(config_json).config)
    with run_log(run.log_file):
        if not name:  # started by `flwr run`: train() did not prepare the directory, and will not close it
            write_json(run.config_file, workspace_of(config_json).config.model_dump(mode="json"))
            run.state_folder.mkdir()
            write_json(run.flower_file, {"run_id": context.run_id})
        try:
            prepared(grid, config_json, run).run_rounds()
        except Exception:
            log.debug("The server ended with an error.", exc_info=True)
            raise
        if not name:
            write_report(run)


def prepared(grid: Grid, config_json: str, run: RunDirectory) -> Rounds:
    """Return the rounds of a run, ready to go; the base is loaded only where shapes do not suffice, or it is here anyway."""
    workspace = workspace_of(config_json)
    config = workspace.config
    if config.federation.engine == "in-process" or config.adapter.dora or config.adapter.modules_to_save:
        adapted = workspace.adapted
        check_strategy(config, adapted.targets.not_linear if adapted.targets else ())
        initial = initial_tensors(adapted, config.seed)
        resolved, revision = adapted.resolved, workspace.base.revision
    else:
        form = adapter_form(config.model, config.adapter, known_architecture(config))
        check_strategy(config, form.not_linear)
        for note in form.notes:
            log.warning("%s.", note)
        initial = initial_tensors(form.shapes, config.seed)
        resolved, revision = form.resolved, config.model.revision
        if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
            revision = resolve_base(config.model, only_config=True).revision
    return Rounds(
        grid,
        config,
        run,
        initial=initial,
        resolved=resolved,
        read_back=partial(read_back, config.model),
        revision=revision,
    )
