"""`fedtune export --to hf-hub`: the files of `--to folder` as a repository on the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from fedtune.export.target import Licence, Listener, Option, Plan, Target, Tokenizer
from fedtune.export.targets.folder import Folder

if TYPE_CHECKING:
    from fedtune.export.checkpoint import RunCheckpoint
    from fedtune.export.package import Package
    from fedtune.export.publish import Published


@dataclass(frozen=True, kw_only=True)
class Hub(Target):
    """A repository on the hub."""

    name = "hf-hub"

    repo: Annotated[str, Option("--repo", "The repository on the hub, for --to hf-hub.", "USER/NAME")]
    public: Annotated[bool, Option("--public", "Make a new repository public; private unless given.")] = False
    revision: Annotated[
        str | None, Option("--revision", "The branch of the repository; main unless given.", "BRANCH")
    ] = None
    message: Annotated[str | None, Option("--message", "The commit's message on the hub.", "TEXT")] = None
    tokenizer: Tokenizer = False
    licence: Licence = None

    def plan(self, checkpoint: RunCheckpoint) -> Plan:
        """Return the files with their sizes, the model card, and what the hub says of the repository and the token."""
        package = self._package(checkpoint)
        published = self._publish(checkpoint, package, dry_run=True)
        return Plan(published.sizes, package.text("README.md"), published.notes)

    def write(self, checkpoint: RunCheckpoint, listener: Listener | None = None) -> Published:
        """Upload the files; raises as `Folder.package` and `publish`."""
        return self._publish(checkpoint, self._package(checkpoint), dry_run=False)

    def _package(self, checkpoint: RunCheckpoint) -> Package:
        return Folder(licence=self.licence, tokenizer=self.tokenizer).package(checkpoint)

    def _publish(self, checkpoint: RunCheckpoint, package: Package, *, dry_run: bool) -> Published:
        from fedtune.export.publish import publish

        published = publish(
            checkpoint,
            package,
            self.repo,
            public=self.public,
            revision=self.revision,
            message=self.message,
            dry_run=dry_run,
        )
        return replace(published, notes=(*published.notes, *checkpoint.notes))


TARGET = Hub
