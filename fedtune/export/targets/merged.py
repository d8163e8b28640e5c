"""`fedtune export --to merged`: the adapter added to the weights of the base model, as one model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.export.target import Exported, Licence, Listener, Out, Plan, Target

if TYPE_CHECKING:
    from fedtune.export.checkpoint import RunCheckpoint

SHARD_BYTES = 2 * 10**9


@dataclass(frozen=True, kw_only=True)
class Merged(Target):
    """A folder that transformers loads as a model."""

    name = "merged"

    out: Out = None
    licence: Licence = None
    shard_bytes: int = SHARD_BYTES
    """Most bytes of tensors in one file, unless a single tensor is larger; about as much memory is used."""

    def plan(self, checkpoint: RunCheckpoint) -> Plan:
        """Return the files of the model with their sizes (for weights, of the tensors alone), and the model card."""
        from fedtune.export.files import model_files
        from fedtune.export.merge import plan_merge, shards_of

        merge = plan_merge(checkpoint)
        texts = model_files(checkpoint, untied=merge.untied, licence=self.licence)
        shards = shards_of(merge, self.shard_bytes)
        sizes = {name: sum(tensor.bytes for tensor in tensors) for name, tensors in shards.items()}
        return Plan(texts.sizes() | sizes, texts.text("README.md"))

    def write(self, checkpoint: RunCheckpoint, listener: Listener | None = None) -> Exported:
        """Write the model, and compare its logits with those of base model and adapter.

        Memory: the tensors of one file (`shard_bytes`) and one merged weight in float32. The comparison holds a whole model in
        float32; it is skipped, with a note, if memory does not suffice.

        Raises:
            MissingError: the base model cannot be loaded or is stored quantized, or the adapter does not fit it.
            UsageError: `out` holds other files, a file is a link or contains a secret, or `licence` is not an id.
            FedTuneError: the merged model does not give the adapter model's logits, or a merged weight is not finite.
        """
        from fedtune.export.files import model_files
        from fedtune.export.merge import plan_merge, write_shards
        from fedtune.export.merge_check import check_merged
        from fedtune.export.package import MANIFEST, package, prepare_folder
        from fedtune.runs.atomic import write_folder

        out = self.out or Path("exports") / f"{checkpoint.run.path.resolve().name}-{checkpoint.name}-merged"
        prepare_folder(out)
        merge = plan_merge(checkpoint)
        texts = model_files(checkpoint, untied=merge.untied, licence=self.licence)
        checks: list[str] = []

        def fill(folder: Path) -> None:
            try:
                texts.copy_to(folder)
                write_shards(merge, folder, self.shard_bytes, listener)
                files = package({path.name: path for path in sorted(folder.iterdir())})
                (folder / MANIFEST).write_bytes(files.manifest())
                checks.append(check_merged(checkpoint, folder))
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise

        write_folder(out, fill)
        sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
        return Exported(out, sizes, (*checks, *checkpoint.notes))


TARGET = Merged


def export_merged(
    checkpoint: RunCheckpoint,
    out: Path,
    *,
    licence: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    listener: Listener | None = None,
) -> Exported:
    """Write base model and adapter as one model to the folder `out`; see `Merged`."""
    return Merged(out=out, licence=licence, shard_bytes=shard_bytes).write(checkpoint, listener)
