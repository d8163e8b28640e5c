"""A random Llama of two layers with grouped-query attention and dropout-free adapter, and rows of uneven length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.config.schema import AdapterConfig
from fedtune.data.tokenize import TokenizedRows
from fedtune.models.adapter import AdaptedModel, attach, initial_tensors
from fedtune.models.base import Base

torch.set_num_threads(1)  # small tensors; more threads only wait for each other

Make = Callable[..., AdaptedModel]


@pytest.fixture
def make() -> Make:
    """Make an adapted model, the same one at each call; B is not zero, so that all gradients differ from zero."""

    def make(dtype: torch.dtype = torch.float32, kind: Any = LlamaForCausalLM, **adapter: Any) -> AdaptedModel:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                initializer_range=0.2,
            )
            model = kind(config).to(dtype).eval().requires_grad_(False)
        base = Base(model, None, None, torch.device("cpu"), dtype, dequantized=False)
        settings = {"rank": 8, "alpha": 16, "dropout": 0.0, "targets": "all-linear"} | adapter
        adapted = attach(base, AdapterConfig(**settings))
        generator = torch.Generator().manual_seed(0)
        start = initial_tensors(adapted, seed=0)
        adapted.load({key: t + 0.02 * torch.randn(t.shape, generator=generator) for key, t in start.items()})
        return adapted

    return make


@pytest.fixture(scope="session")
def rows() -> TokenizedRows:
    """64 rows of 4 to 40 tokens, whose responses follow a rule that can be learnt."""
    generator = np.random.default_rng(0)
    ids, prompts = [], []
    for _ in range(64):
        prompt = generator.integers(2, 64, generator.integers(2, 21))
        response = (prompt[0] + np.arange(generator.integers(2, 21))) % 62 + 2
        ids.append(np.concatenate([prompt, response]).astype(np.int32))
        prompts.append(len(prompt))
    return TokenizedRows(tuple(ids), np.array(prompts, np.int32), total=64, skipped=0)
