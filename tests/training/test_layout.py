"""Which rows may share a pass: the probe on models that take a layout, on those that do not, and when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.families import build
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaForCausalLM

from fedtune.config.schema import TrainingConfig
from fedtune.data.tokenize import TokenizedRows
from fedtune.errors import ClientError
from fedtune.models.adapter import AdaptedModel
from fedtune.training import layout as layouts
from fedtune.training import memory, packing
from fedtune.training.layout import RowLimit, choose_layout, row_limits
from fedtune.training.local import train_locally

Make = Callable[..., AdaptedModel]


def choose(adapted: AdaptedModel, longest: int = 40) -> layouts.Layout:
    return choose_layout(adapted.base.model, adapted.parameters(), longest)


@pytest.mark.parametrize("longest", [2, 5, 7, 40])
def test_a_plain_llama_is_packed(make: Make, longest: int) -> None:
    adapted = make()
    assert choose(adapted, longest) == layouts.Layout("packed")
    assert all(p.grad is None for p in adapted.parameters())
    half = make(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert choose(half, longest).kind == "packed"


class NoLogitsToKeep(LlamaForCausalLM):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, **others: Any) -> Any:  # type: ignore[override]
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **others)


class LooksBack(LlamaForCausalLM):
    """Mixes each token with a very small share of the one before it, whoever's that is, as a new convolution would."""

    share = 1e-7

    def forward(self, input_ids: Any = None, logits_to_keep: Any = 0, **others: Any) -> Any:  # type: ignore[override]
        embedded = self.get_input_embeddings()(input_ids)
        others.pop("inputs_embeds", None)
        before = torch.nn.functional.pad(embedded, (0, 0, 1, 0))[:, :-1]
        return super().forward(inputs_embeds=embedded + self.share * before, logits_to_keep=logits_to_keep, **others)


class LooksAcross(LlamaForCausalLM):
    """Divides by the largest value of the whole pass, as a model whose batches are not independent would."""

    def forward(self, input_ids: Any = None, logits_to_keep: Any = 0, **others: Any) -> Any:  # type: ignore[override]
        embedded = self.get_input_embeddings()(input_ids)
        others.pop("inputs_embeds", None)
        scaled = embedded / embedded.detach().abs().max()
        return super().forward(inputs_embeds=scaled, logits_to_keep=logits_to_keep, **others)


class CountsFromZero(LlamaForCausalLM):
    """Adds positions that it counts itself, over all rows of a pass."""

    def forward(self, input_ids: Any = None, logits_to_keep: Any = 0, **others: Any) -> Any:  # type: ignore[override]
        others.pop("inputs_embeds", None)
        positions = torch.arange(input_ids.shape[1])[None, :, None].sin()
        embedded = self.get_input_embeddings()(input_ids) + positions
        return super().forward(inputs_embeds=embedded, logits_to_keep=logits_to_keep, **others)


class Fails(LlamaForCausalLM):
    def forward(self, input_ids: Any = None, logits_to_keep: Any = 0, **others: Any) -> Any:  # type: ignore[override]
        if "cu_seq_lens_q" in others:
            raise KeyError("nobody knows why")
        return super().forward(input_ids=input_ids, logits_to_keep=logits_to_keep, **others)


@pytest.mark.parametrize(
    ("kind", "expected", "reason"),
    [
        (NoLogitsToKeep, "padded", "logits_to_keep"),
        (LooksBack, "padded", "depend on the other rows"),
        (LooksAcross, "row by row", "differ from those of the rows alone"),
        (CountsFromZero, "padded", "differ from those of the rows alone"),
        (Fails, "padded", "KeyError: 'nobody knows why'"),
    ],
)
def test_models_that_do_not_take_a_layout_are_found(make: Make, kind: type, expected: str, reason: str) -> None:
    adapted = make(kind=kind)
    found = choose(adapted)
    assert found.kind == expected
    assert reason in found.reason
    assert found.unexpected is (kind is Fails)
    assert adapted.base.model.config._attn_implementation == "sdpa"


def test_a_leak_between_rows_is_found(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make()
    monkeypatch.setitem(
        AttentionInterface._global_mapping, packing.ATTENTION, AttentionInterface._global_mapping["sdpa"]
    )
    assert "depend on the other rows" in choose(adapted).reason


def test_what_the_config_says_about_long_rows(make: Make) -> None:
    model = make().base.model
    assert row_limits(model) == ()
    model.config.sliding_window = 16
    model.config.index_topk = 12
    model.config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 20}
    assert row_limits(model) == (
        RowLimit("index_topk", 12, pads=False),
        RowLimit("sliding_window", 16, pads=True),
        RowLimit("rope_type longrope", 20, pads=False),
    )
    del model.config.sliding_window, model.config.rope_parameters
    model.config.use_sliding_window = True
    model.config.index_topk = None
    assert row_limits(model) == ()


def test_longer_rows_than_the_window_are_padded_and_shorter_ones_packed(make: Make) -> None:
    adapted = make()
    adapted.base.model.config.sliding_window = 16
    assert choose(adapted, 16).kind == "packed"
    found = choose(adapted, 17)
    assert found.kind == "padded"
    assert "sliding_window of 16" in found.reason


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next", "deepseek_v32"])
def test_hybrids_with_untrained_weights_are_not_packed(name: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(build(name, tmp_path)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.02 if parameter.ndim > 1 else 1)
    weights = [p for name, p in model.named_parameters() if name.endswith(("q_proj.weight", "q_b_proj.weight"))]
    assert weights
    assert choose_layout(model, weights, 40).kind == ("row by row" if name == "deepseek_v32" else "padded")


def test_a_model_that_gives_no_gradient_is_said(make: Make) -> None:
    adapted = make()
    for parameter in adapted.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ClientError, match="No tensor of the adapter receives a gradient"):
        choose(adapted)


def test_attention_of_each_part_is_restored(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(build("gemma3_vlm", tmp_path)).eval()
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    parts = [model.config.text_config, model.config.vision_config]
    before = [part._attn_implementation for part in parts]
    assert before == ["sdpa", "eager"]
    with packing.packed_attention(model):
        assert parts[0]._attn_implementation == packing.ATTENTION
    assert [part._attn_implementation for part in parts] == before


def limited(monkeypatch: pytest.MonkeyPatch, most: int, error: type[Exception] = torch.OutOfMemoryError) -> list[int]:
    """Let passes of more tokens than `most` run out of memory; return the list of all passes that did."""
    forward, failed = LlamaForCausalLM.forward, []

    def short_of_memory(self: Any, input_ids: Any = None, logits_to_keep: Any = 0, **others: Any) -> Any:
        if input_ids.numel() > most:
            failed.append(input_ids.numel())
            raise error("CUDA out of memory")
        return forward(self, input_ids=input_ids, logits_to_keep=logits_to_keep, **others)

    monkeypatch.setattr(LlamaForCausalLM, "forward", short_of_memory)
    return failed


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_memory_that_runs_out_in_the_probe_says_nothing_about_the_model(
    make: Make, rows: TokenizedRows, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: type
) -> None:
    adapted, plain = make(), make()
    steps = [np.arange(4), np.arange(4, 8)]
    options: dict[str, Any] = {"learning_rate": 1e-3, "seed": (1,)}
    expected = train_locally(plain, rows, steps, TrainingConfig(), **options)
    failed = limited(monkeypatch, most=45, error=error)
    with caplog.at_level(logging.WARNING, logger="fedtune"):
        result = train_locally(adapted, rows, steps, TrainingConfig(), **options)
    assert failed
    assert result.layout.kind == "packed"
    assert result.losses == pytest.approx(expected.losses, rel=1e-5)
    assert "Memory ran out while fedtune tried" in caplog.text
    assert memory.known[adapted.model].layouts.keys() == {max(map(len, rows.input_ids))}
    count = len(failed)
    train_locally(adapted, rows, steps, TrainingConfig(), **options)
    assert len(failed) == count, "what memory holds is remembered"


def test_no_memory_at_all_ends_the_client(make: Make, rows: TokenizedRows, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, most=0)
    with pytest.raises(ClientError, match="does not hold a single row"):
        train_locally(make(), rows, [np.arange(4)], TrainingConfig(), learning_rate=1e-3, seed=(1,))


@pytest.mark.parametrize(
    ("kind", "level", "text"),
    [
        (LlamaForCausalLM, logging.INFO, "Each pass of training holds several rows end to end."),
        (
            NoLogitsToKeep,
            logging.INFO,
            "holds several rows with padding (not packed: its forward pass has no logits_to_keep).",
        ),
        (Fails, logging.WARNING, "not packed: the model raised KeyError"),
        (LooksAcross, logging.WARNING, "Training is slower: each pass holds a single row"),
    ],
)
def test_the_choice_is_said_once(
    make: Make, rows: TokenizedRows, caplog: pytest.LogCaptureFixture, kind: type, level: int, text: str
) -> None:
    adapted = make(kind=kind)
    with caplog.at_level(logging.INFO, logger="fedtune"):
        for _ in range(2):
            train_locally(adapted, rows, [np.arange(4)], TrainingConfig(), learning_rate=1e-3, seed=(1,))
    [record] = [r for r in caplog.records if r.name == "fedtune.training.local"]
    assert record.levelno == level
    assert text in record.getMessage()
