"""`fedtune export --to submission`: a Flower app that repeats the run, with its scores, generations and bytes.

submission/
├── pyproject.toml                  the run's values under the template's names; editing one changes what `flwr run .` does
├── fedtune_medical/                the app: fedtune's own ServerApp and ClientApp
├── benchmarks/                     acc_medqa_peft_10.txt, generation_medqa_peft_10.jsonl and so on
├── comm_cost.txt                   the bytes sent, in the leaderboard's form
├── peft_10/                        the adapter of the last round, which the leaderboard scores
├── README.md  fedtune.json         all of the above in words and tables; the whole config
└── manifest.json                   a sha256 for every file
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fedtune.errors import MissingError, UsageError
from fedtune.export.target import Exported, Listener, Option, Out, Plan, Target

if TYPE_CHECKING:
    from fedtune.export.checkpoint import RunCheckpoint
    from fedtune.export.package import Package

_APP_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,31}")
"""What Flower accepts as the name of an app and of its folder."""


@dataclass(frozen=True, kw_only=True)
class Submission(Target):
    """A folder in the form that the FlowerTune leaderboard asks for."""

    name = "submission"

    out: Out = None
    draft: Annotated[bool, Option("--draft", "Write an incomplete submission, marked as a draft.")] = False

    def package(self, checkpoint: RunCheckpoint) -> Package:
        """Return the files of the submission.

        Raises:
            MissingError: the run is not finished or not evaluated, and `draft` is not set; the hint is how to complete it.
            UsageError: the run does not belong to a challenge, or one of its files must not be published.
        """
        from fedtune.budget.ledger import comm_cost_lines
        from fedtune.export.files import adapter_config
        from fedtune.export.leaderboard import app_files, artefacts, readiness, readme
        from fedtune.export.package import package, to_json
        from fedtune.export.submission_config import portable
        from fedtune.models.adapter import CONFIG_FILE, WEIGHTS_FILE

        found = readiness(checkpoint)
        if found.missing and not self.draft:
            raise MissingError(f"The submission is not complete: {'; '.join(found.missing)}.", hint=found.hint)
        config = portable(checkpoint.config)
        return package(
            {
                "README.md": readme(checkpoint, found),
                **app_files(config, checkpoint.run.read_about()),
                "fedtune.json": to_json(config),
                "comm_cost.txt": "".join(f"{line}\n" for line in comm_cost_lines(checkpoint.entries)),
                f"{checkpoint.name}/{CONFIG_FILE}": json.dumps(adapter_config(checkpoint), indent=2) + "\n",
                f"{checkpoint.name}/{WEIGHTS_FILE}": checkpoint.adapter / WEIGHTS_FILE,
                **artefacts(checkpoint),
            }
        )

    def plan(self, checkpoint: RunCheckpoint) -> Plan:
        """Return the files of the submission with their sizes, and its README."""
        package = self.package(checkpoint)
        return Plan(package.sizes(), package.text("README.md"))

    def write(self, checkpoint: RunCheckpoint, listener: Listener | None = None) -> Exported:
        """Write the submission.

        Raises:
            MissingError, UsageError: as `package`; or Flower does not accept the name of the folder, or it holds other files.
        """
        from fedtune.export.leaderboard import readiness

        folder = self.out or self.default_folder(checkpoint)
        if not _APP_NAME.fullmatch(folder.resolve().name):
            raise UsageError(
                f"Flower does not accept {folder.resolve().name!r} as the folder of an app.",
                hint="Choose an --out of letters, digits and hyphens, at most 32, a letter first.",
            )
        package = self.package(checkpoint)
        package.write(folder)
        found = readiness(checkpoint)
        notes = [f"DRAFT: {text}" for text in found.missing] + [f"not eligible: {text}" for text in found.ineligible]
        return Exported(folder, package.sizes(), tuple(notes))

    @staticmethod
    def default_folder(checkpoint: RunCheckpoint) -> Path:
        """Return a folder in exports that is named after the run, in letters that Flower accepts."""
        plain = re.sub("[^A-Za-z0-9]+", "-", checkpoint.run.path.resolve().name).strip("-")
        plain, end = plain if plain[:1].isalpha() else f"run-{plain}", f"-r{checkpoint.round}"
        return Path("exports") / (plain[: 32 - len(end)].rstrip("-") + end)


TARGET = Submission


def export_submission(checkpoint: RunCheckpoint, out: Path, *, draft: bool = False) -> Exported:
    """Write a leaderboard submission to the folder `out`; see `Submission`."""
    return Submission(out=out, draft=draft).write(checkpoint)
