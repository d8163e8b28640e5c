"""Shapes by arithmetic and by the meta device, against each other and against attached adapters."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from support.families import build
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from fedtune.config.facts import Architecture, load_preset
from fedtune.config.schema import AdapterConfig, ModelConfig
from fedtune.errors import ConfigError
from fedtune.models.adapter import attach, attach_saved, initial_tensors, read_adapter, write_adapter
from fedtune.models.base import Base, load_base
from fedtune.models.shapes import adapter_form, adapter_shapes, read_back

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


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    out = tmp_path_factory.mktemp("families")
    return cache(lambda name: build(name, out))


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: str(adapter.targets))
def test_both_paths_and_the_attached_adapter_agree(llama_folder: Path, base: Base, adapter: AdapterConfig) -> None:
    model = ModelConfig(base=str(llama_folder))
    from_meta = adapter_shapes(model, adapter, None)
    assert list(from_meta.items()) == list(attach(base, adapter).shapes.items())
    # Where arithmetic cannot tell, the architecture is no shortcut.
    assert list(adapter_shapes(model, adapter, LLAMA).items()) == list(from_meta.items())


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: str(adapter.targets))
def test_all_ways_give_the_same_adapter_config(llama_folder: Path, base: Base, adapter: AdapterConfig) -> None:
    model = ModelConfig(base=str(llama_folder))
    found = [attach(base, adapter).resolved]
    found += [adapter_form(model, adapter, architecture).resolved for architecture in (None, LLAMA)]
    for table in found:
        table.pop("base_model_name_or_path")  # of the copy at hand; the file gets the user's name for it
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("targets", ["default", "all-linear", ("embed_tokens", "q_proj")], ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gemma4", "lfm2"])
def test_families_agree_with_and_without_weights(
    families: Callable[[str], Path], family: str, targets: str | tuple[str, ...]
) -> None:
    model = ModelConfig(base=str(families(family)), quantization="none")
    adapter = AdapterConfig.model_validate({"rank": 3, "targets": targets})
    form, adapted = adapter_form(model, adapter, None), attach(load_base(model), adapter)
    assert list(form.shapes.items()) == list(adapted.shapes.items())
    tables = [{**table, "base_model_name_or_path": None} for table in (form.resolved, adapted.resolved)]
    assert tables[0] == tables[1]


def test_a_default_that_is_a_regular_expression_stays_one(families: Callable[[str], Path], tmp_path: Path) -> None:
    model = ModelConfig(base=str(families("gemma4")), quantization="none")
    adapter = AdapterConfig(rank=2)
    form = adapter_form(model, adapter, None)
    assert form.resolved["target_modules"] == ".*language_model\\..*\\.(q_proj|v_proj)"
    tensors = initial_tensors(form.shapes, seed=1)
    folder = tmp_path / "peft_1"
    write_adapter(
        folder,
        tensors,
        adapter,
        base_name="x",
        revision=None,
        resolved=form.resolved,
        read_back=partial(read_back, model),
    )
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"].startswith(".*language_model")


@pytest.fixture(scope="session")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 that reads pictures as well."""
    text = {
        "vocab_size": 858,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
    }
    picture = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
    folder = tmp_path_factory.mktemp("vision") / "gemma3"
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=picture, **tokens)).save_pretrained(
        folder
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(str(files("fedtune") / "models" / "builtin" / "tiny" / name), folder)
    return folder


def test_what_text_does_not_reach_gets_no_adapter(vision: Path, tmp_path: Path) -> None:
    model = ModelConfig(base=str(vision), quantization="none")
    adapter = AdapterConfig(rank=2, targets=("q_proj", "v_proj"))
    form = adapter_form(model, adapter, None)
    assert len(form.shapes) == 8  # two layers, two projections, A and B
    assert all(".language_model." in name for name in form.shapes)
    assert form.notes == (
        "4 targeted modules in model.vision_tower take no part in training on text: they get no adapter (naming one in full "
        "in adapter.targets keeps it)",
    )
    base = load_base(model)
    adapted = attach(base, adapter)
    assert list(adapted.shapes.items()) == list(form.shapes.items())
    output = adapted.model(torch.tensor([[3, 8, 9, 11]])).logits
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters()), "all that travels is trained"
    folder = tmp_path / "peft_1"
    write_adapter(
        folder,
        adapted.tensors(),
        adapter,
        base_name="x",
        revision=None,
        resolved=adapted.resolved,
        read_back=partial(read_back, model),
    )
    adapted.detach()
    again = attach_saved(base, read_adapter(folder))
    assert list(again.shapes) == list(form.shapes)


def test_what_is_named_in_full_is_kept(vision: Path) -> None:
    model = ModelConfig(base=str(vision), quantization="none")
    named = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    form = adapter_form(model, AdapterConfig(rank=2, targets=("v_proj", named)), None)
    towers = {name.partition(".lora_")[0] for name in form.shapes if "vision_tower" in name}
    assert towers == {f"base_model.model.{named}"}
    assert len(form.shapes) == 6
    # The text model has no `fc1`: whoever names it means the tower's.
    assert adapter_form(model, AdapterConfig(rank=2, targets=("fc1",)), None).shapes


def test_defaults_of_families_that_peft_has_none_for(families: Callable[[str], Path]) -> None:
    found = {
        name: adapter_form(ModelConfig(base=str(families(name))), AdapterConfig(), None).resolved["target_modules"]
        for name in ("phi3", "mamba", "lfm2", "qwen3_moe")
    }
    assert found == {
        "phi3": ["o_proj", "qkv_proj"],
        "mamba": ["in_proj"],
        "lfm2": ["in_proj", "k_proj", "out_proj", "q_proj", "v_proj"],
        "qwen3_moe": ["k_proj", "o_proj", "q_proj", "v_proj"],
    }


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
