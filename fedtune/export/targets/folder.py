"""`fedtune export --to folder`: an adapter with its model card, config, results and ledger summary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.export.target import Exported, Licence, Listener, Out, Plan, Target, Tokenizer

if TYPE_CHECKING:
    from fedtune.export.checkpoint import RunCheckpoint
    from fedtune.export.package import Package


@dataclass(frozen=True, kw_only=True)
class Folder(Target):
    """A folder that PEFT loads as an adapter."""

    name = "folder"

    out: Out = None
    tokenizer: Tokenizer = False
    licence: Licence = None

    def package(self, checkpoint: RunCheckpoint) -> Package:
        """Return the files of the folder.

        Raises:
            UsageError: a file is a link or contains a secret, `licence` is not an id, or results or ledger are damaged.
            MissingError: the tokenizer of the base model cannot be loaded.
        """
        from fedtune.export.card import card
        from fedtune.export.files import TOKENIZER_FILES, about_files, adapter_config, base_files
        from fedtune.export.package import package, to_json
        from fedtune.models.adapter import CONFIG_FILE, WEIGHTS_FILE

        return package(
            {
                WEIGHTS_FILE: checkpoint.adapter / WEIGHTS_FILE,
                CONFIG_FILE: to_json(adapter_config(checkpoint)),
                "README.md": card(checkpoint, licence=self.licence),
                **about_files(checkpoint),
                **(base_files(checkpoint, TOKENIZER_FILES) if self.tokenizer else {}),
            }
        )

    def plan(self, checkpoint: RunCheckpoint) -> Plan:
        """Return the files of the folder with their sizes, and the model card."""
        package = self.package(checkpoint)
        return Plan(package.sizes(), package.text("README.md"))

    def write(self, checkpoint: RunCheckpoint, listener: Listener | None = None) -> Exported:
        """Write the folder.

        Raises:
            UsageError, MissingError: as `package`; or `out` holds other files.
        """
        folder = self.out or Path("exports") / f"{checkpoint.run.path.resolve().name}-{checkpoint.name}"
        package = self.package(checkpoint)
        package.write(folder)
        return Exported(folder, package.sizes(), checkpoint.notes)


TARGET = Folder


def export_folder(
    checkpoint: RunCheckpoint, out: Path, *, licence: str | None = None, tokenizer: bool = False
) -> Exported:
    """Write an adapter with its model card to the folder `out`; see `Folder`."""
    return Folder(out=out, licence=licence, tokenizer=tokenizer).write(checkpoint)
