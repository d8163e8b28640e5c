"""What cannot be trained is refused before a run begins."""

from pathlib import Path

import pytest
from support.families import build

from fedtune.config.schema import AdapterConfig, ModelConfig
from fedtune.errors import ConfigError
from fedtune.models.adapter import attach
from fedtune.models.base import load_base
from fedtune.training.local import check_trainable


@pytest.mark.parametrize(
    ("family", "targets", "words"),
    [
        ("phimoe", "all-linear", "PhimoeForCausalLM fails with this adapter"),  # its router returns a tuple
        ("reformer", "default", "no tensor of the adapter receives a gradient"),
    ],
)
def test_a_model_that_fails_in_training_is_refused(family: str, targets: str, words: str, tmp_path: Path) -> None:
    base = load_base(ModelConfig(base=str(build(family, tmp_path)), quantization="none"))
    adapted = attach(base, AdapterConfig(rank=4, targets=targets))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=words):
        check_trainable(adapted)


def test_the_check_leaves_the_adapter_as_it_was(tmp_path: Path) -> None:
    base = load_base(ModelConfig(base=str(build("llama", tmp_path)), quantization="none"))
    adapted = attach(base, AdapterConfig(rank=4, dropout=0.5))
    before = adapted.tensors()
    check_trainable(adapted)
    assert all(bool((tensor == before[name]).all()) for name, tensor in adapted.tensors().items())
    assert all(parameter.grad is None for parameter in adapted.parameters())
    assert not adapted.model.training
