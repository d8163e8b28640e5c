"""What the leaderboard asks for, made from a run: a Flower app that runs, the scores with their generations, the bytes.

submission/
├── pyproject.toml                  the run's values under the template's names; editing one changes what `flwr run .` does
├── fedtune_medical/                the app: fedtune's own ServerApp and ClientApp
├── benchmarks/                     acc_medqa_peft_10.txt, generation_medqa_peft_10.jsonl and so on
├── comm_cost.txt                   what was sent, in the leaderboard's form
├── peft_10/                        the last adapter, the one that counts
├── README.md  fedtune.json         everything above in words and tables; the whole config
└── manifest.json                   a sha256 for every file
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedtune.budget.ledger import comm_cost_lines
from fedtune.config.facts import LEADERBOARD_CAP_MIB, ineligible_because, load_preset, preset_names
from fedtune.errors import FedTuneError, MissingError, UsageError
from fedtune.evaluation.artefacts import artefact_paths, rescore
from fedtune.evaluation.results import Record
from fedtune.export.card import challenge_benches, selection_of, used_mib
from fedtune.export.finished import FinishedRun
from fedtune.export.folder import adapter_config
from fedtune.export.package import Exported, Package, hub_base, hub_data, package, strike
from fedtune.export.readme import readme
from fedtune.export.submission_config import portable, to_flat
from fedtune.models.adapter import CONFIG_FILE, WEIGHTS_FILE

_APP_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,31}")
"""What Flower accepts as the name of an app and of its folder."""

_SERVER_APP = '''"""The server: fedtune's, with the values of pyproject.toml."""

from fedtune.export.submission_config import with_config
from fedtune.federation.server import app as fedtune_app
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    fedtune_app(grid, with_config(context))
'''

_CLIENT_APP = '''"""A client: fedtune's, with the values of pyproject.toml."""

from fedtune.export.submission_config import with_config
from fedtune.federation import client
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def describe(message: Message, context: Context) -> Message:
    return client.describe(message, with_config(context))


@app.train()
def train(message: Message, context: Context) -> Message:
    return client.train(message, with_config(context))
'''


@dataclass(frozen=True)
class Readiness:
    """What stands between a run and the leaderboard."""

    missing: tuple[str, ...]
    """What the run lacks; a draft is one that lacks something."""
    hint: str
    """The command that makes the first of it."""
    ineligible: tuple[str, ...]
    """Why the leaderboard's rules exclude it, complete or not."""


def export_submission(finished: FinishedRun, out: Path, *, draft: bool = False) -> Exported:
    """Write a submission to the folder `out`, whole or not at all.

    Raises:
        MissingError: the run is not finished or not evaluated, and `draft` is not set; what makes it is named.
        UsageError: `out` cannot be a Flower app's folder or holds something else, the run is of no challenge, or a file of
            the run must not leave it.
    """
    if not _APP_NAME.fullmatch(out.resolve().name):
        raise UsageError(
            f"Flower takes no folder named {out.resolve().name!r} for an app.",
            hint="Choose an --out of letters, digits and hyphens, at most 32, a letter first.",
        )
    packed = submission_package(finished, draft=draft)
    packed.write(out)
    found = readiness(finished)
    notes = [f"DRAFT: {text}" for text in found.missing] + [f"not eligible: {text}" for text in found.ineligible]
    return Exported(out, packed.sizes(), tuple(notes))


def submission_package(finished: FinishedRun, *, draft: bool = False) -> Package:
    """Return a submission's files.

    Raises:
        MissingError, UsageError: as `export_submission`.
    """
    found = readiness(finished)
    if found.missing and not draft:
        raise MissingError(f"The submission is not complete: {'; '.join(found.missing)}.", hint=found.hint)
    name = f"fedtune-{finished.config.challenge}"
    module = name.replace("-", "_")
    config = portable(finished.config)
    results = official_results(finished)
    return package(
        {
            "README.md": strike(readme(finished, results, found.missing, found.ineligible)),
            "pyproject.toml": pyproject(config, name, finished.run.read_about()),
            f"{module}/__init__.py": '"""A federated fine-tuning, as fedtune ran it."""\n',
            f"{module}/server_app.py": _SERVER_APP,
            f"{module}/client_app.py": _CLIENT_APP,
            "fedtune.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
            "comm_cost.txt": "".join(f"{line}\n" for line in comm_cost_lines(finished.entries)),
            f"{finished.name}/{CONFIG_FILE}": json.dumps(adapter_config(finished), indent=2) + "\n",
            f"{finished.name}/{WEIGHTS_FILE}": finished.adapter / WEIGHTS_FILE,
            **_artefacts(finished, results),
        }
    )


def readiness(finished: FinishedRun) -> Readiness:
    """Return what stands between this adapter and the leaderboard.

    Raises:
        UsageError: the run is of no challenge.
    """
    config = finished.config
    if config.challenge is None:
        raise UsageError(
            f"The run {finished.run.path} is of no challenge, and a submission is to one.",
            hint=f"Train with --challenge {', '.join(preset_names('challenge'))}; or export a folder: --to folder",
        )
    missing, hint = [], ""
    if not finished.is_finished:
        missing.append(f"{finished.rounds_done} of {config.federation.rounds} rounds are done")
        hint = f"Go on with it: fedtune train --resume {finished.run.path}"
    elif not finished.is_last:
        missing.append(f"{finished.name} is not the last checkpoint, the one that counts")
        hint = f"Leave --peft out, or name peft_{config.federation.rounds}; --draft writes it as it is."
    there = official_results(finished)
    if benches := [bench for bench in challenge_benches(finished) if bench not in there]:
        missing.append(f"{finished.name} has no result of --mode official on all of {', '.join(benches)}")
        if config.challenge == "code":
            hint = hint or "fedtune runs no generated code: export with --draft, and add the scores of other tools."
        else:
            hint = (
                hint
                or f"fedtune eval --bench {','.join(benches)} --mode official --peft {finished.adapter} --base; or --draft"
            )
    return Readiness(tuple(missing), hint, tuple(_ineligible(finished)))


def official_results(finished: FinishedRun) -> dict[str, Record]:
    """Return this adapter's complete results in the leaderboard's own arithmetic, by benchmark, in the challenge's order."""
    results = {r["bench"]: r for r in finished.complete_results if r["mode"] == "official"}
    return {bench: results[bench] for bench in challenge_benches(finished) if bench in results}


def pyproject(config: Mapping[str, Any], name: str, about: Mapping[str, Any]) -> str:
    """Return the app's pyproject.toml.

    Args:
        config: The run's config as it may leave.
        name: The project's name.
        about: The run's `run.json`: versions and device.
    """
    module = name.replace("-", "_")
    flat = to_flat(config)
    fixed = {key.removeprefix("static."): value for key, value in flat.items() if key.startswith("static.")}
    free = {key: value for key, value in flat.items() if not key.startswith("static.")}
    version = (about.get("versions") or {}).get("fedtune", "")
    wanted = f"fedtune[ray]=={version}" if re.fullmatch(r"[\w.+!-]{1,40}", str(version)) else "fedtune[ray]"
    gpus = 0.0 if about.get("device", "cpu") == "cpu" else 1.0
    return f"""# A federated fine-tuning as fedtune ran it. Every value below takes effect in `flwr run .`.

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.0.0"
description = "Federated LoRA fine-tuning: a run of fedtune on the challenge {config["challenge"]}"
dependencies = ["{wanted}"]

[tool.hatch.build.targets.wheel]
packages = ["{module}"]

[tool.flwr.app]
publisher = "anonymous"  # your Flower account
fab-include = ["{module}/*.py"]  # the app is small: scores and adapter stay out of its bundle

[tool.flwr.app.components]
serverapp = "{module}.server_app:app"
clientapp = "{module}.client_app:app"

# The leaderboard template's names; what the template has no name for stands under fedtune's own.
[tool.flwr.app.config]
{_toml(free)}
# Fixed by the leaderboard's rules.
[tool.flwr.app.config.static]
{_toml(fixed)}
# The federation's size, as the template has it; the first `flwr run` moves these lines to Flower's own configuration.
[tool.flwr.federations]
default = "local-simulation"

[tool.flwr.federations.local-simulation]
options.num-supernodes = {fixed["num-supernodes"]}
options.backend.client-resources.num-cpus = 2
options.backend.client-resources.num-gpus = {gpus}
"""


def _toml(flat: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {tomli_w.dumps({'v': value}).removeprefix('v = ')}" for key, value in flat.items())


def _ineligible(finished: FinishedRun) -> list[str]:
    """Return why the leaderboard's rules exclude a run, and why others could not repeat it."""
    config = finished.config
    challenge = load_preset("challenge", config.challenge or "")
    if not challenge.leaderboard:
        return [f"{challenge.name} is no challenge of the leaderboard"]
    reasons = list(ineligible_because(config) or ())
    if used_mib(finished) > LEADERBOARD_CAP_MIB:
        reasons.append(f"{used_mib(finished):,.2f} MB were sent; the rules allow {LEADERBOARD_CAP_MIB:,}")
    if hub_base(config) is None:
        reasons.append("the base model is not on the hub, so nobody else can repeat the run")
    elif hub_data(config) is None:
        reasons.append("the data set is not on the hub, so nobody else can repeat the run")
    return reasons


def _artefacts(finished: FinishedRun, results: Mapping[str, Record]) -> dict[str, Path]:
    """Return accuracy and generation files of `results` under the adapter's name.

    Raises:
        MissingError: a file is not there.
        UsageError: the generations do not give the accuracy that results.json has.
    """
    files: dict[str, Path] = {}
    folder = finished.run.path / "benchmarks"
    for record in results.values():
        selection = selection_of(record)
        ours = artefact_paths(folder, selection, str(record.get("label") or record["subject"]))
        theirs = artefact_paths(Path("benchmarks"), selection, finished.name)
        again = f"Score again: fedtune eval --bench {selection.name} --mode official --peft {finished.adapter}"
        try:
            scored = rescore(ours.generations).score
        except FedTuneError as error:
            error.hint = again
            raise
        if (scored.k, scored.n) != (record["k"], record["n"]) or not ours.accuracy.is_file():
            raise UsageError(
                f"{ours.generations} and {ours.accuracy.name} are not what results.json tells: {scored.k} of {scored.n} "
                f"are right, not {record['k']} of {record['n']}.",
                hint=again,
            )
        files |= {theirs.accuracy.as_posix(): ours.accuracy, theirs.generations.as_posix(): ours.generations}
    return files
