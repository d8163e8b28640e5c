"""One client's round against transformers.Trainer, and each of its ways against the plain one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from fedtune.config.schema import TrainingConfig
from fedtune.data.tokenize import TokenizedRows
from fedtune.errors import ClientError
from fedtune.models.adapter import AdaptedModel, AdapterTensors
from fedtune.training import memory, packing
from fedtune.training.layout import Layout, LayoutKind
from fedtune.training.local import LocalResult, StepReport, train_locally

Make = Callable[..., AdaptedModel]
RATE = 1e-3


def steps_of(count: int, size: int) -> list[np.ndarray]:
    return list(np.random.default_rng(1).permutation(count * size).reshape(count, size))


def train(adapted: AdaptedModel, rows: TokenizedRows, steps: Sequence[np.ndarray], **options: Any) -> LocalResult:
    training = options.pop("training", TrainingConfig())
    return train_locally(adapted, rows, steps, training, **({"learning_rate": RATE, "seed": (1, 2)} | options))


def assert_same(found: AdapterTensors, expected: AdapterTensors, **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], **({"rtol": 1e-4, "atol": 1e-6} | tolerance))


def test_same_round_as_transformers_trainer(make: Make, rows: TokenizedRows, tmp_path: Path) -> None:
    steps = steps_of(8, 8)
    ours = make()
    start = ours.tensors()
    result = train(ours, rows, steps)

    theirs = make()
    assert_same(theirs.tensors(), start, rtol=0, atol=0)

    def collate(chosen: list[int]) -> dict[str, torch.Tensor]:
        longest = max(len(rows.input_ids[i]) for i in chosen)
        ids, labels = torch.zeros(len(chosen), longest).long(), torch.full((len(chosen), longest), -100)
        for row, i in enumerate(chosen):
            tokens = torch.tensor(rows.input_ids[i]).long()
            ids[row, : len(tokens)] = tokens
            labels[row, rows.prompt_lengths[i] : len(tokens)] = tokens[rows.prompt_lengths[i] :]
        mask = torch.tensor([[t < len(rows.input_ids[i]) for t in range(longest)] for i in chosen]).long()
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = InOrder(
        theirs.model,
        TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=8,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            max_grad_norm=1.0,
            weight_decay=0.0,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=[int(i) for step in steps for i in step],
        data_collator=collate,
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == len(result.losses) == 8
    assert list(result.losses) == pytest.approx([entry["loss"] for entry in history], rel=1e-4)
    assert_same(ours.tensors(), theirs.tensors(), rtol=1e-3, atol=1e-5)
    # Both have moved by far more than that tolerance, and clipping was at work.
    assert max(float((t - start[key]).abs().max()) for key, t in ours.tensors().items()) > 5e-3
    assert any(entry["grad_norm"] > 1 for entry in history)


def test_result_counts_what_was_done(make: Make, rows: TokenizedRows) -> None:
    reports: list[StepReport] = []
    steps = [np.array([0, 1, 2]), np.array([3]), np.array([0, 1, 2])]
    adapted = make()
    result = train(adapted, rows, steps, on_step=reports.append)
    chosen = [0, 1, 2, 3, 0, 1, 2]
    tokens = [len(rows.input_ids[i]) for i in chosen]
    assert (result.steps, result.rows, result.learning_rate) == (3, 7, RATE)
    assert result.tokens == sum(tokens)
    assert result.response_tokens == sum(tokens) - sum(int(rows.prompt_lengths[i]) for i in chosen)
    assert [(r.step, r.steps, r.rows, r.tokens) for r in reports] == [
        (1, 3, 3, sum(tokens[:3])),
        (2, 3, 1, tokens[3]),
        (3, 3, 3, sum(tokens[4:])),
    ]
    assert tuple(r.loss for r in reports) == result.losses
    assert result.losses[2] < result.losses[0]
    assert 0 < sum(r.seconds for r in reports) <= result.seconds
    assert not adapted.model.training
    assert all(p.grad is None for p in adapted.parameters())


def limits(kind: LayoutKind, tokens: int = 4096) -> memory.Limits:
    """What is known of a model whose rows, all of them, share passes in this layout."""
    return memory.Limits(tokens, checkpointing=False, layouts={n: Layout(kind) for n in range(64)})


@pytest.mark.parametrize("limit", [1, 60])
@pytest.mark.parametrize("kind", ["packed", "padded", "row by row"])
def test_merged_rows_are_the_same_as_one_at_a_time(
    make: Make, rows: TokenizedRows, monkeypatch: pytest.MonkeyPatch, limit: int, kind: LayoutKind
) -> None:
    steps = steps_of(4, 8)
    merged, cut = make(), make()
    memory.known[cut.model] = limits(kind, limit)
    result = train(merged, rows, steps)
    assert result.layout == Layout("packed")
    passes = count_passes(cut, monkeypatch)
    again = train(cut, rows, steps)
    assert again.layout.kind == kind
    assert again.losses == pytest.approx(result.losses, rel=1e-5)
    assert len(passes) == 32 if limit == 1 or kind == "row by row" else 4 < len(passes) < 32
    assert_same(cut.tensors(), merged.tensors(), rtol=1e-3, atol=1e-5)


def count_passes(adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of tokens of every pass."""
    passes: list[int] = []
    forward = adapted.base.model.forward

    def counted(input_ids: torch.Tensor, logits_to_keep: Any = 0, **others: Any) -> Any:
        passes.append(input_ids.numel())
        return forward(input_ids=input_ids, logits_to_keep=logits_to_keep, **others)

    monkeypatch.setattr(adapted.base.model, "forward", counted)
    return passes


def test_a_step_is_one_pass_where_memory_allows(
    make: Make, rows: TokenizedRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = make()
    train(adapted, rows, steps_of(1, 4))
    passes = count_passes(adapted, monkeypatch)
    result = train(adapted, rows, steps_of(3, 8))
    assert len(passes) == 3
    assert sum(passes) == result.tokens, "no padding"


def test_out_of_memory_makes_passes_smaller_and_changes_no_result(
    make: Make, rows: TokenizedRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = steps_of(3, 8)
    plain, short = make(), make()
    losses = train(plain, rows, steps).losses
    forward = LlamaForCausalLM.forward
    failed = []

    def limited(self: Any, input_ids: Any = None, logits_to_keep: Any = 0, **others: Any) -> Any:
        if input_ids.numel() > 50:
            failed.append(input_ids.numel())
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, input_ids=input_ids, logits_to_keep=logits_to_keep, **others)

    monkeypatch.setattr(LlamaForCausalLM, "forward", limited)
    assert train(short, rows, steps).losses == pytest.approx(losses, rel=1e-5)
    assert_same(short.tensors(), plain.tensors(), rtol=1e-3, atol=1e-5)
    assert memory.known[short.model].tokens <= 50
    assert memory.known[short.model].checkpointing
    failures = len(failed)
    train(short, rows, steps)
    assert len(failed) == failures, "the smaller passes are remembered"
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda *_, **__: oom())
    with pytest.raises(ClientError, match="does not hold a single row"):
        train(short, rows, steps)


def test_memory_that_runs_out_half_way_through_a_step(
    make: Make, rows: TokenizedRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = steps_of(2, 8)
    plain, short = make(), make()
    losses = train(plain, rows, steps).losses
    memory.known[short.model] = limits("packed", 60)
    forward, calls = LlamaForCausalLM.forward, iter(range(1000))
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda *a, **k: oom() if next(calls) == 2 else forward(*a, **k))
    assert train(short, rows, steps).losses == pytest.approx(losses, rel=1e-5)
    assert_same(short.tensors(), plain.tensors(), rtol=1e-3, atol=1e-5)
    assert next(calls) > 8, "the step was begun anew"


def oom() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_gradient_checkpointing_gives_equal_gradients(
    make: Make, rows: TokenizedRows, monkeypatch: pytest.MonkeyPatch, kind: LayoutKind
) -> None:
    steps = steps_of(3, 8)
    plain, saving = make(dropout=0.1), make(dropout=0.1)
    for adapted in (plain, saving):
        memory.known[adapted.model] = limits(kind)
    calls: list[bool] = []
    norm = saving.base.model.model.layers[0].input_layernorm
    norm.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    train(plain, rows, steps, gradient_checkpointing="off")
    train(saving, rows, steps, gradient_checkpointing="on")
    assert len(calls) == 2 * 3, "each layer ran twice in each step"
    assert_same(saving.tensors(), plain.tensors(), rtol=0, atol=0)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in saving.base.model.modules())


def test_checkpointing_is_suggested_only_where_memory_is_short(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().base.model
    assert not memory.suggests_checkpointing(model, torch.device("cpu"))
    # 2048 tokens x 2 layers x (16 x 32 + 6 x 64) x 4 bytes
    need = 2048 * 2 * 896 * 4
    monkeypatch.setattr(memory, "free_memory_bytes", lambda _: need)
    assert not memory.suggests_checkpointing(model, torch.device("cuda"))
    monkeypatch.setattr(memory, "free_memory_bytes", lambda _: need - 1)
    assert memory.suggests_checkpointing(model, torch.device("cuda"))


def test_same_inputs_give_the_same_bits_and_leave_torchs_generator_alone(make: Make, rows: TokenizedRows) -> None:
    found = []
    for seed in (1, 2):
        adapted = make(dropout=0.2)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        result = train(adapted, rows, steps_of(3, 8))
        assert torch.equal(torch.get_rng_state(), before)
        found.append((result.losses, adapted.tensors()))
    assert found[0][0] == found[1][0]
    assert_same(found[0][1], found[1][1], rtol=0, atol=0)
    other = make(dropout=0.2)
    assert train(other, rows, steps_of(3, 8), seed=(1, 3)).losses != found[0][0]


def test_the_optimiser_starts_afresh(make: Make, rows: TokenizedRows) -> None:
    adapted = make()
    start = adapted.tensors()
    first = train(adapted, rows, steps_of(3, 8)).losses
    after = adapted.tensors()
    adapted.load(start)
    assert train(adapted, rows, steps_of(3, 8)).losses == first
    assert_same(adapted.tensors(), after, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_every_optimiser_learns(make: Make, rows: TokenizedRows, optimizer: str) -> None:
    adapted = make(rank=128)  # tensors of 4,096 elements and more get 8-bit state
    steps = [np.arange(16)] * 12
    result = train(adapted, rows, steps, training=TrainingConfig(optimizer=optimizer), learning_rate=3e-3)
    assert result.losses[-1] < 0.7 * result.losses[0]


def test_weight_decay_and_clipping_act(make: Make, rows: TokenizedRows) -> None:
    steps = steps_of(1, 8)
    norms: dict[float, float] = {}
    for decay in (0.0, 0.5):
        adapted = make()
        train(adapted, rows, steps, training=TrainingConfig(weight_decay=decay), learning_rate=0.01)
        norms[decay] = sum(float(t.square().sum()) for t in adapted.tensors().values())
    assert norms[0.5] < norms[0.0]
    moved = {}
    for clip in (0.0, 1e-9):
        adapted = make()
        start = adapted.tensors()
        train(adapted, rows, steps, training=TrainingConfig(gradient_clip=clip))
        moved[clip] = max(float((t - start[key]).abs().max()) for key, t in adapted.tensors().items())
    assert moved[0.0] == pytest.approx(RATE, rel=0.01), "AdamW's first step is as long as the learning rate"
    assert moved[1e-9] < 0.2 * RATE, "clipped to below AdamW's epsilon"


def test_fedprox_gradient_by_hand(make: Make, rows: TokenizedRows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain gradient descent of two steps: the second gradient gets mu times the first step."""

    def descent(parameters: Any, training: Any, rate: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=rate)

    monkeypatch.setattr("fedtune.training.local.make_optimizer", descent)
    same = [np.arange(8)]
    off = TrainingConfig(gradient_clip=0)
    adapted = make()
    w0 = adapted.tensors()
    train(adapted, rows, same, training=off, learning_rate=0.1)
    w1 = adapted.tensors()
    train(adapted, rows, same, training=off, learning_rate=0.1)
    w2 = adapted.tensors()
    for mu in (0.0, 2.0):
        adapted.load(w0)
        train(adapted, rows, same * 2, training=off, learning_rate=0.1, proximal_mu=mu)
        expected = {key: w2[key] - 0.1 * mu * (w1[key] - w0[key]) for key in w0}
        assert_same(adapted.tensors(), expected, rtol=1e-4, atol=1e-6)


def test_fedprox_holds_the_adapter_near_its_start(make: Make, rows: TokenizedRows) -> None:
    distances = []
    for mu in (0.0, 1.0, 100.0):
        adapted = make()
        start = adapted.tensors()
        train(adapted, rows, steps_of(5, 8), proximal_mu=mu)
        distances.append(math.sqrt(sum(float((t - start[k]).square().sum()) for k, t in adapted.tensors().items())))
    assert distances[0] > distances[1] > distances[2] > 0


def test_bf16_trains_in_autocast_with_float32_adapter(make: Make, rows: TokenizedRows) -> None:
    steps = [np.arange(16)] * 8
    full, half = make(), make(torch.bfloat16)
    expected = train(full, rows, steps).losses
    found = train(half, rows, steps).losses
    assert found == pytest.approx(expected, rel=0.05)
    assert found != expected
    assert {p.dtype for p in half.parameters()} == {torch.float32}


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_client(
    make: Make, rows: TokenizedRows, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    adapted = make()
    if what == "loss":
        with torch.no_grad():
            adapted.parameters()[0][0, 0] = float("inf")
    else:
        adapted.parameters()[0].register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(ClientError, match=f"The {what} of step 1 is not finite"):
        train(adapted, rows, steps_of(2, 8))
    assert not adapted.model.training
    assert adapted.base.model.config._attn_implementation == "sdpa"
    if what == "gradient":
        assert all(bool(t.isfinite().all()) for t in adapted.tensors().values()), "it never reached the weights"


def test_time_is_looked_at_between_steps(make: Make, rows: TokenizedRows, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("fedtune.training.local.time.monotonic", lambda: float(next(clock)))
    with pytest.raises(ClientError, match=r"longer than 2 s: 2 of 8 steps done"):
        train(make(), rows, steps_of(8, 8), timeout_s=2)


def test_nothing_to_train_on(make: Make, rows: TokenizedRows) -> None:
    with pytest.raises(ClientError, match="no rows"):
        train(make(), rows, [])


def test_rows_longer_than_the_window_are_padded(
    make: Make, rows: TokenizedRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = make()
    adapted.base.model.config.sliding_window = 8
    used: list[str] = []
    padded = packing.padded_logits
    monkeypatch.setattr("fedtune.training.local.padded_logits", lambda *a: used.append("padded") or padded(*a))
    result = train(adapted, rows, steps_of(2, 8))
    assert used == ["padded"] * 2
    assert result.layout.kind == "padded"
    assert "sliding_window of 8" in result.layout.reason


def test_an_interrupted_client_leaves_the_model_ready(make: Make, rows: TokenizedRows) -> None:
    adapted = make()

    def interrupt(_: StepReport) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(adapted, rows, steps_of(2, 8), on_step=interrupt)
    assert not adapted.model.training
    assert all(p.grad is None for p in adapted.parameters())
    train(adapted, rows, steps_of(2, 8))


def test_modules_to_save_are_trained_packed_as_one_by_one(make: Make, rows: TokenizedRows) -> None:
    steps = steps_of(3, 8)
    packed, plain = (make(modules_to_save=("lm_head", "embed_tokens")) for _ in range(2))
    memory.known[plain.model] = limits("row by row")
    before = packed.tensors()
    result = train(packed, rows, steps)
    assert result.layout.kind == "packed"
    assert train(plain, rows, steps).losses == pytest.approx(result.losses, rel=1e-5)
    after = packed.tensors()
    assert_same(plain.tensors(), after, rtol=1e-3, atol=1e-5)
    whole = [key for key in after if ".lora_" not in key]
    assert [key.rpartition("model.")[2] for key in whole] == ["embed_tokens.weight", "lm_head.weight"]
    assert all(not torch.equal(before[key], after[key]) for key in whole)
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
