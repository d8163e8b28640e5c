"""The adapter's folder: what is in it, what older PEFT can read, and what never leaves a run."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from small_runs import MIB, TOKEN, assert_clean, make_run, plant_canaries, result, small_llama, write_results
from transformers import AutoModelForCausalLM

from fedtune.config.load import load_config
from fedtune.config.schema import AdapterConfig
from fedtune.errors import MissingError, UsageError
from fedtune.export.checkpoint import open_run
from fedtune.export.files import adapter_config, ledger_summary
from fedtune.export.targets.folder import Folder, export_folder
from fedtune.runs.directory import file_sha256

_KEYS = (
    "peft_type auto_mapping base_model_name_or_path revision task_type inference_mode r target_modules lora_alpha "
    "lora_dropout fan_in_fan_out bias modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern "
    "alpha_pattern megatron_config megatron_core loftq_config use_rslora"
)
PEFT_0_7 = frozenset(_KEYS.split())
"""The keys of adapter_config.json that PEFT 0.7 knows; it stops at any other."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "tiny-1")


def test_whole_folder(run: Path, tmp_path: Path) -> None:
    write_results(run, [result(None, "tiny", 1, 4), result(run / "peft_2", "tiny", 3, 4)])
    done = export_folder(open_run(str(run)), tmp_path / "out", licence="mit", tokenizer=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *(
            "adapter_model.safetensors",
            "adapter_config.json",
            "README.md",
            "fedtune.json",
            "results.json",
            "ledger.json",
        ),
        *("manifest.json", "tokenizer.json", "tokenizer_config.json"),
    }
    assert done.sizes == {name: (tmp_path / "out" / name).stat().st_size for name in names}
    assert done.notes == ()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest == {name: file_sha256(tmp_path / "out" / name) for name in names - {"manifest.json"}}
    assert manifest["adapter_model.safetensors"] == file_sha256(run / "peft_2" / "adapter_model.safetensors")
    assert "tokenizer.json" not in Folder().package(open_run(str(run))).files


def test_the_adapter_loads_back_with_peft(tmp_path: Path) -> None:
    base = small_llama(tmp_path / "base")
    run = make_run(
        tmp_path / "run", base=str(base), adapter=AdapterConfig(rank=2, alpha=8, targets=("q_proj",), rslora=True)
    )
    export_folder(open_run(str(run)), tmp_path / "out")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out"))
    saved = load_file(run / "peft_2" / "adapter_model.safetensors")
    got = dict(model.named_parameters())
    for name, tensor in saved.items():
        assert torch.equal(got[name.replace(".weight", ".default.weight")], tensor)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 8 / 2**0.5
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"


def test_the_cards_code_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_folder(open_run(str(run)), tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    code = (tmp_path / "out" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        exec(code, names)
    saved = load_file(run / "peft_2" / "adapter_model.safetensors")
    name = next(iter(saved))
    assert torch.equal(dict(names["model"].named_parameters())[name.replace(".weight", ".default.weight")], saved[name])
    assert names["tokenizer"]("the").input_ids


def test_older_peft_knows_every_key(run: Path) -> None:
    """A plain adapter has no key that PEFT 0.7 lacks, no null and no default but the well-known ones."""
    whole = json.loads((run / "peft_2" / "adapter_config.json").read_text())
    assert whole.keys() - PEFT_0_7  # PEFT itself writes them
    assert None in whole.values()
    kept = adapter_config(open_run(str(run)))
    assert kept == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "builtin:tiny",
        "r": 2,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    assert kept.keys() <= PEFT_0_7
    lacking = {key: value for key, value in LoraConfig().to_dict().items() if key not in kept and value is not None}
    assert all(whole[key] == value for key, value in lacking.items() if key in whole and key != "peft_version")


@pytest.mark.parametrize(("setting", "key"), [("rslora", "use_rslora"), ("dora", "use_dora")])
def test_what_changes_the_adapter_is_kept(tmp_path: Path, setting: str, key: str) -> None:
    settings = AdapterConfig.model_validate({"rank": 2, "targets": ("q_proj",), setting: True})
    kept = adapter_config(open_run(str(make_run(tmp_path / "run", adapter=settings))))
    assert kept[key] is True


def test_ledger_summary(run: Path) -> None:
    """Round 1 has four messages of 1 MiB, round 2 four of 2 MiB; half of them to the clients, half for each client."""
    summary = ledger_summary(open_run(str(run)))
    assert summary["used_mib"] == summary["total"]["mib"] == 12
    assert summary["total"] == {"messages": 8, "bytes": 12 * MIB, "mib": 12, "serialised_bytes": 12 * MIB + 72}
    assert {number: each["mib"] for number, each in summary["rounds"].items()} == {"1": 4, "2": 8}
    assert {way: each["mib"] for way, each in summary["directions"].items()} == {"down": 6, "up": 6}
    assert {number: each["mib"] for number, each in summary["clients"].items()} == {"0": 6, "1": 6}
    assert summary["not_counted"] == {"messages": 1, "serialised_bytes": 100}
    assert ledger_summary(open_run(str(run), "1"))["total"]["messages"] == 4


def test_results_are_this_adapters_and_its_bases(run: Path) -> None:
    base, other = result(None, "tiny", 1, 4), result(run / "peft_1", "tiny", 2, 4)
    mine = result(run / "peft_2", "tiny", 3, 4, findings=["/home/someone/q.jsonl"], unparsed_outputs=[[TOKEN, 1]])
    mine["model"] = base["model"] = {"base": "/home/someone/llama", "quantization": "fp4"}
    write_results(run, [base, other, mine])
    found = json.loads(Folder().package(open_run(str(run))).text("results.json"))
    assert [(each["subject"], each["k"]) for each in found] == [("base", 1), ("peft_2", 3)]
    assert found[1]["model"]["base"] == "llama"
    assert found[1]["unparsed_outputs"] == [["[removed]", 1]]
    assert "someone" not in json.dumps(found)


def test_the_config_trains_again(run: Path, tmp_path: Path) -> None:
    export_folder(open_run(str(run)), tmp_path / "out")
    assert load_config(files=[tmp_path / "out" / "fedtune.json"]).config == open_run(str(run)).config


def test_canaries_stay(run: Path, tmp_path: Path) -> None:
    plant_canaries(run, tmp_path / "outside")
    export_folder(open_run(str(run)), tmp_path / "out", tokenizer=True)
    assert_clean(tmp_path / "out")
    assert "[removed]" in (tmp_path / "out" / "fedtune.json").read_text()


def test_links_in_the_adapters_place_are_refused(run: Path, tmp_path: Path) -> None:
    weights = run / "peft_2" / "adapter_model.safetensors"
    weights.rename(tmp_path / "weights.safetensors")
    weights.symlink_to(tmp_path / "weights.safetensors")
    with pytest.raises(UsageError, match="is a link or not a regular file"):
        export_folder(open_run(str(run)), tmp_path / "out")
    (run / "peft_2").rename(tmp_path / "peft_2")
    (run / "peft_2").symlink_to(tmp_path / "peft_2")
    with pytest.raises(UsageError, match="is a link"):
        open_run(str(run))
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_said_with_its_command(run: Path) -> None:
    finished = open_run(str(run))
    assert finished.notes == (
        f"peft_2 has no complete evaluation; run one: fedtune eval --bench tiny --peft {run / 'peft_2'} --base",
    )
    config = json.loads((run / "config.json").read_text())
    config["federation"]["rounds"] = 4
    (run / "config.json").write_text(json.dumps(config))
    said = open_run(str(run)).notes
    assert said[0] == f"The run has done 2 of 4 rounds; continue it: fedtune train --resume {run}"


def test_a_run_without_adapters(run: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="There is no run in") as caught:
        open_run(None, None, tmp_path / "none")
    assert caught.value.hint == "Start one: fedtune train --challenge tiny"
    for number in (1, 2):
        (run / f"peft_{number}").rename(tmp_path / f"peft_{number}")
    with pytest.raises(MissingError, match="has no adapter yet") as caught:
        open_run(str(run))
    assert caught.value.hint == f"Continue it: fedtune train --resume {run}"


@pytest.mark.parametrize(("name", "error"), [("peft_9", MissingError), ("nine", UsageError), ("peft_x", UsageError)])
def test_another_adapter_is_named(run: Path, name: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="peft_2"):
        open_run(str(run), name)
