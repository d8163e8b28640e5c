"""Checks of a loaded base: weights that are missing or unused, values that are not finite, causality, ends of text."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import FAMILIES, NOT_CAUSAL, QUICK, build
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from fedtune.config.schema import BUILTIN_TINY, ModelConfig
from fedtune.errors import ConfigError, MissingError
from fedtune.models.base import load_base
from fedtune.models.check import check_causal, ends_of_text, probe_tokens
from fedtune.models.hub import resolve_base
from fedtune.models.stored import WEIGHTS

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return Path(shutil.copytree(resolve_base(ModelConfig(base=BUILTIN_TINY)).folder, tmp_path / "tiny"))


def load(folder: Path, **options: object) -> Any:
    return load_base(ModelConfig(base=str(folder), **{"quantization": "none", **options}))


def edit_config(folder: Path, file: str = "config.json", **values: object) -> None:
    path = folder / file
    table = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(table | values))


def edit_weights(folder: Path, change: Callable[[Tensors], Tensors | None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors = change(tensors) or tensors
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def refusal(folder: Path, **options: object) -> str:
    with pytest.raises(MissingError) as caught:
        load(folder, **options)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_builtin_base_loads_without_a_word(tiny: Path, caplog: Any) -> None:
    load(tiny)
    assert not [r for r in caplog.records if r.name.startswith("fedtune")]


def test_missing_weights_are_named_and_counted(tiny: Path) -> None:
    edit_weights(tiny, lambda tensors: {k: t for k, t in tensors.items() if not k.startswith("model.layers.2.mlp.")})
    for quantization in ("none", "nf4"):
        text = refusal(tiny, quantization=quantization)
        assert "3 weights of" in text
        names = "model.layers.2.mlp.down_proj.weight, model.layers.2.mlp.gate_proj.weight, model.layers.2.mlp.up_proj.weight"
        assert f"missing: {names}." in text


def test_a_prefix_on_every_name(tiny: Path) -> None:
    count = len(load_file(tiny / WEIGHTS))
    edit_weights(tiny, lambda tensors: {f"base_model.model.{name}": tensor for name, tensor in tensors.items()})
    text = refusal(tiny)
    assert "missing: " in text
    assert "unexpected: base_model.model." in text
    assert f"and {count - 3} more" in text


@pytest.mark.parametrize(("layers", "words"), [(-1, "unexpected: model.layers."), (1, "missing: model.layers.")])
def test_a_config_with_other_layers_than_the_file(tiny: Path, layers: int, words: str) -> None:
    number = json.loads((tiny / "config.json").read_text())["num_hidden_layers"]
    edit_config(tiny, num_hidden_layers=number + layers)
    assert words in refusal(tiny)


@pytest.mark.parametrize("rows", [-8, 8])
def test_a_vocabulary_of_another_size(tiny: Path, rows: int) -> None:
    table = json.loads((tiny / "config.json").read_text())
    edit_config(tiny, vocab_size=table["vocab_size"] + rows)
    shapes = f"({table['vocab_size']}, {table['hidden_size']}) instead of ({table['vocab_size'] + rows}, {table['hidden_size']})"
    text = refusal(tiny)
    assert "of another shape: " in text
    assert shapes in text


def test_an_extra_tensor_is_unexpected(tiny: Path) -> None:
    edit_weights(tiny, lambda tensors: tensors.update({"score.weight": torch.ones(2, 4)}))
    assert "unexpected: score.weight" in refusal(tiny)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_head_that_differs_from_the_embedding_it_is_tied_to(
    llama_folder: Path, tmp_path: Path, quantization: str, caplog: Any
) -> None:
    """The files' head is used, and stays when the two are resized."""
    folder = Path(shutil.copytree(llama_folder, tmp_path / "base"))
    edit_config(folder, tie_word_embeddings=True)
    base = load(folder, quantization=quantization)
    assert "tie_word_embeddings = true, and the weight files hold a head" in caplog.text
    ids = torch.arange(2, 18).reshape(2, 8)
    logits = base.model(ids).logits
    assert torch.equal(logits, load(llama_folder, quantization=quantization).model(ids).logits)
    base.model.resize_token_embeddings(65, mean_resizing=False)
    assert torch.equal(base.model(ids).logits[..., :64], logits)


def test_a_head_that_is_the_embedding_stays_tied(llama_folder: Path, tmp_path: Path, caplog: Any) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "base"))
    edit_config(folder, tie_word_embeddings=True)
    edit_weights(
        folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    )
    model = load(folder).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "tie_word_embeddings" not in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_that_is_not_finite(tiny: Path, value: float, quantization: str, dtype: torch.dtype) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors: Tensors) -> Tensors:
        tensors[name][3, 5] = value
        return {key: tensor.to(dtype) for key, tensor in tensors.items()}

    edit_weights(tiny, spoil)
    assert f"{name} of {tiny} holds a value that is not finite" in refusal(tiny, quantization=quantization)


@pytest.mark.parametrize("head", ["absent", "present"])
def test_tied_weights_are_no_finding(llama_folder: Path, tmp_path: Path, head: str, caplog: Any) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "tied"))
    edit_config(folder, tie_word_embeddings=True)

    def tie(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if head == "absent":
            del tensors["lm_head.weight"]

    edit_weights(folder, tie)
    base = load(folder)
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    assert not [r for r in caplog.records if r.name.startswith("fedtune")]
    edit_config(folder, tie_word_embeddings=False)
    if head == "absent":
        assert "missing: lm_head.weight" in refusal(folder)


def test_buffers_of_older_files_are_no_finding(llama_folder: Path, tmp_path: Path, caplog: Any) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "old"))
    old = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(2)}
    edit_weights(folder, lambda tensors: tensors.update(old))
    gpt2 = build("gpt2", tmp_path)
    mask = torch.ones(1, 1, 2048, 2048, dtype=torch.uint8)
    masks = {f"transformer.h.{n}.attn.bias": mask.clone() for n in range(2)}
    masks |= {f"transformer.h.{n}.attn.masked_bias": torch.tensor(-1e4) for n in range(2)}
    edit_weights(gpt2, lambda tensors: tensors.update(masks))
    caplog.clear()
    for each in (folder, gpt2):
        load(each)
    assert not [r for r in caplog.records if r.name.startswith("fedtune")]
    # A file without the prefix of the whole model, as GPT-2's own is.
    edit_weights(gpt2, lambda tensors: {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()})
    load(gpt2)
    assert not [r for r in caplog.records if r.name.startswith("fedtune")]
    # By its shape no mask: the class ignores its name, so it is said.
    edit_weights(gpt2, lambda tensors: tensors.update({"h.0.attn.bias": torch.ones(32)}))
    load(gpt2)
    assert "GPT2LMHeadModel does not use 1 of the base's tensors, such as h.0.attn.bias" in caplog.text


def with_layer_61(tmp_path: Path, extra: bool) -> Path:
    """Write a DeepSeek-V3 whose file holds a layer 61, which its class ignores; `extra`: built for multi-token prediction."""
    folder = build("deepseek_v3", tmp_path)

    def add(tensors: Tensors) -> None:
        layer = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.1.")}
        tensors.update({name.replace("layers.1.", "layers.61."): tensor.clone() for name, tensor in layer.items()})
        if extra:
            tensors["model.layers.61.eh_proj.weight"] = torch.ones(32, 64)

    edit_weights(folder, add)
    return folder


def test_a_layer_for_multi_token_prediction_is_said_to_be_unused(tmp_path: Path, caplog: Any) -> None:
    load(with_layer_61(tmp_path, extra=True))
    assert "DeepseekV3ForCausalLM does not use" in caplog.text
    assert "model.layers.61.eh_proj.weight" in caplog.text


def test_a_plain_layer_that_transformers_ignores_is_found(tmp_path: Path) -> None:
    assert "unexpected: model.layers.61." in refusal(with_layer_61(tmp_path, extra=False))


def test_a_classifier_has_no_language_model_head(llama_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "classifier"))

    def change(tensors: Tensors) -> None:
        del tensors["lm_head.weight"]
        tensors["score.weight"] = torch.ones(2, 32)

    edit_weights(folder, change)
    text = refusal(folder)
    assert "missing: lm_head.weight; unexpected: score.weight" in text


@pytest.mark.parametrize("name", ["bert", *QUICK, "mixtral", "gpt_oss", "qwen3_next", "lfm2", "gemma2"])
def test_causality(name: str, tmp_path: Path) -> None:
    check_family(name, tmp_path, "none")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_causality_of_every_family(name: str, tmp_path: Path) -> None:
    check_family(name, tmp_path, "none")


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize(
    "name", ["llama", "gemma3_text", "gpt2", "lfm2", "mixtral", "qwen3_next", "bert", "roberta", "xlnet"]
)
def test_causality_with_quantized_weights(name: str, quantization: str, tmp_path: Path) -> None:
    check_family(name, tmp_path, quantization)


def check_family(name: str, tmp_path: Path, quantization: str) -> None:
    folder = build(name, tmp_path)
    for dtype in ("fp32", "bf16"):
        if name in NOT_CAUSAL:
            with pytest.raises(ConfigError, match=r"model\.base: .* is not causal") as caught:
                load(folder, quantization=quantization, compute_dtype=dtype)
            assert caught.value.exit_code == 2
        else:
            load(folder, quantization=quantization, compute_dtype=dtype)


def test_an_encoder_with_other_heads_is_refused_as_an_encoder(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForPreTraining

    sizes = {
        "vocab_size": 858,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    BertForPreTraining(BertConfig(**sizes)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(resolve_base(ModelConfig(base=BUILTIN_TINY)).folder).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is not causal"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_narrow_encoder_with_untrained_weights_is_not_causal_either(tmp_path: Path, dtype: str) -> None:
    config = AutoConfig.for_model(
        "bert", vocab_size=858, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)  # initial weights of 0.02
    AutoTokenizer.from_pretrained(resolve_base(ModelConfig(base=BUILTIN_TINY)).folder).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is not causal"):
        load(tmp_path, compute_dtype=dtype)


def test_rounding_that_depends_on_later_tokens_is_no_leak(llama_folder: Path) -> None:
    """What a mixture of experts in coarse arithmetic may do: earlier logits move, and no gradient passes."""
    base = load(llama_folder)

    class Rounding(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner, self.size = inner, 3e-3

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            out = self.inner(hidden)
            of_row = hidden.detach().sum(dim=(1, 2), keepdim=True)
            return out + self.size * out.detach().abs().max() * torch.sin(1e4 * of_row)

    base.model.model.layers[0].mlp = Rounding(base.model.model.layers[0].mlp)
    first, second, _ = base.model(probe_tokens(base.model, base.tokenizer)).logits
    assert (first - second)[:-1].abs().max() > 1e-3 * first.abs().max()
    config = ModelConfig(base="x", quantization="none")
    check_causal(base.model, base.tokenizer, config, torch.float32)
    base.model.model.layers[0].mlp.size = 1.0  # no rounding, though no gradient tells
    with pytest.raises(ConfigError, match="is not causal"):
        check_causal(base.model, base.tokenizer, config, torch.float32)


def test_the_probe_takes_ordinary_tokens_and_differs_where_it_says(tiny: Path) -> None:
    base = load(tiny)
    rows = probe_tokens(base.model, base.tokenizer)
    assert rows.shape == (3, 16)
    assert torch.equal(rows[0, :-1], rows[1, :-1])
    assert rows[0, -1] != rows[1, -1]
    assert torch.equal(rows[0, :8], rows[2, :8])
    assert (rows[0, 8:] != rows[2, 8:]).any()
    assert not set(rows.flatten().tolist()) & set(base.tokenizer.all_special_ids)


@pytest.mark.parametrize(
    "name", ["T5ForConditionalGeneration", "BartForConditionalGeneration", "PegasusForConditionalGeneration"]
)
def test_encoder_decoders_are_refused(name: str, tmp_path: Path) -> None:
    import transformers

    options = {"vocab_size": 858, "d_model": 32, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    options |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    options |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "pad_token_id": 0, "max_position_embeddings": 64}
    kind = getattr(transformers, name)
    kind(kind.config_class(**options)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(resolve_base(ModelConfig(base=BUILTIN_TINY)).folder).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is an encoder-decoder and no causal language model"):
        load(tmp_path)


def test_ends_of_text_that_disagree_are_said(tiny: Path, caplog: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    own, other = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("e")
    edit_config(tiny, "generation_config.json", eos_token_id=other)
    base = load(tiny)
    assert (
        f"{tokenizer.eos_token!r} ({own}) by its tokenizer and with 'e' ({other}) by its generation_config.json"
        in caplog.text
    )
    assert ends_of_text(base.model, base.tokenizer) == (own, other)
    caplog.clear()
    edit_config(tiny, "generation_config.json", eos_token_id=[other, own])
    base = load(tiny)
    assert not [r for r in caplog.records if r.name.startswith("fedtune")]
    assert set(ends_of_text(base.model, base.tokenizer)) == {own, other}
    edit_config(tiny, "generation_config.json", eos_token_id=None)
    assert ends_of_text(load(tiny).model, base.tokenizer) == (own,)
    edit_config(tiny, "generation_config.json", eos_token_id=[999_999, -1])
    base = load(tiny)
    assert ends_of_text(base.model, base.tokenizer) == (own,)
    edit_config(tiny, "generation_config.json", eos_token_id=own)
    caplog.clear()
    edit_config(tiny, eos_token_id=other)
    load(tiny)
    assert "by its config.json" in caplog.text


def test_tokens_without_an_embedding_are_said_and_do_not_stop_a_base(tiny: Path, caplog: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["<sep>", "<more>"])
    tokenizer.save_pretrained(tiny)
    with caplog.at_level(logging.WARNING):
        load(tiny)
    assert "knows 2 tokens without a row in the embedding of 858 ('<sep>', '<more>')" in caplog.text


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GPT2Tokenizer", "T5Tokenizer", "BertTokenizer", "Qwen2Tokenizer"])
def test_a_tokenizer_without_its_files_is_not_made_up(tiny: Path, kind: str) -> None:
    (tiny / "tokenizer.json").unlink()
    (tiny / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    assert "has no tokenizer that can be read" in refusal(tiny)


def test_a_fault_of_the_model_while_computing_is_one_sentence(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(LlamaForCausalLM, "forward", fail)
    text = refusal(llama_folder, quantization="int8")
    assert "fails with model.quantization = int8 (RuntimeError: no kernel)" in text
    assert "--set model.quantization=none" in text


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["GPU", "CPU", "Python"],
)
def test_memory_that_runs_out_is_one_sentence(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("fedtune.models.base.AutoModelForCausalLM.from_pretrained", fail)
    assert "memory does not hold" in refusal(llama_folder)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_nan_is_found_where_quantization_loses_it(
    tiny: Path, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's kernels quantize a NaN as if it were a number: the scales that show it on a CPU are clean."""
    from fedtune.models import check

    monkeypatch.setattr(check, "_values", lambda *_: iter(()))
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(tiny, lambda tensors: tensors[name].__setitem__((3, 5), float("nan")))
    assert f"{name} of {tiny} holds a value that is not finite" in refusal(tiny, quantization=quantization)
