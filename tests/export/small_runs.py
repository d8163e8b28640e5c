"""Runs as `fedtune train` leaves them, made in a moment: a config, adapters, a ledger, results; and small base models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedtune.config.schema import AdapterConfig, FederationConfig, FedTuneConfig, ModelConfig
from fedtune.models.adapter import attach, write_adapter
from fedtune.models.base import load_base
from fedtune.runs.directory import file_sha256

torch.set_num_threads(1)  # small tensors; more threads only wait for each other

MIB = 2**20
TOKEN = "hf_" + "Abcdefghij0123456789" + "xyz"
"""Looks like a token of the hub."""


def make_run(
    folder: Path,
    *,
    base: str = "builtin:tiny",
    adapter: AdapterConfig | None = None,
    kept: Sequence[int] = (1, 2),
    **values: Any,
) -> Path:
    """Make a finished run of two rounds and two clients; every message has 1 MiB in round 1, 2 MiB in round 2.

    Args:
        folder: The run directory.
        base: `model.base`.
        adapter: The adapter's settings; its values are random, those of `peft_1` other than those of `peft_2`.
        kept: Rounds whose adapters are kept.
        values: More of the config's top level.
    """
    adapter = adapter or AdapterConfig(rank=2, alpha=8, dropout=0.0, targets=("q_proj", "v_proj"))
    config = FedTuneConfig.model_validate(
        {
            "challenge": "tiny",
            "model": ModelConfig(base=base, quantization="none"),
            "adapter": adapter,
            "data": {"source": "builtin:tiny"},
            "federation": FederationConfig(clients=2, fraction=1.0, rounds=2),
            **values,
        }
    )
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.model_dump_json())
    (folder / "run.json").write_text(json.dumps({"versions": {"fedtune": "0.1.0"}}))
    (folder / "state" / "round-0002").mkdir(parents=True)
    (folder / "state" / "round-0002" / "manifest.json").write_text("{}")
    adapted = attach(load_base(config.model), adapter)
    for number in kept:
        generator = torch.Generator().manual_seed(number)
        tensors = {
            key: start + 0.1 * torch.randn(start.shape, generator=generator) for key, start in adapted.tensors().items()
        }
        write_adapter(
            folder / f"peft_{number}",
            tensors,
            adapter,
            base_name=base,
            revision=None,
            resolved=adapted.resolved,
        )
    lines = [
        {
            "round": 0,
            "node": 0,
            "direction": "down",
            "kind": "query",
            "bytes": 0,
            "serialised_bytes": 100,
            "status": "ok",
        }
    ]
    for number in (1, 2):
        for node in (0, 1):
            for direction in ("down", "up"):
                message = {"round": number, "node": node, "direction": direction, "kind": "train", "status": "ok"}
                lines.append({**message, "bytes": number * MIB, "serialised_bytes": number * MIB + 9})
    (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def result(adapter: Path | None, bench: str, k: int, n: int, **more: Any) -> dict[str, Any]:
    """Return a result as results.json holds it; without an adapter the base's."""
    return {
        "subject": adapter.name if adapter else "base",
        "label": adapter.name if adapter else "base",
        "bench": bench,
        "protocol": "flowertune",
        "mode": "official",
        "accuracy": k / n,
        "n": n,
        "k": k,
        "interval_95": [0.25, 0.5],
        "unparsed": n // 10,
        "partial": None,
        "comparable": True,
        "findings": [],
        "batch_size": 16,
        "prompts_sha256": "0" * 64,
        "model": {"base": "builtin:tiny", "quantization": "fp4"},
        "adapter_sha256": file_sha256(adapter / "adapter_model.safetensors") if adapter else None,
        "questions_from": "/home/someone/questions",
        **more,
    }


def write_results(run: Path, records: Sequence[Mapping[str, Any]]) -> None:
    (run / "benchmarks").mkdir(exist_ok=True)
    (run / "benchmarks" / "results.json").write_text(json.dumps(records))


def small_llama(
    folder: Path, dtype: torch.dtype = torch.float32, *, tied: bool = False, shard: str = "50GB", **more: Any
) -> Path:
    """Write a random Llama, of two layers unless `more` says otherwise, with its tokenizer."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **{**small, "num_key_value_heads": 2, "vocab_size": 64, "initializer_range": 0.2, **more},
        tie_word_embeddings=tied,
    )
    return _write_base(LlamaForCausalLM, config, folder, dtype, shard)


def small_gpt2(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random GPT-2 of two layers: Conv1D weights, one of them square, and tied embeddings."""
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    return _write_base(GPT2LMHeadModel, config, folder, dtype, "50GB")


def _write_base(kind: Any, config: Any, folder: Path, dtype: torch.dtype, shard: str) -> Path:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        kind(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    words = {f"w{i}": i for i in range(62)} | {"the": 62, "is": 63}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(folder)
    return folder


def plant_canaries(run: Path, outside: Path) -> None:
    """Put into a run, and into its adapters, what must never leave."""
    outside.write_text("canary outside")
    for folder in (run, *run.glob("peft_*"), run / "benchmarks"):
        folder.mkdir(exist_ok=True)
        (folder / ".env").write_text("canary TOKEN=" + TOKEN)
        (folder / "id_rsa").write_text("-----BEGIN OPENSSH PRIVATE KEY----- canary")
        (folder / "link.json").symlink_to(outside)
    about = json.loads((run / "config.json").read_text())
    about["data"]["instruction"] += f" canary-free {TOKEN}"
    (run / "config.json").write_text(json.dumps(about))


def assert_clean(folder: Path) -> None:
    """No canary, no token and no link is in `folder`."""
    for path in folder.rglob("*"):
        assert not path.is_symlink(), path
        assert path.name not in (".env", "id_rsa", "link.json")
        if path.is_file():
            data = path.read_bytes()
            for secret in (b"canary TOKEN", b"canary outside", b"PRIVATE KEY", TOKEN.encode(), b"/home/someone"):
                assert secret not in data, path
