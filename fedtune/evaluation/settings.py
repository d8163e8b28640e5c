"""What an evaluation scores, and how (`EvalSettings`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedtune.config.schema import ModelConfig
from fedtune.evaluation.subjects import Subject
from fedtune.evaluation.tasks.base import Selection

Mode = Literal["fast", "official"]
Protocol = Literal["flowertune", "lm-eval"]

BATCH_SIZE = 16
"""Questions in a batch of the leaderboard's scripts; the first one's right answer sets how many new tokens all may have."""


@dataclass(frozen=True)
class EvalSettings:
    """What to score, on which benchmarks, and how."""

    model: ModelConfig
    """The base model, quantized as for the evaluation."""
    subjects: tuple[Subject, ...]
    selections: tuple[Selection, ...]
    out: Path
    """Folder of the results."""
    mode: Mode = "fast"
    batch_size: int = BATCH_SIZE
    """Part of the protocol: see `BATCH_SIZE`."""
    data_dir: Path | None = None
    limit: int | None = None
    """The first so many questions only."""
    verify: int = 0
    """Number of questions to answer both in batches and one by one."""
    protocol: Protocol = "flowertune"

    def label(self, subject: Subject) -> str:
        """Return a subject's name in file names, with every setting that differs from the leaderboard's."""
        is_leaderboard = self.protocol == "flowertune"
        differences = (
            self.mode if is_leaderboard and self.mode != "official" else "",
            "" if self.model.quantization == "fp4" else self.model.quantization,
            f"batch{self.batch_size}" if is_leaderboard and self.batch_size != BATCH_SIZE else "",
            "" if self.limit is None else f"first{self.limit}",
        )
        return "_".join(filter(None, (subject.name, *differences)))
