"""Adapters that plain PEFT has made, with every feature: read as PEFT reads them, or refused by name."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.families import build
from transformers import AutoModelForCausalLM

from fedtune.config.schema import ModelConfig
from fedtune.models import integrity
from fedtune.models.adapter import AdapterError, attach_saved, read_adapter
from fedtune.models.base import Base, load_base

IDS = torch.tensor([[3, 5, 7, 11, 13, 17, 19]])

# PEFT and torch warn of much in passing, none of it fedtune's.
pytestmark = pytest.mark.filterwarnings("ignore")

READ: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding with DoRA": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "ranks": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    },
    "exclude_modules": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "regular expressions": {"target_modules": ".*q_proj", "exclude_modules": ".*layers\\.0.*"},
    "layers_to_transform": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "layers_pattern": {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "rsLoRA": {"target_modules": ["q_proj"], "use_rslora": True},
    "biases of targets": {"target_modules": ["q_proj", "k_proj"], "bias": "lora_only"},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "lora_bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["up_proj.weight"]},
    "parameters alone": {"target_modules": [], "target_parameters": ["up_proj.weight", "q_proj.weight"]},
    "tied": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "eva": {"target_modules": ["q_proj"], "init_lora_weights": "eva"},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": ["q_proj"], "init_lora_weights": "mica"},
    "no initialisation": {"target_modules": ["q_proj"], "init_lora_weights": False},
}

EXPERTS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "by name": {
        "target_modules": ["embed_tokens", "q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "one": {"target_modules": ["q_proj"], "target_parameters": ["down_proj"], "rank_pattern": {".*down_proj": 3}},
}

NOT_READ: dict[str, tuple[dict[str, Any], str]] = {
    "qalora": ({"use_qalora": True, "qalora_group_size": 4}, "QALoRA"),
    "alora": ({"alora_invocation_tokens": [3]}, "aLoRA"),
    "replicated": ({"layer_replication": [(0, 2), (1, 2)]}, "replicated layers"),
    "bdlora": ({"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}}, "BD-LoRA"),
    "monteclora": ({"monteclora_config": {}}, "MonteCLoRA"),
    "velora": ({"velora_config": {"num_groups": 4}}, "VeLoRA"),
    "kasa": ({"kasa_config": {}}, "KaSA"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("bases")
    return {name: build(name, out) for name in ("llama", "qwen2", "qwen3_moe", "gpt_oss")}


def by_peft(base: Path, folder: Path, **settings: Any) -> Any:
    """Make an adapter with PEFT, move everything that it trains, and save it; return PEFT's model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(str(folder))
    return adapted.eval()


def peft_logits(base: Path, folder: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folder))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(IDS).logits
    return logits


def logits_of(base: Base) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = base.model(IDS).logits
    return logits


def check_read(base_folder: Path, folder: Path) -> None:
    wanted = peft_logits(base_folder, folder)
    base = load_base(ModelConfig(base=str(base_folder), quantization="none"))
    bare = logits_of(base)
    saved = read_adapter(folder)
    before = copy.deepcopy(saved.config)
    adapted = attach_saved(base, saved)
    adapted.load(saved.tensors)
    assert torch.equal(logits_of(base), wanted)
    assert not torch.allclose(wanted, bare, atol=1e-3)
    with adapted.disabled():
        assert torch.equal(logits_of(base), bare)
    assert torch.equal(logits_of(base), wanted)
    adapted.check_base("while it is attached")
    adapted.detach()
    integrity.check(base.model, "after it was detached")
    assert torch.equal(logits_of(base), bare)
    assert saved.config == before == json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("feature", READ)
def test_read_as_peft_reads_it(folders: dict[str, Path], tmp_path: Path, feature: str) -> None:
    base = folders["qwen2" if "bias" in feature else "llama"]  # Qwen 2 has biases
    by_peft(base, tmp_path / "peft_1", **READ[feature])
    check_read(base, tmp_path / "peft_1")


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("targets", EXPERTS)
def test_experts_are_read_as_peft_reads_them(
    folders: dict[str, Path], tmp_path: Path, family: str, targets: str
) -> None:
    by_peft(folders[family], tmp_path / "peft_1", **EXPERTS[targets])
    check_read(folders[family], tmp_path / "peft_1")


@pytest.mark.parametrize("feature", NOT_READ)
def test_what_computes_otherwise_is_refused_by_name(folders: dict[str, Path], tmp_path: Path, feature: str) -> None:
    settings, name = NOT_READ[feature]
    by_peft(folders["llama"], tmp_path / "peft_1", target_modules=["q_proj"], **settings)
    base = load_base(ModelConfig(base=str(folders["llama"]), quantization="none"))
    bare = logits_of(base)
    with pytest.raises(AdapterError, match=f"The adapter uses .*{name}"):
        attach_saved(base, read_adapter(tmp_path / "peft_1"))
    assert torch.equal(logits_of(base), bare)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_an_initialisation_that_changed_the_base_is_refused_with_the_way_out(
    folders: dict[str, Path], tmp_path: Path, init: str
) -> None:
    by_peft(folders["llama"], tmp_path / "peft_1", target_modules=["q_proj"])
    file = tmp_path / "peft_1" / "adapter_config.json"
    table = json.loads(file.read_text()) | {
        "init_lora_weights": init,
        "loftq_config": {"loftq_bits": 4, "loftq_iter": 1},
    }
    file.write_text(json.dumps(table))
    base = load_base(ModelConfig(base=str(folders["llama"]), quantization="none"))
    integrity.watch(base.model)
    with pytest.raises(
        AdapterError, match=f"init_lora_weights = {init}.*path_initial_model_for_weight_conversion"
    ) as error:
        attach_saved(base, read_adapter(tmp_path / "peft_1"))
    assert error.value.exit_code == 3
    integrity.check(base.model, "after the refusal")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_converted_adapter_gives_on_the_plain_base_what_it_was_trained_to(
    folders: dict[str, Path], tmp_path: Path, init: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32)
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=init)
    )
    adapted.peft_config[
        "default"
    ].init_lora_weights = True  # as PEFT's example does before it saves the initial adapter
    adapted.save_pretrained(str(tmp_path / "initial"))
    adapted.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        trained = adapted.eval()(IDS).logits
    adapted.save_pretrained(
        str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    base = load_base(ModelConfig(base=str(folders["llama"]), quantization="none"))
    saved = read_adapter(tmp_path / "converted")
    attached = attach_saved(base, saved)
    attached.load(saved.tensors)
    torch.testing.assert_close(logits_of(base), trained, rtol=0, atol=1e-4)
    attached.detach()
    integrity.check(base.model, "afterwards")


def test_one_adapter_after_another_leaves_nothing_behind(folders: dict[str, Path], tmp_path: Path) -> None:
    """PEFT's `unload` keeps a head that was trained whole in the base."""
    base = load_base(ModelConfig(base=str(folders["llama"]), quantization="none"))
    by_peft(folders["llama"], tmp_path / "head", target_modules=["q_proj"], modules_to_save=["lm_head"])
    by_peft(folders["llama"], tmp_path / "plain", target_modules=["q_proj"])
    for name in ("head", "plain"):
        saved = read_adapter(tmp_path / name)
        adapted = attach_saved(base, saved)
        adapted.load(saved.tensors)
        assert torch.equal(logits_of(base), peft_logits(folders["llama"], tmp_path / name))
        adapted.detach()


def test_an_adapter_that_does_not_fit_leaves_the_base_bare(folders: dict[str, Path], tmp_path: Path) -> None:
    by_peft(
        folders["qwen3_moe"], tmp_path / "peft_1", target_modules=["q_proj"], target_parameters=["experts.down_proj"]
    )
    file = tmp_path / "peft_1" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_dropout": 0.1}))
    base = load_base(ModelConfig(base=str(folders["qwen3_moe"]), quantization="none"))
    bare = logits_of(base)
    with pytest.raises(AdapterError, match="lora_dropout"):
        attach_saved(base, read_adapter(tmp_path / "peft_1"))
    assert torch.equal(logits_of(base), bare)
    integrity.check(base.model, "after the refusal")
    by_peft(folders["qwen3_moe"], tmp_path / "peft_2", target_modules=["q_proj"])
    attach_saved(base, read_adapter(tmp_path / "peft_2")).detach()


def test_a_key_of_a_newer_peft_is_said(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    by_peft(folders["llama"], tmp_path / "peft_1", target_modules=["q_proj"])
    file = tmp_path / "peft_1" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_wonder": True}))
    base = load_base(ModelConfig(base=str(folders["llama"]), quantization="none"))
    attach_saved(base, read_adapter(tmp_path / "peft_1"))
    assert "does not know use_wonder" in caplog.text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_adapter(tmp_path / "peft_1").config["use_wonder"] is True


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("r", "8", 'has r = "8", which must be a number'),
        ("r", 0, "has r = 0, which must be a whole number above 0"),
        ("r", -4, "which must be a whole number above 0"),
        ("r", 10**15, "the largest dimension of its tensors is"),
        ("rank_pattern", {"q_proj": 10**12}, r"has rank_pattern\['q_proj'\] = 1000000000000"),
        ("lora_alpha", float("nan"), "has lora_alpha = NaN, which must be a number"),
        ("alpha_pattern", {"q_proj": None}, r"has alpha_pattern\['q_proj'\] = null"),
    ],
)
def test_a_rank_or_scale_that_cannot_be_is_named(
    folders: dict[str, Path], tmp_path: Path, key: str, value: object, said: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(AdapterError, match=said):
        read_adapter(tmp_path)
    file.write_text("[]")
    with pytest.raises(AdapterError, match="is not a JSON object"):
        read_adapter(tmp_path)
