"""One client's round on every family against plain transformers with PEFT, one row at a time; slow except for a few.

The table at the end: the layouts that were chosen (up to so many tokens a row), and the largest differences of the losses, of the
gradients (of their norm), and of the trained adapter (of the way it went).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.families import FAMILIES, NOT_CAUSAL, QUICK, build
from support.table import Rows, printed
from transformers import AutoModelForCausalLM

from fedtune.config.schema import AdapterConfig, TrainingConfig
from fedtune.data.tokenize import TokenizedRows
from fedtune.models.adapter import AdaptedModel, attach, initial_tensors, saved_parameters
from fedtune.models.base import Base
from fedtune.training import memory
from fedtune.training.local import train_locally

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers and PEFT say about 150 models is not tested here

CPU = torch.device("cpu")
RATE = 1e-3
LENGTHS = (5, 16, 9, 12, 40, 7, 60, 23, 31, 31, 18, 50)
"""Of the rows: those of the first step fit a window of 16 tokens."""
STEPS = [np.arange(0, 4), np.arange(4, 8), np.arange(8, 12)]
Gradients = list[dict[str, torch.Tensor]]
CHECKPOINTED = (*QUICK, "gemma3n_text", "gemma4_text_shared", "gpt2", "mixtral", "opt", "qwen3_next", "zamba2")
CASES = [
    pytest.param(name, switch, marks=() if name in QUICK else pytest.mark.slow)
    for switch, some in (("off", FAMILIES), ("on", CHECKPOINTED))
    for name in some
    if name not in NOT_CAUSAL
]


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Rows]:
    yield from printed(request, ("family", "layouts", "losses", "gradients", "adapter", "why"))


@pytest.fixture(scope="module")
def rows() -> TokenizedRows:
    generator = np.random.default_rng(3)
    ids = tuple(generator.integers(3, 850, length).astype(np.int32) for length in LENGTHS)
    prompts = np.array([max(1, length // 3) for length in LENGTHS], np.int32)
    return TokenizedRows(ids, prompts, total=len(ids), skipped=0)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def targets(model: Any) -> tuple[str, ...]:
    """The text model's plain linear modules; LoRA takes neither Mamba's out_proj nor what only looks linear."""
    return tuple(
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "FalconLinear", "Conv1D")
        and name.rpartition(".")[2] not in ("lm_head", "out_proj", "embed_out")
        and "vision" not in name
    )


def adapted_model(folder: Path) -> tuple[AdaptedModel, dict[str, torch.Tensor]]:
    """Return the base in `folder` with an adapter whose B is not zero, and the adapter's values."""
    model = load(folder)
    base = Base(model, None, None, CPU, torch.float32, dequantized=False)
    adapted = attach(base, AdapterConfig(rank=4, alpha=8, dropout=0.0, targets=targets(model)))
    generator = torch.Generator().manual_seed(0)
    start = {
        key: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for key, tensor in initial_tensors(adapted, seed=0).items()
    }
    adapted.load(start)
    return adapted, start


def plain_round(
    folder: Path, config: LoraConfig, start: dict[str, torch.Tensor], rows: TokenizedRows
) -> tuple[list[float], Gradients, dict[str, torch.Tensor]]:
    """Train the same steps with transformers, PEFT and torch alone; return losses, gradients and the adapter."""
    model = get_peft_model(load(folder), config)
    parameters = saved_parameters(model)
    with torch.no_grad():
        for key, tensor in start.items():
            parameters[key].copy_(tensor)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    losses, gradients = [], []
    for step in STEPS:
        count = sum(len(rows.input_ids[i]) - int(rows.prompt_lengths[i]) for i in step)
        loss = 0.0
        for i in step:
            ids = torch.tensor(rows.input_ids[i]).long()[None]
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
            first = int(rows.prompt_lengths[i])
            row = torch.nn.functional.cross_entropy(logits[first - 1 : -1], ids[0, first:], reduction="sum") / count
            row.backward()
            loss += float(row.detach())
        losses.append(loss)
        gradients.append({key: p.grad.clone() for key, p in parameters.items() if p.grad is not None})
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, {key: parameter.detach().clone() for key, parameter in parameters.items()}


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """The Euclidean norm of the difference; what is missing is zero."""
    parts = [
        float(torch.as_tensor(one.get(key, 0.0) - two.get(key, torch.tensor(0.0))).square().sum())
        for key in one.keys() | two.keys()
    ]
    return float(np.sqrt(sum(parts)))


@pytest.mark.parametrize(("name", "checkpointing"), CASES)
def test_a_clients_round_is_what_plain_peft_trains(
    name: str, checkpointing: Any, rows: TokenizedRows, table: Rows, tmp_path: Path
) -> None:
    folder = build(name, tmp_path)
    adapted, start = adapted_model(folder)
    gradients: Gradients = []

    def keep(named: Any) -> None:
        gradients.append({key: p.grad.clone() for key, p in named.items() if p.grad is not None})

    options: dict[str, Any] = {"learning_rate": RATE, "seed": (1,), "gradient_checkpointing": checkpointing}
    result = train_locally(adapted, rows, STEPS, TrainingConfig(), adjust=keep, **options)
    losses, expected, trained = plain_round(folder, adapted.peft_config, start, rows)
    zero: dict[str, torch.Tensor] = {}
    loss_difference = max(abs(ours - theirs) / theirs for ours, theirs in zip(result.losses, losses, strict=True))
    gradient_difference = max(distance(a, b) / distance(b, zero) for a, b in zip(gradients, expected, strict=True))
    adapter_difference = distance(adapted.tensors(), trained) / distance(trained, start)
    layouts = " ".join(f"{n}:{layout.kind}" for n, layout in memory.known[adapted.model].layouts.items())
    differences = [f"{each:.0e}" for each in (loss_difference, gradient_difference, adapter_difference)]
    title = name + (", checkpointed" if checkpointing == "on" else "")
    table.append((title, layouts, *differences, result.layout.reason))
    assert loss_difference < 1e-5
    assert gradient_difference < 1e-4
    assert adapter_difference < 1e-3
