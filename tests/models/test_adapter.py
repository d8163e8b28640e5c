"""The adapter in memory and on disk, against PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from fedtune.config.schema import AdapterConfig, ModelConfig
from fedtune.errors import ConfigError
from fedtune.models.adapter import (
    AdaptedModel,
    AdapterError,
    AdapterTensors,
    attach,
    check_tensors,
    initial_tensors,
    read_adapter,
    write_adapter,
)
from fedtune.models.base import Base, load_base

KINDS = {
    "default": AdapterConfig(rank=4, alpha=8),
    "all-linear": AdapterConfig(rank=4, alpha=8, targets="all-linear"),
    "rslora": AdapterConfig(rank=4, alpha=8, targets=("k_proj", "o_proj"), rslora=True),
    "dora": AdapterConfig(rank=4, alpha=8, targets=("q_proj", "down_proj"), dora=True),
    "modules": AdapterConfig(rank=4, alpha=8, modules_to_save=("lm_head", "norm")),
}


def noise(tensors: AdapterTensors) -> AdapterTensors:
    """Tensors that differ from the initial ones everywhere, as after training."""
    generator = torch.Generator().manual_seed(1)
    return {key: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for key, tensor in tensors.items()}


def write(folder: Path, adapted: AdaptedModel, adapter: AdapterConfig) -> AdapterTensors:
    tensors = adapted.tensors()
    write_adapter(folder, tensors, adapter, base_name="me/base", revision="c0", resolved=adapted.resolved)
    return tensors


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_are_those_that_peft_saves(base: Base, kind: str) -> None:
    adapted = attach(base, KINDS[kind])
    saved = get_peft_model_state_dict(adapted.model, save_embedding_layers=False)
    ours = adapted.tensors()
    assert list(ours) == list(saved) == list(adapted.shapes)
    assert all(torch.equal(ours[key], saved[key]) for key in saved)
    assert [tuple(p.shape) for p in adapted.parameters()] == list(adapted.shapes.values())
    trainable = sum(p.numel() for p in adapted.model.parameters() if p.requires_grad)
    assert trainable == sum(p.numel() for p in adapted.parameters())


# PEFT asks transformers by a deprecated name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_is_written(base: Base, ids: torch.Tensor, tmp_path: Path, kind: str) -> None:
    adapted = attach(base, KINDS[kind])
    adapted.load(noise(adapted.tensors()))
    tensors = write(tmp_path / "peft_1", adapted, KINDS[kind])
    with torch.no_grad():
        expected = adapted.model(ids).logits
        bare = adapted.detach().model(ids).logits
        loaded = PeftModel.from_pretrained(base.model, tmp_path / "peft_1")
        found = loaded.eval()(ids).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(found, bare)
    names = sorted(p.name for p in (tmp_path / "peft_1").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    again = read_adapter(tmp_path / "peft_1")
    assert again.config["base_model_name_or_path"] == "me/base"
    assert again.config["revision"] == "c0"
    assert again.tensors.keys() == tensors.keys()
    assert all(torch.equal(again.tensors[key], tensors[key]) for key in tensors)


def test_written_config_is_pefts_own(base: Base, tmp_path: Path) -> None:
    adapted = attach(base, KINDS["rslora"])
    write(tmp_path / "ours", adapted, KINDS["rslora"])
    adapted.model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours, theirs = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    theirs["target_modules"].sort()  # PEFT writes sets in any order
    assert ours == {**theirs, "base_model_name_or_path": "me/base", "revision": "c0"}


def test_same_adapter_gives_same_bytes_and_replaces_the_old(base: Base, tmp_path: Path) -> None:
    adapted = attach(base, KINDS["default"])
    first, second = tmp_path / "a", tmp_path / "b"
    write(first, adapted, KINDS["default"])
    (second / "left").mkdir(parents=True)
    write(second, adapted, KINDS["default"])
    names = sorted(p.name for p in first.iterdir())
    assert names == sorted(p.name for p in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_weights_are_swapped_in_place(base: Base, ids: torch.Tensor) -> None:
    adapted = attach(base, KINDS["default"])
    places = [p.data_ptr() for p in adapted.parameters()]
    start, other = adapted.tensors(), noise(adapted.tensors())
    with torch.no_grad():
        plain = adapted.model(ids).logits
        adapted.load(other)
        moved = adapted.model(ids).logits
        with adapted.disabled():
            assert torch.equal(adapted.model(ids).logits, plain)
        adapted.load(start)
        assert torch.equal(adapted.model(ids).logits, plain)
    assert not torch.allclose(moved, plain)
    assert [p.data_ptr() for p in adapted.parameters()] == places


def test_a_base_takes_one_adapter_after_another(base: Base, ids: torch.Tensor) -> None:
    with torch.no_grad():
        plain = base.model(ids).logits
    names = [name for name, _ in base.model.named_parameters()]
    first = attach(base, KINDS["all-linear"])
    first.load(noise(first.tensors()))
    with pytest.raises(RuntimeError, match="detach"):
        attach(base, KINDS["default"])
    assert first.detach() is base
    assert [name for name, _ in base.model.named_parameters()] == names
    second = attach(base, KINDS["default"])
    assert len(second.tensors()) == 8
    with torch.no_grad():
        assert torch.equal(second.model(ids).logits, plain)


def test_adapter_is_float32_on_a_bf16_base(llama_folder: Path) -> None:
    half = load_base(ModelConfig(base=str(llama_folder), quantization="none", compute_dtype="bf16"))
    adapted = attach(half, KINDS["dora"])
    assert half.model.dtype == torch.bfloat16
    assert {p.dtype for p in adapted.parameters()} == {torch.float32}


def test_unknown_targets_are_refused_with_the_known_ones(base: Base) -> None:
    with pytest.raises(ConfigError, match="no linear module wqkv; it has down_proj, gate_proj, k_proj, lm_head,"):
        attach(base, AdapterConfig(targets=("q_proj", "wqkv")))
    with pytest.raises(ConfigError, match="no linear module proj"):
        attach(base, AdapterConfig(targets=("proj",)))


def test_no_default_targets(base: Base, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(type(base.model.config), "model_type", "unheard-of")
    base.model.config.model_type = "unheard-of"
    adapted = attach(base, AdapterConfig())
    assert adapted.target_modules == ("k_proj", "o_proj", "q_proj", "v_proj")
    assert "no default targets for unheard-of: the adapter is on k_proj, o_proj, q_proj, v_proj" in caplog.text
    adapted.detach()
    for layer in base.model.model.layers:
        del layer.self_attn
    monkeypatch.setattr("fedtune.models.adapter.empty_copy", lambda model: model)
    with pytest.raises(ConfigError, match=r"PEFT knows no default for .*; name some of down_proj"):
        attach(base, AdapterConfig(rank=3))


def test_load_names_what_does_not_fit_and_changes_nothing(base: Base) -> None:
    adapted = attach(base, KINDS["default"])
    before = adapted.tensors()
    prefix = "base_model.model.model.layers.0.self_attn"
    bad = dict(before)
    del bad[f"{prefix}.q_proj.lora_A.weight"]
    bad["stranger"] = torch.zeros(1)
    bad[f"{prefix}.q_proj.lora_B.weight"] = torch.zeros(4, 32)
    bad[f"{prefix}.v_proj.lora_A.weight"] = torch.full((4, 32), float("nan"))
    with pytest.raises(AdapterError) as error:
        adapted.load(bad)
    assert error.value.exit_code == 3
    for part in (
        f"missing: {prefix}.q_proj.lora_A.weight",
        "extra: stranger",
        f"of another shape: {prefix}.q_proj.lora_B.weight (4, 32) instead of (32, 4)",
        f"not finite: {prefix}.v_proj.lora_A.weight",
    ):
        assert part in error.value.message
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapted.tensors().items())


def test_only_a_few_keys_are_named() -> None:
    shapes = {f"k{i}": (2,) for i in range(10)}
    with pytest.raises(AdapterError, match=r"missing: k0, k1, k2 and 7 more\."):
        check_tensors({}, shapes)
    with pytest.raises(AdapterError, match="not finite: k0"):
        check_tensors({"k0": torch.zeros(2, dtype=torch.int64)}, {"k0": (2,)})
    check_tensors({"k0": torch.zeros(2, dtype=torch.bfloat16)}, {"k0": (2,)})


@given(st.dictionaries(st.sampled_from("abcdef"), st.sampled_from([(2,), (3,), (2, 3)])), st.data())
def test_any_difference_is_found(shapes: dict[str, tuple[int, ...]], data: st.DataObject) -> None:
    other = data.draw(st.dictionaries(st.sampled_from("abcdef"), st.sampled_from([(2,), (3,), (2, 3)])))
    tensors = {key: torch.zeros(shape) for key, shape in other.items()}
    if other == shapes:
        check_tensors(tensors, shapes)
    else:
        with pytest.raises(AdapterError):
            check_tensors(tensors, shapes)


def test_initial_adapter_is_pefts_distribution_and_a_function_of_the_seed(base: Base) -> None:
    adapted = attach(base, AdapterConfig(rank=64, targets="all-linear"))
    torch.manual_seed(5)
    first = initial_tensors(adapted, seed=3)
    torch.manual_seed(6)
    assert all(torch.equal(tensor, first[key]) for key, tensor in initial_tensors(adapted.shapes, seed=3).items())
    other = initial_tensors(adapted, seed=4)
    adapted.load(first)
    seen = set()
    for key, tensor in first.items():
        if ".lora_B." in key:
            assert not tensor.any()
            continue
        bound = tensor.shape[1] ** -0.5
        assert tensor.abs().max() <= bound
        # Uniform: mean 0, standard deviation bound / sqrt(3), over 64 * 32 or more numbers.
        assert abs(float(tensor.mean())) < 0.1 * bound
        assert float(tensor.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
        assert not torch.equal(tensor, other[key])
        seen.add(float(tensor[0, 0]))
    assert len(seen) == 14, "every tensor has a stream of its own"


def test_initial_adapter_stays_what_it_was() -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    found = initial_tensors({key: (1, 4)}, seed=42)[key]
    assert found.dtype == torch.float32
    # Recorded once: a change of this stream would change every run's start.
    assert [round(float(x), 6) for x in found[0]] == [-0.456917, 0.257969, 0.286354, -0.128063]


def test_dora_magnitudes_come_from_the_base(base: Base) -> None:
    adapted = attach(base, KINDS["dora"])
    adapted.load(noise(adapted.tensors()))
    found = initial_tensors(adapted, seed=0)
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_magnitude_vector"
    weight = base.model.model.layers[1].mlp.down_proj.base_layer.weight
    torch.testing.assert_close(found[key], weight.norm(dim=1))
    with pytest.raises(ValueError, match="attached model"):
        initial_tensors(adapted.shapes, seed=0)


def test_unreadable_adapters_are_refused_in_one_sentence(base: Base, tmp_path: Path) -> None:
    adapted = attach(base, KINDS["default"])
    good = tmp_path / "good"
    write(good, adapted, KINDS["default"])

    def spoilt(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    with pytest.raises(AdapterError, match="There is no adapter folder"):
        read_adapter(tmp_path / "none")
    pickled = spoilt("pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle"):
        read_adapter(pickled)
    (pickled / "adapter_model.bin").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors"):
        read_adapter(pickled)
    truncated = spoilt("truncated")
    data = (truncated / "adapter_model.safetensors").read_bytes()
    for length in (0, 4, 100, len(data) - 1):
        (truncated / "adapter_model.safetensors").write_bytes(data[:length])
        with pytest.raises(AdapterError, match="damaged"):
            read_adapter(truncated)
    (truncated / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json"):
        read_adapter(truncated)
    for text, reason in (("{", "not JSON"), ("[]", "not a JSON object"), ('{"peft_type": "IA3"}', "type IA3")):
        (good / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterError, match=reason):
            read_adapter(good)


def test_a_written_flipped_key_is_found_on_load(base: Base, tmp_path: Path) -> None:
    adapted = attach(base, KINDS["default"])
    write(tmp_path / "a", adapted, KINDS["default"])
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({key.replace("q_proj", "k_proj"): tensor for key, tensor in load_file(path).items()}, path)
    with pytest.raises(AdapterError, match="missing: base_model"):
        adapted.load(read_adapter(tmp_path / "a").tensors)


def test_modules_to_save_start_as_the_base_has_them_and_are_named(base: Base, llama_folder: Path) -> None:
    adapted = attach(base, AdapterConfig(rank=2, modules_to_save=("lm_head",)))
    start = initial_tensors(adapted, seed=3)
    key = "base_model.model.lm_head.weight"
    assert torch.equal(start[key], adapted.base.model.get_output_embeddings().original_module.weight)
    with pytest.raises(ValueError, match=r"lm_head\.weight follows from the base"):
        initial_tensors(adapted.shapes, seed=3)
    adapted.detach()
    with pytest.raises(ConfigError, match=r"adapter\.modules_to_save: this model has no module head"):
        attach(base, AdapterConfig(modules_to_save=("head",)))
    small = load_base(ModelConfig(base=str(llama_folder), quantization="nf4", dequantize="off"))
    with pytest.raises(ConfigError, match="down_proj is quantized"):
        attach(small, AdapterConfig(modules_to_save=("down_proj",)))
    with pytest.raises(ValueError, match="both in targets and in modules_to_save"):
        AdapterConfig(targets=("q_proj",), modules_to_save=("q_proj",))
