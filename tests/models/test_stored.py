"""What a base's files say before weights are loaded: damaged files, shards that disagree, weights that are stored quantized."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedtune.config.schema import AdapterConfig, ModelConfig
from fedtune.errors import ConfigError, MissingError
from fedtune.models.base import check_files, load_base
from fedtune.models.shapes import adapter_shapes
from fedtune.models.stored import INDEX, WEIGHTS, read_headers

Change = Callable[[Path], object]


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "base"))


def load(folder: Path, **options: object) -> Any:
    return load_base(ModelConfig(base=str(folder), **{"quantization": "none", **options}))


def edit_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder: Path) -> None:
    """Write the weights as two shards and an index."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    halves = {1: names[: len(names) // 2], 2: names[len(names) // 2 :]}
    index = {}
    for number, half in halves.items():
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(half, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / WEIGHTS).unlink()


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    table = json.loads((folder / INDEX).read_text())
    change(table["weight_map"])
    (folder / INDEX).write_text(json.dumps(table))


def write(name: str, content: str | bytes) -> Change:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


DAMAGES: dict[str, Change] = {
    f"{name}: {content[:12]!r}": write(name, content)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    for content in ("", "{", "[1, 2]", "null", '"text"', b"\xff\xfe\x00", "[" * 100_000)
} | {
    "layers are a word": lambda folder: edit_config(folder, num_hidden_layers="two"),
    "no heads": lambda folder: edit_config(folder, num_attention_heads=0),
    "width is a list": lambda folder: edit_config(folder, hidden_size=[32]),
    "width does not divide": lambda folder: edit_config(folder, num_attention_heads=5),
    "no such activation": lambda folder: edit_config(folder, hidden_act="nothing"),
    "vocabulary is null": lambda folder: edit_config(folder, vocab_size=None),
    "auto_map is a number": lambda folder: edit_config(folder, auto_map=5),
    "eos is a word": lambda folder: edit_config(folder, eos_token_id="end"),
    "tokenizer without words": write(
        "tokenizer.json", '{"model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}}'
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_table_is_one_sentence(folder: Path, damage: Change) -> None:
    damage(folder)
    with pytest.raises(MissingError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    assert caught.value.hint


ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
WRONG_KEYS: dict[str, tuple[dict[str, object], str]] = {
    "activation": ({"hidden_act": "nothing"}, 'hidden_act = "nothing"'),
    "rope type": ({"rope_parameters": ROPE | {"rope_type": "nothing"}}, 'rope_parameters.rope_type = "nothing"'),
    "old rope type": ({"rope_parameters": None, "rope_scaling": {"type": "nothing"}}, 'rope_scaling.type = "nothing"'),
    "rope base": ({"rope_parameters": ROPE | {"rope_theta": 0}}, "rope_theta = 0, which must be above 0"),
    "padding": ({"pad_token_id": 5000}, "pad_token_id = 5000"),
    "labels": ({"id2label": {"first": "a"}}, 'id2label.first = "a"'),
    "labels are a list": ({"id2label": [1]}, "id2label = [1]"),
    "number format": ({"dtype": "float99"}, 'dtype = "float99"'),
    "word for a number": ({"num_hidden_layers": "two"}, "expected int, got str (value: 'two')"),
    "heads": ({"num_attention_heads": 5}, "num_attention_heads = 5"),
    "heads and width": ({"head_dim": None, "num_attention_heads": 12}, "num_attention_heads = 12 or hidden_size = 32"),
    "rotary width": ({"head_dim": 7}, "requires an even rotary dimension"),
    "layer types": ({"layer_types": ["nothing", "nothing"]}, 'layer_types = ["nothing", "nothing"]'),
    "attention": ({"attn_implementation": "nothing"}, 'attn_implementation = "nothing"'),
    "positions": ({"max_position_embeddings": 0}, "max_position_embeddings = 0, which must be above 0"),
    "negative positions": ({"max_position_embeddings": -1}, "max_position_embeddings = -1, which must be above 0"),
    "vocabulary": ({"vocab_size": 0}, "vocab_size = 0, which must be above 0"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers = 0, which must be above 0"),
    "layers without end": ({"num_hidden_layers": 10**400}, "num_hidden_layers = 1000000"),
    "width without end": ({"hidden_size": 10**400}, "which must be at most"),
    "empty quantization": ({"quantization_config": {}}, "quantization_config = {}, which names no quantization"),
    "no quantization": ({"quantization_config": False}, "quantization_config = false, which names no quantization"),
    "empty compression": ({"compression_config": {}}, "compression_config = {}, which names no quantization"),
    "two at once": ({"hidden_act": "nothing", "pad_token_id": 5000}, "pad_token_id = 5000"),
}


@pytest.mark.parametrize(("values", "words"), WRONG_KEYS.values(), ids=WRONG_KEYS)
def test_a_wrong_key_of_the_config_is_named_in_load_and_plan(
    folder: Path, values: dict[str, object], words: str
) -> None:
    edit_config(folder, **values)
    for refusing in (
        lambda: load(folder),
        lambda: adapter_shapes(ModelConfig(base=str(folder), quantization="none"), AdapterConfig(), None),
    ):
        with pytest.raises(MissingError) as caught:
            refusing()
        text = str(caught.value)
        assert words in text
        assert "\n" not in text
        assert re.search(r"(Correct|Remove) \w+.* (in|from) config\.json", caught.value.hint)


OTHER_FILES: dict[str, tuple[str, dict[str, object], str]] = {
    "new tokens": ("generation_config.json", {"max_new_tokens": -1}, "max_new_tokens = -1"),
    "cache": ("generation_config.json", {"cache_implementation": "none"}, 'cache_implementation = "none"'),
    "padding": ("generation_config.json", {"pad_token_id": "x"}, 'pad_token_id = "x"'),
    "class": ("tokenizer_config.json", {"tokenizer_class": 5}, "tokenizer_class = 5"),
    "side": ("tokenizer_config.json", {"padding_side": "up"}, 'padding_side = "up"'),
    "token": ("tokenizer_config.json", {"eos_token": 5}, "eos_token = 5"),
    "id": ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder.x = {"),
    "special": ("special_tokens_map.json", {"eos_token": [1]}, "eos_token = [1]"),
    "added": ("added_tokens.json", {"a": "b"}, 'a = "b"'),
}


@pytest.mark.parametrize(("name", "values", "words"), OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_wrong_key_of_another_table_is_named_with_its_file(
    folder: Path, name: str, values: dict[str, object], words: str
) -> None:
    file = folder / name
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    table = json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | values)
    file.write_text(table)
    with pytest.raises(MissingError) as caught:
        load(folder)
    assert f"because of {words}" in str(caught.value)
    assert f" in its {name} (" in caught.value.message
    assert re.match(rf"Correct \S+ in {re.escape(name)}, or", caught.value.hint)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after == {**before, name: table.encode()}


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_an_attention_that_is_not_installed_is_named(folder: Path) -> None:
    edit_config(folder, attn_implementation="flash_attention_2")
    with pytest.raises(MissingError, match='attn_implementation = "flash_attention_2" in its') as caught:
        load(folder)
    assert caught.value.hint.startswith("Remove attn_implementation from config.json, install what it needs, or ")


def test_a_config_that_asks_for_tuples_loads(folder: Path, llama_folder: Path, ids: torch.Tensor) -> None:
    edit_config(folder, return_dict=False)
    torch.testing.assert_close(load(folder).model(ids).logits, load(llama_folder).model(ids).logits, rtol=0, atol=0)


def test_what_fails_for_another_reason_blames_no_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("nothing")

    monkeypatch.setattr("fedtune.models.base.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(MissingError, match=r"cannot be loaded \(KeyError: 'nothing'\)\. Check its config"):
        load(folder)


@pytest.mark.parametrize(
    "damage", [d for n, d in DAMAGES.items() if n.startswith(("config.json", "layers", "width", "no "))]
)
def test_a_plan_refuses_a_damaged_config_too(folder: Path, damage: Change) -> None:
    damage(folder)
    with pytest.raises(MissingError):
        adapter_shapes(ModelConfig(base=str(folder)), AdapterConfig(), None)


@pytest.mark.parametrize(
    ("kind", "words"), [("no-such-type", "knows no model of type"), (7, "knows no model of type 7")]
)
def test_a_type_that_nobody_knows(folder: Path, kind: object, words: str) -> None:
    edit_config(folder, model_type=kind)
    with pytest.raises(ConfigError, match=words):
        load(folder)


SHARD_DAMAGES: dict[str, tuple[Change, str]] = {
    "not JSON": (write(INDEX, "{"), "it is not JSON"),
    "a list": (write(INDEX, "[]"), "holds a JSON list"),
    "no map": (write(INDEX, '{"metadata": {}}'), "no weight_map"),
    "no metadata": (
        lambda f: (f / INDEX).write_text(json.dumps({"weight_map": json.loads((f / INDEX).read_text())["weight_map"]})),
        f"{INDEX} .* no object under the key metadata, .*Add",
    ),
    "metadata is null": (
        lambda f: (f / INDEX).write_text(json.dumps(json.loads((f / INDEX).read_text()) | {"metadata": None})),
        f"{INDEX} .* no object under the key metadata",
    ),
    "a path": (lambda f: edit_index(f, lambda m: m.update(x="../other.safetensors")), "names '../other.safetensors'"),
    "a pickle": (lambda f: edit_index(f, lambda m: m.update(x="weights.bin")), r"names 'weights\.bin'"),
    "shard gone": (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "lacks 1 of its weight files"),
    "empty shard": (write("model-00002-of-00002.safetensors", b""), "truncated"),
    "no header": (write("model-00002-of-00002.safetensors", b"\xff" * 100), "truncated"),
    "unnamed tensor": (
        lambda f: edit_index(f, lambda m: m.pop("lm_head.weight")),
        "lm_head.weight, which the index does not",
    ),
    "tensor gone": (
        lambda f: edit_index(f, lambda m: m.update(y=m["lm_head.weight"])),
        "names y, which its shard does not",
    ),
    "unnamed shard": (
        lambda f: shutil.copy(f / "model-00001-of-00002.safetensors", f / "model-00003-of-00003.safetensors"),
        "does not name model-00003",
    ),
}


@pytest.mark.parametrize(("damage", "words"), SHARD_DAMAGES.values(), ids=SHARD_DAMAGES)
def test_index_and_shards_must_agree(folder: Path, damage: Change, words: str) -> None:
    shard(folder)
    damage(folder)
    with pytest.raises(MissingError, match=words) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_shards_load_as_the_single_file_does(folder: Path, llama_folder: Path, ids: torch.Tensor) -> None:
    shard(folder)
    assert set(read_headers(folder, "base")) == set(read_headers(llama_folder, "base"))
    torch.testing.assert_close(load(folder).model(ids).logits, load(llama_folder).model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_weight_file_is_named(folder: Path, size: int) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(MissingError, match=r"cannot be read: model\.safetensors"):
        load(folder)


def test_the_config_cannot_name_other_weights_or_code(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "other.safetensors")
    edit_config(folder, transformers_weights="other.safetensors")
    with pytest.raises(ConfigError, match=r"names other weights, 'other\.safetensors'"):
        load(folder)
    edit_config(folder, transformers_weights=None, attn_implementation="somebody/kernel")
    with pytest.raises(ConfigError, match="code of another repository"):
        load(folder)


def stored(folder: Path, out: Path, kind: str, **options: object) -> Path:
    """Save a base as bitsandbytes stores it."""
    asked = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.bfloat16, **options
        )
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked, device_map={"": "cpu"})
    model.save_pretrained(out)
    for path in folder.glob("token*"):
        shutil.copy(path, out)
    return out


@pytest.mark.parametrize(
    ("kind", "options"), [("nf4", {}), ("nf4", {"bnb_4bit_use_double_quant": True}), ("fp4", {}), ("int8", {})]
)
def test_a_base_that_is_stored_as_asked_gives_what_quantizing_gives(
    llama_folder: Path, tmp_path: Path, ids: torch.Tensor, kind: str, options: dict[str, object], recwarn: Any
) -> None:
    out = stored(llama_folder, tmp_path / "stored", kind, **options)
    for switch in ["off"] if kind == "int8" else ["off", "on"]:
        base = load(out, quantization=kind, dequantize=switch)
        assert base.stored_quantized
        assert base.dequantized is (switch == "on")
        plain = load(llama_folder, quantization=kind, dequantize=switch)
        assert not plain.stored_quantized
        if kind != "int8" and switch == "off":
            assert base.model.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
        got, wanted = base.model(ids).logits, plain.model(ids).logits
        # Nested scales are rounded; all else is the same bits.
        torch.testing.assert_close(got, wanted, rtol=0, atol=0.05 * float(wanted.abs().max()) if options else 0)
    assert not [warning for warning in recwarn if "quantization_config" in str(warning.message)]


@pytest.mark.parametrize(
    ("kind", "asked"), [("nf4", "none"), ("nf4", "fp4"), ("nf4", "int8"), ("int8", "none"), ("int8", "nf4")]
)
def test_a_base_that_is_stored_otherwise_is_refused_with_both_named(
    llama_folder: Path, tmp_path: Path, kind: str, asked: str
) -> None:
    out = stored(llama_folder, tmp_path / "stored", kind)
    with pytest.raises(ConfigError) as caught:
        load(out, quantization=asked)
    assert caught.value.exit_code == 2
    text = str(caught.value)
    assert f"stored as bitsandbytes {kind}, and {asked} is asked for: --set model.quantization={kind}" in text
    with pytest.raises(ConfigError):
        adapter_shapes(ModelConfig(base=str(out), quantization=asked), AdapterConfig(), None)
    check_files(ModelConfig(base=str(out), quantization=asked), out)  # a node does not know yet what is asked for


PUBLISHED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemm"},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "mxfp4": {"quant_method": "mxfp4"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "hqq": {"quant_method": "hqq"},
    "unnamed": {"bits": 4},
}


@pytest.mark.parametrize("method", PUBLISHED)
@pytest.mark.parametrize("asked", ["none", "nf4", "int8"])
def test_other_stored_forms_are_refused_before_weights_are_read(folder: Path, method: str, asked: str) -> None:
    edit_config(folder, quantization_config=PUBLISHED[method])
    (folder / WEIGHTS).write_bytes(b"not read")
    with pytest.raises(ConfigError) as caught:
        load(folder, quantization=asked)
    assert f"stored as {'an unnamed' if method == 'unnamed' else method}" in str(caught.value)
    assert f"{asked} is asked for" in str(caught.value)


def test_other_storage_of_bitsandbytes_is_refused(folder: Path) -> None:
    table = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}
    edit_config(folder, quantization_config=table)
    with pytest.raises(ConfigError, match="stored as bitsandbytes fp4 in bfloat16"):
        load(folder, quantization="fp4")


NAME = "model.layers.0.mlp.up_proj.weight"
UNDECLARED: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "int8": lambda t: t.update({NAME: (t[NAME] * 100).to(torch.int8)}),
    "uint8": lambda t: t.update({NAME: torch.zeros(1024, 1, dtype=torch.uint8)}),
    "float8": lambda t: t.update({NAME: t[NAME].to(torch.float8_e4m3fn)}),
    "int32": lambda t: t.update({NAME.replace("weight", "qweight"): torch.zeros(4, 64, dtype=torch.int32)}),
    "scales": lambda t: t.update({NAME + "_scale_inv": torch.ones(1, 1)}),
    "absmax": lambda t: t.update({NAME + ".absmax": torch.ones(32)}),
    "SCB": lambda t: t.update({NAME.replace("weight", "SCB"): torch.ones(64)}),
}


@pytest.mark.parametrize("change", UNDECLARED.values(), ids=UNDECLARED)
@pytest.mark.parametrize("asked", ["none", "nf4"])
def test_quantized_weights_that_the_config_does_not_declare(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], asked: str
) -> None:
    edit_weights(folder, change)
    with pytest.raises(ConfigError, match=rf"stores quantized weights, such as .*up_proj.*, and {asked} is asked for"):
        load(folder, quantization=asked)


def test_declared_but_plain_weights(folder: Path) -> None:
    table = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit_config(folder, quantization_config=table)
    with pytest.raises(MissingError, match="stored as nf4; its files hold no quantized weights"):
        load(folder, quantization="nf4")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_full_precision_loads(folder: Path, dtype: torch.dtype, ids: torch.Tensor, caplog: Any) -> None:
    wanted = load(folder).model(ids).logits
    edit_weights(folder, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    with caplog.at_level(logging.WARNING):
        base = load(folder)
    assert base.model.dtype == torch.float32
    torch.testing.assert_close(base.model(ids).logits, wanted, rtol=0, atol=0.1 * float(wanted.abs().max()))
    assert not [r for r in caplog.records if r.name.startswith("fedtune")]
