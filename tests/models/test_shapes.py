"""Shapes by arithmetic and by the meta device, against each other and against attached adapters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.config.facts import Architecture, load_preset
from fedtune.config.schema import AdapterConfig, ModelConfig
from fedtune.errors import ConfigError
from fedtune.models.adapter import attach
from fedtune.models.base import Base
from fedtune.models.shapes import adapter_shapes

LLAMA = Architecture(
    base="x", layers=2, hidden=32, heads=4, kv_heads=2, head_dim=8, default_targets=("q_proj", "v_proj")
)
ADAPTERS = [
    AdapterConfig(rank=4),
    AdapterConfig(rank=3, targets=("o_proj", "k_proj", "q_proj", "v_proj")),
    AdapterConfig(rank=2, targets="all-linear", rslora=True),
    AdapterConfig(rank=2, targets=("q_proj", "up_proj"), dora=True),
    AdapterConfig(rank=2, targets=("q_proj",), dora=True),
    AdapterConfig(rank=2, targets=("self_attn.q_proj",)),
    AdapterConfig(rank=2, targets=("q_proj",), modules_to_save=("embed_tokens", "lm_head")),
]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: str(adapter.targets))
def test_both_paths_and_the_attached_adapter_agree(llama_folder: Path, base: Base, adapter: AdapterConfig) -> None:
    model = ModelConfig(base=str(llama_folder))
    from_meta = adapter_shapes(model, adapter, None)
    assert list(from_meta.items()) == list(attach(base, adapter).shapes.items())
    # Where arithmetic cannot tell, the architecture is no shortcut.
    assert list(adapter_shapes(model, adapter, LLAMA).items()) == list(from_meta.items())


def test_published_recipe_by_hand() -> None:
    recipe = load_preset("recipe", "aloe-8b-medical")
    adapter = AdapterConfig(rank=32, targets=("q_proj", "v_proj"))
    shapes = adapter_shapes(ModelConfig(base="nobody/nothing"), adapter, recipe.architecture)
    prefix = "base_model.model.model.layers.31.self_attn"
    assert list(shapes.items())[-4:] == [
        (f"{prefix}.q_proj.lora_A.weight", (32, 4096)),
        (f"{prefix}.q_proj.lora_B.weight", (4096, 32)),
        (f"{prefix}.v_proj.lora_A.weight", (32, 4096)),
        (f"{prefix}.v_proj.lora_B.weight", (1024, 32)),
    ]
    # 32 layers x 32 x (4096 + 4096 + 4096 + 1024)
    assert sum(a * b for a, b in shapes.values()) == 13_631_488


def test_shapes_need_config_json_alone(llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama_folder / "config.json").read_bytes())
    shapes = adapter_shapes(ModelConfig(base=str(tmp_path)), AdapterConfig(rank=4), None)
    assert shapes["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"] == (16, 4)
    with pytest.raises(ConfigError, match="no linear module wqkv"):
        adapter_shapes(ModelConfig(base=str(tmp_path)), AdapterConfig(targets=("wqkv",)), None)


def test_arithmetic_loads_nothing_heavy() -> None:
    code = (
        "import sys; from fedtune.config.facts import load_preset; from fedtune.config.schema import *\n"
        "from fedtune.models.shapes import adapter_shapes\n"
        "known = load_preset('recipe', 'aloe-8b-medical').architecture\n"
        "assert len(adapter_shapes(ModelConfig(), AdapterConfig(), known)) == 128\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
