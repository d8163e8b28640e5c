"""Loading base models from folders: number formats, what is refused, what is printed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from fedtune.config.schema import AdapterConfig, ModelConfig
from fedtune.errors import ConfigError, MissingError
from fedtune.models.adapter import attach, initial_tensors
from fedtune.models.base import Base, compute_dtype, free_memory_bytes, load_base, load_tokenizer
from fedtune.models.dequantize import dequantize, worth_dequantizing

CPU = torch.device("cpu")


def load(folder: Path, **options: object) -> Base:
    return load_base(ModelConfig(base=str(folder), **options))


@pytest.mark.parametrize(
    ("quantization", "kind"), [("nf4", Linear4bit), ("fp4", Linear4bit), ("int8", Linear8bitLt), ("none", None)]
)
def test_each_quantization_loads_frozen_and_in_evaluation_mode(
    llama_folder: Path, ids: torch.Tensor, quantization: str, kind: type | None, capfd: Any, caplog: Any
) -> None:
    base = load(llama_folder, quantization=quantization, dequantize="off")
    assert (base.device, base.compute_dtype, base.dequantized) == (CPU, torch.float32, False)
    assert base.revision is None
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    projection = base.model.model.layers[0].self_attn.q_proj
    if kind is None:
        assert type(projection) is torch.nn.Linear
    else:
        assert isinstance(projection, kind)
    if kind is Linear4bit:
        assert projection.weight.quant_type == quantization
        assert projection.compute_dtype == torch.float32
    with torch.no_grad():
        assert base.model(ids).logits.isfinite().all()
    assert base.tokenizer("w5 w6")["input_ids"] == [5, 6]
    assert [record.getMessage() for record in caplog.records] == []
    out, err = capfd.readouterr()
    assert out + err == ""


def test_compute_dtype(llama_folder: Path) -> None:
    assert compute_dtype(ModelConfig(), CPU) == torch.float32
    assert load(llama_folder, quantization="none", compute_dtype="bf16").model.dtype == torch.bfloat16


def test_free_memory_is_plausible() -> None:
    assert 2**20 < free_memory_bytes(CPU) < 2**50


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_dequantized_base_gives_the_same_logits_loss_and_gradients(
    llama_folder: Path, ids: torch.Tensor, quantization: str
) -> None:
    found = []
    for switch in ("off", "on"):
        base = load(llama_folder, quantization=quantization, dequantize=switch)
        assert base.dequantized is (switch == "on")
        assert isinstance(base.model.model.layers[0].mlp.up_proj, Linear4bit) is (switch == "off")
        adapted = attach(base, AdapterConfig(rank=4, targets="all-linear", dora=quantization == "nf4"))
        start, generator = initial_tensors(adapted, seed=0), torch.Generator().manual_seed(0)
        adapted.load({k: t + 0.1 * torch.randn(t.shape, generator=generator) for k, t in start.items()})
        output = adapted.model(ids, labels=ids)
        output.loss.backward()
        found.append((output.logits, output.loss, [p.grad for p in adapted.parameters()]))
    (logits, loss, gradients), (plain_logits, plain_loss, plain_gradients) = found
    torch.testing.assert_close(plain_logits, logits)
    torch.testing.assert_close(plain_loss, loss)
    for gradient, plain in zip(gradients, plain_gradients, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(plain, gradient, rtol=1e-4, atol=1e-6)


def test_dequantized_values_are_the_quantized_ones_not_the_original(llama_folder: Path) -> None:
    plain = load(llama_folder, quantization="none").model.model.layers[0].mlp.up_proj.weight
    base = load(llama_folder, quantization="nf4", dequantize="on")
    weight = base.model.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(weight, plain)
    # NF4 knows 16 values a block of 64.
    assert all(len(block.unique()) <= 16 for block in weight.reshape(-1, 64))
    assert not base.model.is_quantized
    assert not hasattr(base.model.config, "quantization_config")
    base.model.to(torch.bfloat16)  # refused for a quantized model


def test_auto_dequantizes_where_memory_allows(llama_folder: Path) -> None:
    config = ModelConfig(base=str(llama_folder), quantization="nf4", dequantize="off")
    model = load_base(config).model
    # Two layers of q 32x32, k and v 16x32, o 32x32, and three of 64x32, in 4 bytes.
    need = 2 * (3 * 32 * 32 + 3 * 64 * 32) * 4
    auto = config.model_copy(update={"dequantize": "auto"})
    assert worth_dequantizing(model, auto, torch.float32, 2 * need)
    assert not worth_dequantizing(model, auto, torch.float32, 2 * need - 1)
    assert worth_dequantizing(model, auto, torch.bfloat16, need)
    assert not worth_dequantizing(model, config, torch.float32, 2**60)
    int8 = auto.model_copy(update={"quantization": "int8"})
    assert not worth_dequantizing(model, int8, torch.float32, 2**60)
    dequantize(model, torch.float32)
    assert not any(isinstance(module, Linear4bit) for module in model.modules())


def test_gradients_pass_4_bit_layers_after_an_evaluation(llama_folder: Path, ids: torch.Tensor) -> None:
    adapted = attach(load(llama_folder, quantization="nf4", dequantize="off"), AdapterConfig(rank=4))
    with torch.no_grad():
        adapted.model(ids)
    adapted.model(ids, labels=ids).loss.backward()
    # Layer 0's gradient comes through all 4-bit layers of layer 1.
    gradients = [p.grad for key, p in zip(adapted.shapes, adapted.parameters(), strict=True) if ".lora_B." in key]
    assert len(gradients) == 4
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_what_is_missing_is_named(llama_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(llama_folder, tmp_path / "a")
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(MissingError, match="no tokenizer"):
        load(folder)
    with pytest.raises(MissingError, match="no tokenizer"):
        load_tokenizer(ModelConfig(base=str(folder)))
    folder = copy_of(llama_folder, tmp_path / "b")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(MissingError, match="cannot be read"):
        load(folder, quantization="none")
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(MissingError, match="no weights as safetensors; fedtune loads no pickles"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"x": "model-1.safetensors"}})
    )
    with pytest.raises(MissingError, match=r"lacks 1 of its weight files, such as model-1\.safetensors"):
        load(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(MissingError, match="is an adapter, not a base model"):
        load(folder)
    with pytest.raises(MissingError, match=r"has no config\.json"):
        load(tmp_path)


def test_a_models_own_code_never_runs_unasked(llama_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(llama_folder, tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "code.Own"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "code.py").write_text("raise SystemExit('this ran')")
    for load_it in (load_base, load_tokenizer):
        with pytest.raises(ConfigError, match=r"model\.trust_remote_code: this model runs code of its own"):
            load_it(ModelConfig(base=str(folder)))
    own["auto_map"] = {"AutoConfig": "another/repository--code.Own"}
    (folder / "config.json").write_text(json.dumps(config | own))
    with pytest.raises(ConfigError, match="its code lies in another repository"):
        load(folder, trust_remote_code=True, revision="a" * 40)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own"}))
    with pytest.raises(ConfigError, match="transformers knows no model of type 'own'"):
        load(folder)
