"""Merged weights against PEFT's own merge and against the adapter model's logits; what cannot be merged is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_runs import TOKEN, assert_clean, make_run, plant_canaries, result, small_gpt2, small_llama, write_results
from support.families import build
from transformers import AutoModelForCausalLM

from fedtune.config.schema import AdapterConfig
from fedtune.errors import FedTuneError, MissingError, UsageError
from fedtune.export import merge, merge_check
from fedtune.export.checkpoint import RunCheckpoint, open_run
from fedtune.export.merge import Update, merged_tensor
from fedtune.export.merge_check import compare
from fedtune.export.targets.merged import Merged, export_merged
from fedtune.runs.directory import file_sha256

ATTENTION = ("q_proj", "o_proj")


def adapter(targets: tuple[str, ...] = ATTENTION, **more: object) -> AdapterConfig:
    return AdapterConfig.model_validate({"rank": 4, "alpha": 6, "dropout": 0.0, "targets": targets, **more})


def opened(tmp_path: Path, base: Path, settings: AdapterConfig) -> RunCheckpoint:
    return open_run(str(make_run(tmp_path / "run", base=str(base), adapter=settings, kept=(2,))))


def by_peft(finished: RunCheckpoint, base: Path) -> dict[str, torch.Tensor]:
    """Merge with PEFT itself."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    with warnings.catch_warnings():
        # PEFT asks transformers by a deprecated name, and warns of what it sets right itself.
        warnings.simplefilter("ignore")
        merged_model = PeftModel.from_pretrained(model, str(finished.adapter)).merge_and_unload()
    return dict(merged_model.state_dict())


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every export here is held to less than a user's."""
    monkeypatch.setattr(merge_check, "TOLERANCE", {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2})


def test_one_weight_by_hand() -> None:
    """W + s·B·A, and the same with DoRA's norm, on numbers that fit a line."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    plain = Update(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0]]), 2.0, False, None)
    assert merged_tensor(weight, plain).tolist() == [[3.0, 4.0], [0.0, 2.0]]
    # ‖(3, 4)‖ = 5, ‖(0, 2)‖ = 2
    dora = Update(plain.lora_a, plain.lora_b, 2.0, False, torch.tensor([10.0, 1.0]))
    assert merged_tensor(weight, dora).tolist() == [[6.0, 8.0], [0.0, 1.0]]
    conv = Update(plain.lora_a, plain.lora_b, 2.0, True, None)
    assert merged_tensor(weight.T.contiguous(), conv).T.tolist() == [[3.0, 4.0], [0.0, 2.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        adapter(),
        adapter(rslora=True),
        adapter(dora=True),
        adapter(("gate_proj", "down_proj"), modules_to_save=("lm_head",)),
    ],
    ids=["lora", "rslora", "dora", "saved"],
)
def test_llama_as_peft_merges_it(tmp_path: Path, settings: AdapterConfig, dtype: torch.dtype) -> None:
    """Base of several files, result of several others."""
    base = small_llama(tmp_path / "base", dtype, shard="20KB")
    assert len(list(base.glob("*.safetensors"))) >= 2
    finished = opened(tmp_path, base, settings)
    done = export_merged(finished, tmp_path / "out", shard_bytes=15_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    got = {}
    for file in sorted((tmp_path / "out").glob("model-*.safetensors")):
        tensors = load_file(file)
        got |= tensors
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 15_000
        assert all(index[name] == file.name for name in tensors)
    wanted = by_peft(finished, base)
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, wanted[name].to(dtype)), name
    assert "Checked against base and adapter on 3 prompts" in done.notes[0]


@pytest.mark.parametrize("prefix", ["transformer.", ""], ids=["prefix", "bare"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_gpt2_stores_its_weights_the_other_way_round(tmp_path: Path, dora: bool, prefix: str) -> None:
    """Square Conv1D weights as well, where the shape does not tell; files on the hub leave out the model's prefix."""
    base = small_gpt2(tmp_path / "base")
    weights = {key.replace("transformer.", prefix): t for key, t in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    finished = opened(tmp_path, base, adapter(("c_attn", "c_proj"), dora=dora))
    export_merged(finished, tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == weights.keys()
    wanted = by_peft(finished, base)
    for name, tensor in got.items():
        full = name if name.startswith("transformer.") else f"transformer.{name}"
        torch.testing.assert_close(tensor, wanted[full], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        adapter(("q_proj", "lm_head")),
        adapter(modules_to_save=("lm_head",)),
        adapter(modules_to_save=("embed_tokens",)),
        adapter(modules_to_save=("lm_head", "embed_tokens")),
    ],
    ids=["target", "head", "embedding", "both"],
)
def test_tied_embeddings_part_where_the_adapter_parts_them(tmp_path: Path, settings: AdapterConfig) -> None:
    base = small_llama(tmp_path / "base", tied=True)
    finished = opened(tmp_path, base, settings)
    export_merged(finished, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert config["tie_word_embeddings"] is False
    assert not torch.equal(got["lm_head.weight"], got["model.embed_tokens.weight"])


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    base = small_llama(tmp_path / "base", tied=True)
    export_merged(opened(tmp_path, base, adapter()), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("settings", [adapter(), adapter(("embed_tokens",)), adapter(modules_to_save=("lm_head",))])
def test_a_head_that_the_base_stores_beside_the_embedding_is_kept(tmp_path: Path, settings: AdapterConfig) -> None:
    """config.json says that the two are tied, and the files hold two: transformers takes the files' word, and so do we."""
    base = small_llama(tmp_path / "base", tied=True)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    finished = opened(tmp_path, base, settings)
    export_merged(finished, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    got, wanted = load_file(tmp_path / "out" / "model.safetensors"), by_peft(finished, base)
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-6)


def test_the_same_head_stored_twice_stays_tied(tmp_path: Path) -> None:
    base = small_llama(tmp_path / "base", tied=True)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    export_merged(opened(tmp_path, base, adapter()), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.fixture
def finished(tmp_path: Path) -> RunCheckpoint:
    return opened(tmp_path, small_llama(tmp_path / "base"), adapter())


def test_files(finished: RunCheckpoint, tmp_path: Path) -> None:
    """A model's folder with its card, its run, and a sha256 for each; planned as written."""
    write_results(finished.run.path, [result(finished.adapter, "tiny", 1, 2)])
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/someone/base"}))
    (tmp_path / "base" / "LICENSE").write_text("Anyone may use it.")
    done = export_merged(finished, tmp_path / "out", licence="mit")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    wanted = "README.md config.json fedtune.json generation_config.json ledger.json manifest.json model.safetensors"
    assert names == {*wanted.split(), "results.json", "tokenizer.json", "tokenizer_config.json", "LICENSE"}
    assert done.sizes.keys() == Merged().plan(finished).sizes.keys() == names
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest == {name: file_sha256(tmp_path / "out" / name) for name in names - {"manifest.json"}}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "model-index" not in card
    assert "- The merged model: the scores above are of the adapter" in card
    assert "_name_or_path" not in (tmp_path / "out" / "config.json").read_text()
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").glob("*.safetensors")} == {0o644}
    export_merged(finished, tmp_path / "out")  # what an export wrote is replaced
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="already holds other files"):
        export_merged(finished, tmp_path / "out")


def test_the_comparison_sees_the_adapter(finished: RunCheckpoint, tmp_path: Path) -> None:
    """The adapter moves the logits by far more than what is allowed, so that the check can tell."""
    export_merged(finished, tmp_path / "out")
    found = compare(finished, tmp_path / "out")
    assert found.difference < 1e-5
    assert found.effect > 0.05
    assert compare(finished, tmp_path / "base").difference == found.effect


def test_a_wrong_merge_is_refused(finished: RunCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge that leaves the adapter out does not pass, and leaves nothing behind."""
    monkeypatch.setattr(merge, "merged_tensor", lambda weight, update: weight)
    with pytest.raises(FedTuneError, match="does not give the logits of base and adapter"):
        export_merged(finished, tmp_path / "exports" / "out")
    assert list((tmp_path / "exports").iterdir()) == []


def test_short_memory_is_said(finished: RunCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_check, "free_memory_bytes", lambda device: 1000)
    note = export_merged(finished, tmp_path / "out").notes[0]
    assert note.startswith("Not checked: comparing the logits takes ")
    assert "1000 B are free" in note


def test_what_a_dtype_cannot_hold(tmp_path: Path) -> None:
    """float16 ends at 65504."""
    finished = opened(tmp_path, small_llama(tmp_path / "base", torch.float16), adapter(alpha=10**9))
    with pytest.raises(FedTuneError, match=r"_proj\.weight holds a value that torch\.float16 cannot represent"):
        export_merged(finished, tmp_path / "out")


def test_a_quantized_base_is_refused(finished: RunCheckpoint, tmp_path: Path) -> None:
    file = tmp_path / "base" / "config.json"
    table = {
        **json.loads(file.read_text()),
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    }
    file.write_text(json.dumps(table))
    with pytest.raises(MissingError, match="stored quantized"):
        export_merged(finished, tmp_path / "out")


def test_another_base_is_refused(finished: RunCheckpoint, tmp_path: Path) -> None:
    weights = load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file(
        {**weights, name: torch.zeros(16, 16)}, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(MissingError, match=r"does not fit model\.layers\.1\.self_attn\.q_proj\.weight \(16, 16\)"):
        export_merged(finished, tmp_path / "out")
    del weights[name]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingError, match=f"hold no {name}"):
        export_merged(finished, tmp_path / "out")
    tensors = load_file(finished.adapter / "adapter_model.safetensors")
    save_file({**tensors, "stray": torch.zeros(1)}, finished.adapter / "adapter_model.safetensors")
    save_file(
        {**weights, name: torch.zeros(32, 32)}, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(MissingError, match="no module for stray"):
        export_merged(open_run(str(finished.run.path)), tmp_path / "out")


def test_canaries_stay(finished: RunCheckpoint, tmp_path: Path) -> None:
    plant_canaries(finished.run.path, tmp_path / "outside")
    for name in (".env", "id_rsa", "notes.txt"):
        (tmp_path / "base" / name).write_text("canary TOKEN=" + TOKEN)
    export_merged(open_run(str(finished.run.path)), tmp_path / "out")
    assert_clean(tmp_path / "out")
    (tmp_path / "base" / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (tmp_path / "base" / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UsageError, match="is a link to a file outside its folder"):
        export_merged(open_run(str(finished.run.path)), tmp_path / "other")


def test_the_hubs_cache_holds_links(finished: RunCheckpoint, tmp_path: Path) -> None:
    """Its snapshots link to contents beside them: these are the base's own files."""
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate((tmp_path / "base").iterdir()):
        path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs", str(number)))
    table = json.loads((finished.run.path / "config.json").read_text())
    table["model"]["base"] = str(snapshot)
    (finished.run.path / "config.json").write_text(json.dumps(table))
    export_merged(open_run(str(finished.run.path)), tmp_path / "out")
    assert_clean(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


_MAKE = """
import sys
from pathlib import Path
import torch
from small_runs import make_run, small_llama
from fedtune.config.schema import AdapterConfig

folder = Path(sys.argv[1])
base = small_llama(folder / "base", torch.bfloat16, shard="200MB", hidden_size=2048, intermediate_size=4096,
                   num_hidden_layers=6, num_attention_heads=16, num_key_value_heads=16)
make_run(folder / "run", base=str(base), adapter=AdapterConfig(rank=4, targets=("q_proj", "down_proj")), kept=(2,))
"""
_MERGE = """
import sys
from pathlib import Path
from fedtune.export import merge, merge_check
from fedtune.export.checkpoint import open_run
from fedtune.export.targets.merged import export_merged

folder = Path(sys.argv[1])
merge_check.free_memory_bytes = lambda device: 0  # the comparison holds a whole model, and says so

def held():  # the process's own memory, without files that are mapped into it
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024

finished = open_run(str(folder / "run"))
merge.plan_merge(finished)
before, seen = held(), [0]
listen = lambda done, total: seen.append(held())
done = export_merged(finished, folder / "out", shard_bytes=32_000_000, listener=listen)
assert done.notes[0].startswith("Not checked")
print(sum(done.sizes.values()), max(seen) - before)
"""


@pytest.mark.slow
def test_memory_stays_near_one_shard(tmp_path: Path) -> None:
    """A base of 500 MB, shards of 32 MB: the peak is a fraction of the base, whatever the base's size."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    for script in (_MAKE, _MERGE):
        words = [sys.executable, "-c", script, str(tmp_path)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    written, more = map(int, done.stdout.split())
    assert written > 500_000_000
    assert more < 150_000_000


FEATURES: dict[str, dict[str, object]] = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding with DoRA": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "ranks": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "exclude_modules": {"target_modules": ".*_proj", "exclude_modules": ".*layers\\.0.*"},
    "layers_to_transform": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["up_proj.weight"]},
    "mica": {"target_modules": ["q_proj"], "init_lora_weights": "mica"},
    "experts": {"target_modules": "all-linear"},
    "one expert matrix": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
}


def by_plain_peft(tmp_path: Path, family: str, **settings: object) -> tuple[RunCheckpoint, torch.Tensor]:
    """A run whose adapter plain PEFT has made, and the logits that PEFT gives with it."""
    base = build(family, tmp_path)
    run = make_run(tmp_path / "run", base=str(base), kept=(2,))
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **settings))  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
            logits: torch.Tensor = adapted.eval()(IDS).logits
        adapted.save_pretrained(str(run / "peft_2"))
    return open_run(str(run)), logits


IDS = torch.tensor([[3, 5, 7, 11, 13, 17, 19]])


@pytest.mark.parametrize("feature", FEATURES)
def test_adapters_of_plain_peft_are_merged_right(tmp_path: Path, feature: str) -> None:
    family = "qwen3_moe" if "expert" in feature else "qwen2" if feature == "biases" else "llama"
    finished, wanted = by_plain_peft(tmp_path, family, **FEATURES[feature])
    export_merged(finished, tmp_path / "out")
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_experts_of_other_layouts(tmp_path: Path, family: str) -> None:
    """GPT-OSS stores (experts, in, out) as the model has it; Mixtral's files hold every expert apart, under older names."""
    finished, wanted = by_plain_peft(
        tmp_path, family, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    export_merged(finished, tmp_path / "out")
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys()
        == load_file(tmp_path / family / "model.safetensors").keys()
    )
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"trainable_token_indices": [3, 5]}, "trainable_token_indices"), ({"lora_bias": True}, "lora_bias")],
    ids=lambda value: str(value),
)
def test_what_is_not_merged_is_refused_by_name(tmp_path: Path, settings: dict[str, object], name: str) -> None:
    finished, _ = by_plain_peft(tmp_path, "llama", target_modules=["q_proj"], **settings)
    with pytest.raises(MissingError, match=f"{name}.*--to folder"):
        export_merged(finished, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config_end", "generation_end", "wanted_config", "wanted_generation"),
    [
        (2, 2, [1, 2], [1, 2]),
        (1, 1, 1, 1),
        ([2, 1], [2], [2, 1], [1, 2]),
        (2, None, [1, 2], 1),
        (999_999, [3, 999_999], 1, [1, 3]),
    ],
)
def test_a_merged_model_stops_at_the_end_of_text_that_it_learnt(
    tmp_path: Path, config_end: object, generation_end: object, wanted_config: object, wanted_generation: object
) -> None:
    """The tokenizer's end of text, id 1 here, is what training teaches."""
    base = small_llama(tmp_path / "base")
    ends = {"config.json": config_end, "generation_config.json": generation_end}
    for name, end in ends.items():
        table = json.loads((base / name).read_text()) | {"eos_token_id": end}
        (base / name).write_text(json.dumps(table))
    finished = opened(tmp_path, base, adapter())
    export_merged(finished, tmp_path / "out")
    found = {name: json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] for name in ends}
    assert found == {"config.json": wanted_config, "generation_config.json": wanted_generation}
    if config_end == generation_end == 1:
        assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
