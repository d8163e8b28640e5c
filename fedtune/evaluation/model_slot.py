"""The loaded base model of an evaluation, with the adapter of one subject at a time (`ModelSlot`)."""

from __future__ import annotations

import json

from fedtune.config.schema import ModelConfig
from fedtune.evaluation.provenance import model_hash, pin_revision
from fedtune.evaluation.subjects import Subject
from fedtune.models import integrity
from fedtune.models.adapter import AdaptedModel, attach_saved, read_adapter
from fedtune.models.base import Base, load_base


class ModelSlot:
    """A base model, loaded at the first use, whose adapters are exchanged in place."""

    def __init__(self, model: ModelConfig) -> None:
        self.config = pin_revision(model)
        self.sha256 = model_hash(self.config)
        self._base: Base | None = None
        self._adapted: AdaptedModel | None = None
        self._adapter_config = ""

    @property
    def base(self) -> Base:
        """The base model."""
        if self._base is None:
            self._base = load_base(self.config)
            integrity.watch(self._base.model)
        return self._base

    def attach(self, subject: Subject) -> Base:
        """Return the base model with the subject's adapter, or without one."""
        if subject.folder is None:
            self._detach()
            return self.base
        saved = read_adapter(subject.folder)
        config = json.dumps(saved.config, sort_keys=True)
        if self._adapted is None or config != self._adapter_config:
            self._detach()
            self._adapted, self._adapter_config = attach_saved(self.base, saved), config
        self._adapted.load(saved.tensors)
        return self.base

    def check_base(self, subject: Subject) -> None:
        """Check that the base model's own weights are unchanged.

        Raises:
            FedTuneError: the subject's evaluation has changed them.
        """
        if self._adapted is not None:
            self._adapted.check_base(f"after {subject.name} was evaluated")
        elif self._base is not None:
            integrity.check(self._base.model, f"after {subject.name} was evaluated")

    def _detach(self) -> None:
        if self._adapted is not None:
            self._adapted.detach()
            self._adapted = None
