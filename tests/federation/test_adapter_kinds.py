"""Whole runs with adapters on embeddings and stacked experts: forecast, ledger, files, evaluation, export, against PEFT."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.families import build
from transformers import AutoModelForCausalLM

from fedtune.budget.ledger import read_ledger
from fedtune.budget.plan import plan
from fedtune.config.load import load_config
from fedtune.config.schema import FedTuneConfig, ModelConfig
from fedtune.errors import ConfigError, FedTuneError
from fedtune.export.checkpoint import open_run
from fedtune.export.targets.merged import export_merged
from fedtune.federation.train import train
from fedtune.federation.workspace import workspace_of
from fedtune.models.adapter import AdapterError, attach_saved, read_adapter
from fedtune.models.base import load_base

IDS = torch.tensor([[3, 5, 7, 11, 13, 17, 19]])


def run_config(base: Path, *settings: str) -> FedTuneConfig:
    small = ["federation.rounds=2", "federation.clients=8", "federation.fraction=0.25", "training.max_steps=1"]
    small += [
        "training.batch_size=2",
        "training.learning_rate_max=0.01",
        f"model.base={base}",
        "model.quantization=none",
    ]
    small += ["checkpoint.save_every=1", "adapter.rank=4"]
    return load_config(challenge="tiny", settings=[*small, *settings]).config


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("qwen3_moe", tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("bases"))


def peft_logits(base: Path, folder: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        # PEFT asks transformers by a deprecated name, and advises on the experts' patterns.
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
        with torch.no_grad():
            logits: torch.Tensor = model.eval()(IDS).logits
    return logits


@pytest.mark.parametrize(
    ("family", "settings", "ends"),
    [
        ("moe", ("adapter.targets=all-linear",), {"experts.base_layer.lora_B.weight", "gate.lora_A.weight"}),
        (
            "llama",
            ("adapter.targets=['embed_tokens','q_proj']", "adapter.dropout=0"),
            {"embed_tokens.lora_embedding_A", "embed_tokens.lora_embedding_B"},
        ),
        ("moe", ("adapter.targets=['embed_tokens','gate_up_proj']", "strategy.name=rolora"), {"experts.lora_A.weight"}),
    ],
    ids=["experts", "embedding", "both"],
)
def test_a_run_is_what_was_forecast_and_peft_reads_it(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, settings: tuple[str, ...], ends: set[str]
) -> None:
    base = request.getfixturevalue(family)
    config = run_config(base, *settings)
    done = train(config, out=tmp_path / "runs")
    assert done.refused == 0
    sent = [entry for entry in read_ledger(done.run / "ledger.jsonl") if entry.kind == "train"]
    assert sum(entry.bytes for entry in sent) == plan(config).total_bytes
    saved = read_adapter(done.adapter)
    assert all(any(key.endswith(end) for key in saved.tensors) for end in ends)
    # Every matrix of both rounds has moved from where it started: A and B are trained.
    first = read_adapter(done.run / "peft_1").tensors
    assert sum(not torch.equal(first[key], tensor) for key, tensor in saved.tensors.items()) >= len(first) / 2

    adapted = workspace_of(config.model_dump_json()).adapted
    adapted.load(saved.tensors)
    with torch.no_grad():
        own = adapted.model(IDS).logits
    found = peft_logits(base, done.adapter)
    torch.testing.assert_close(own, found, rtol=0, atol=1e-5)

    again = load_base(ModelConfig(base=str(base), quantization="none"))
    with torch.no_grad():
        bare = again.model(IDS).logits
    evaluated = attach_saved(again, saved)
    evaluated.load(saved.tensors)
    with torch.no_grad():
        torch.testing.assert_close(again.model(IDS).logits, found, rtol=0, atol=1e-5)
    assert float((found - bare).abs().max()) > 1e-3

    export_merged(open_run(str(done.run)), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, found, rtol=0, atol=1e-4 * float(found.abs().max()))


def test_dropout_is_on_linear_layers_alone_and_said(moe: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = run_config(moe, "adapter.targets=all-linear", "adapter.dropout=0.5")
    (note,) = [note for note in plan(config).notes if "dropout" in note]
    assert "no dropout for the parameters of model.layers.0.mlp.experts" in note
    with caplog.at_level(logging.WARNING, logger="fedtune"):
        adapted = workspace_of(config.model_dump_json()).adapted
    assert any(note in record.getMessage() for record in caplog.records)
    assert adapted.resolved["lora_dropout"] == 0
    kinds = {
        type(module).__name__: type(module.lora_dropout["default"]).__name__
        for module in adapted.model.modules()
        if hasattr(module, "lora_dropout")
    }
    assert kinds == {"Linear": "Dropout", "ParamWrapper": "Identity"}


@pytest.mark.parametrize("strategy", ["flexlora", "flora", "fedex-lora"])
def test_products_of_embeddings_and_experts_are_refused_at_the_start(
    moe: Path, llama: Path, tmp_path: Path, strategy: str
) -> None:
    for base, targets in ((moe, "all-linear"), (llama, "['embed_tokens','q_proj']")):
        config = run_config(base, f"adapter.targets={targets}", f"strategy.name={strategy}")
        with pytest.raises(ConfigError, match=f"strategy.name: {strategy} averages the products"):
            plan(config)
        with pytest.raises(ConfigError, match=r"embed_tokens|experts"):
            train(config, out=tmp_path / strategy)
        run = next((tmp_path / strategy).iterdir())
        assert not (run / "metrics.jsonl").exists(), "nothing was trained"


def test_ffa_lora_freezes_the_random_factor_of_an_embedding(llama: Path, tmp_path: Path) -> None:
    config = run_config(llama, "adapter.targets=['embed_tokens','q_proj']", "strategy.name=ffa-lora")
    done = train(config, out=tmp_path)
    first, last = (read_adapter(done.run / name).tensors for name in ("peft_1", "peft_2"))
    moved = {key.rpartition("embed_tokens.")[2] for key in first if not torch.equal(first[key], last[key])}
    assert "lora_embedding_A" in moved
    assert "lora_embedding_B" not in moved


def test_dora_on_experts_is_refused(moe: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.dora: PEFT has no DoRA for experts"):
        plan(run_config(moe, "adapter.targets=all-linear", "adapter.dora=true"))


def test_half_of_fused_experts_is_refused(moe: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.targets: .*gate_proj without also targeting up_proj"):
        plan(run_config(moe, "adapter.targets=['q_proj','gate_proj']"))


def test_an_adapter_that_peft_does_not_read_back_is_not_called_saved(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it was: target_parameters is lost from the file, and PEFT drops the experts' tensors without a word."""
    from fedtune.models import adapter

    whole = adapter.config_table
    monkeypatch.setattr(adapter, "config_table", lambda config: {**whole(config), "target_parameters": None})
    with pytest.raises(AdapterError, match=r"PEFT does not read the adapter that was written as it is: .*experts"):
        train(run_config(moe, "adapter.targets=all-linear"), out=tmp_path)
    (run,) = tmp_path.iterdir()
    assert not list(run.glob("peft_*"))


def test_a_base_that_training_changes_stops_the_run(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.federation import client

    honest = client.train_locally

    def careless(adapted, *arguments, **options):  # type: ignore[no-untyped-def]
        result = honest(adapted, *arguments, **options)
        with torch.no_grad():
            adapted.base.model.model.norm.weight[3] += 2**-20
        return result

    monkeypatch.setattr(client, "train_locally", careless)
    with pytest.raises(FedTuneError, match=r"model\.norm\.weight is not what was loaded, after client \d trained"):
        train(run_config(llama), out=tmp_path)
    workspace_of.cache_clear()  # its base is spoilt


def test_saved_config_is_pefts_own(moe: Path, tmp_path: Path) -> None:
    config = run_config(moe, "adapter.targets=all-linear", "federation.rounds=1")
    done = train(config, out=tmp_path)
    table = json.loads((done.adapter / "adapter_config.json").read_text())
    assert table["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert table["target_parameters"] == ["down_proj", "gate.weight", "gate_up_proj"]
    # Gate and up projection are one parameter of twice the rank, at the same scale.
    assert table["rank_pattern"] == {".*\\.gate_up_proj": 8}
    assert table["alpha_pattern"] == {".*\\.gate_up_proj": 2 * config.adapter.alpha}
