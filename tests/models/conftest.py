"""A random Llama of two layers with grouped-query attention, as a folder and in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedtune.config.schema import ModelConfig
from fedtune.models.base import Base, load_base

torch.set_num_threads(1)  # small tensors; more threads only wait for each other


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "llama"
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                initializer_range=0.2,
                eos_token_id=1,
            )
        )
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(folder)
    return folder


@pytest.fixture
def base(llama_folder: Path) -> Base:
    return load_base(ModelConfig(base=str(llama_folder), quantization="none"))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(2, 26).reshape(2, 12)
