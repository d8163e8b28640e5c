"""The GPU proof: what fedtune does on a GPU, held against plain ways of doing the same, in one command.

    python -m benchmarks.gpu --out DIR                             # a Llama of 8B shape with random weights, one GPU
    python -m benchmarks.gpu --out DIR --device cpu --shape tiny   # the same script where there is no GPU

Needs nothing from outside: the base is made on the spot. Writes DIR/gpu.json after every part and DIR/gpu.md at the end, and
exits with 1 where a part failed or two ways that must agree do not. Random weights are good for speed, memory and agreement;
they say nothing about scores.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

PROJECT = Path(__file__).parent.parent
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Shape:
    """A Llama and the work that it is given."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    rows: int
    """Of an optimiser step."""
    tokens: int
    """Of the longest row."""
    questions: int
    prefix: int
    """Tokens with which every question begins."""

    @property
    def parameters(self) -> int:
        """Of the matrices that every token passes: layers and output, without embeddings."""
        size = self.hidden // self.heads
        attention = self.hidden * size * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner) + self.hidden * self.vocabulary


SHAPES = {
    "8b": Shape(4096, 14336, 32, 32, 8, 128256, rows=16, tokens=512, questions=256, prefix=100),
    "1b": Shape(2048, 8192, 16, 32, 8, 128256, rows=16, tokens=512, questions=256, prefix=100),
    "tiny": Shape(64, 128, 2, 4, 2, 1024, rows=4, tokens=48, questions=24, prefix=20),
}


class Proof:
    """Runs parts one after another and keeps what they found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.shape = SHAPES[options.shape]
        self.device = torch.device(options.device)
        self.began = time.monotonic()
        self.found: dict[str, Any] = {"machine": machine(self.device), "shape": options.shape}
        self.failed: list[str] = []
        self.official: list[tuple[int, ...]] = []
        """Answers of the official way."""

    def run(self, name: str, part: Callable[[], dict[str, Any]]) -> None:
        """Run one part; a failure is recorded, and the next part goes on."""
        if self.options.only and name not in self.options.only:
            return
        if time.monotonic() - self.began > 60 * self.options.minutes:
            self.found[name] = {"skipped": "no time left"}
            self.failed.append(name)
        else:
            began = time.monotonic()
            try:
                result = part()
            except Exception as error:  # the proof of the other parts is worth having
                traceback.print_exc()
                result = {"error": f"{type(error).__name__}: {error}"}
            self.found[name] = {**result, "part_seconds": round(time.monotonic() - began, 1)}
            if "error" in result or result.get("agrees") is False:
                self.failed.append(name)
        gc.collect()
        torch.cuda.empty_cache()
        print(f"{name}: {json.dumps(self.found[name])}", flush=True)
        self.found["failed"] = self.failed
        (self.options.out / "gpu.json").write_text(json.dumps(self.found, indent=2) + "\n")


def main() -> int:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "error: there is no CUDA device; --device cpu --shape tiny tries the script without one.", file=sys.stderr
        )
        return 2
    proof = Proof(options)
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        folder = Path(work) / "base"
        proof.run("peak", lambda: measured_peak(proof.device))
        proof.run("base", lambda: write_base(folder, proof.shape, proof.device))
        run_official(proof, folder)
        run_fedtune(proof, folder)
        run_plain(proof, folder)
    proof.run("tests", lambda: gpu_tests(proof.device))
    table = as_table(proof.found)
    (options.out / "gpu.md").write_text(table)
    print(table)
    return 1 if proof.failed else 0


# Fedtune's side


class Loaded:
    """fedtune's base on the device, one at a time."""

    def __init__(self, proof: Proof, folder: Path) -> None:
        self.proof, self.folder = proof, folder
        self.base: Any = None

    def load(self, name: str, **settings: Any) -> None:
        """Run a part that loads the base with these settings of `model`."""
        from fedtune.config.schema import ModelConfig
        from fedtune.models.base import load_base

        self.base = None
        gc.collect()

        def part() -> dict[str, Any]:
            with measured(self.proof.device) as spent:
                self.base = load_base(ModelConfig(base=str(self.folder), quantization="fp4", **settings))
            return {**spent, "dequantized": self.base.dequantized, "dtype": str(self.base.compute_dtype)}

        self.proof.run(name, part)

    def adapted(self, part: Callable[[Any], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        """Return `part` as it runs with an adapter on the base."""

        def run() -> dict[str, Any]:
            from fedtune.config.schema import AdapterConfig
            from fedtune.models.adapter import attach

            model = attach(self.base, AdapterConfig(rank=32, alpha=64, dropout=0.0))
            try:
                return part(model)
            finally:
                model.detach()

        return run


def run_official(proof: Proof, folder: Path) -> None:
    """Evaluation in the leaderboard's arithmetic: 4-bit weights, float32."""
    loaded = Loaded(proof, folder)
    loaded.load("load, 4 bits and float32", compute_dtype="fp32", dequantize="off")
    proof.run("evaluation, float32", lambda: official_and_fast_answers(proof, loaded.base))


def run_fedtune(proof: Proof, folder: Path) -> None:
    """What fedtune does by default on this device, and training on weights that stay in 4 bits."""
    shape = proof.shape
    rows = make_rows(shape)
    loaded = Loaded(proof, folder)
    loaded.load("load")
    proof.run("packed = padded", loaded.adapted(lambda model: packed_is_padded(model, rows)))
    proof.run("fedtune", loaded.adapted(lambda model: fedtune_steps(model, rows, shape)))
    proof.run("paged AdamW", loaded.adapted(lambda model: paged_adamw(model, rows, shape)))
    proof.run("memory runs out", loaded.adapted(lambda model: memory_runs_out(model, rows, shape)))
    proof.run("evaluation, fast", lambda: fast_answers(proof, loaded.base))
    loaded.load("load, 4 bits", dequantize="off")
    proof.run("fedtune, 4 bits", loaded.adapted(lambda model: fedtune_steps(model, rows, shape)))


def fedtune_steps(model: Any, rows: Any, shape: Shape) -> dict[str, Any]:
    """Steps of one client's round."""
    seconds, losses, peak = train(model, rows, shape, steps=5)
    return {**speed(seconds[1:], rows, shape), "peak_gib": peak, "first_loss": losses[0], "losses": losses}


def train(
    model: Any, rows: Any, shape: Shape, *, steps: int, optimizer: str = "adamw", learning_rate: float = LEARNING_RATE
) -> tuple[list[float], list[float], float | None]:
    """Return seconds and losses of each step, and the peak of memory."""
    from fedtune.config.schema import TrainingConfig
    from fedtune.models.adapter import initial_tensors
    from fedtune.training.local import StepReport, train_locally

    model.load(initial_tensors(model, seed=0))
    reports: list[StepReport] = []
    training = TrainingConfig(batch_size=shape.rows, optimizer=optimizer)
    indices = [np.arange(shape.rows)] * steps
    with measured(model.base.device) as spent:
        train_locally(model, rows, indices, training, learning_rate=learning_rate, seed=(0,), on_step=reports.append)
    return [report.seconds for report in reports], [report.loss for report in reports], spent["peak_gib"]


def packed_is_padded(model: Any, rows: Any) -> dict[str, Any]:
    """Loss and gradients of rows laid end to end against the same rows padded."""
    from fedtune.training.layout import choose_layout
    from fedtune.training.packing import pack, packed_attention, packed_logits, padded_logits, summed_loss

    base = model.base
    batch = pack(list(rows.input_ids[:4]), rows.prompt_lengths[:4].tolist(), base.device)
    bf16 = base.compute_dtype == torch.bfloat16
    results = {}
    with torch.autocast(base.device.type, torch.bfloat16, enabled=bf16):
        layout = choose_layout(base.model, model.parameters(), max(map(len, rows.input_ids)))
        for name in ("padded", "packed"):
            with packed_attention(base.model) if name == "packed" else nullcontext():
                loss = summed_loss((packed_logits if name == "packed" else padded_logits)(model.model, batch), batch)
            gradients = torch.autograd.grad(loss, model.parameters(), allow_unused=True)
            results[name] = loss.item(), torch.cat([g.flatten() for g in gradients if g is not None])
    (padded, plain), (packed, ours) = results["padded"], results["packed"]
    off = abs(packed - padded) / padded
    cosine = float(torch.nn.functional.cosine_similarity(ours, plain, dim=0))
    return {
        "layout": layout.kind,
        "reason": layout.reason,
        "loss_off": off,
        "gradient_cosine": cosine,
        "agrees": layout.kind == "packed" and off < 0.01 and cosine > 0.99,
    }


def paged_adamw(model: Any, rows: Any, shape: Shape) -> dict[str, Any]:
    """Losses with paged 8-bit AdamW against those with AdamW."""
    _, plain, _ = train(model, rows, shape, steps=4)
    seconds, losses, peak = train(model, rows, shape, steps=4, optimizer="paged_adamw_8bit")
    off = max(abs(a - b) / abs(b) for a, b in zip(losses, plain, strict=True))
    return {"step_seconds": median(seconds[1:]), "peak_gib": peak, "loss_off": off, "agrees": off < 0.02}


def memory_runs_out(model: Any, rows: Any, shape: Shape) -> dict[str, Any]:
    """The same steps with too little memory for one pass: fedtune must take less, and compute the same."""
    from fedtune.training import memory

    if model.base.device.type != "cuda":
        return {"not tried": "memory is capped on a GPU only"}
    _, plain, peak = train(model, rows, shape, steps=2)
    assert peak is not None
    resident = torch.cuda.memory_allocated() / 2**30
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    allowed = resident + (peak - resident) * 0.35
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        _, losses, less = train(model, rows, shape, steps=2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    limits = memory.known.pop(model.model)
    off = max(abs(a - b) / abs(b) for a, b in zip(losses, plain, strict=True))
    return {
        "peak_gib": peak,
        "allowed_gib": allowed,
        "peak_with_less_gib": less,
        "tokens_of_a_pass": limits.tokens,
        "checkpointing": limits.checkpointing,
        "loss_off": off,
        "agrees": off < 0.01 and (limits.checkpointing or limits.tokens < 2**31),
    }


def official_and_fast_answers(proof: Proof, base: Any) -> dict[str, Any]:
    """The leaderboard's way, one prompt at a time in float32, and the fast path in the same arithmetic."""
    from fedtune.evaluation.backends.official import answer_one_by_one

    requests = questions(proof.shape)
    list(answer_one_by_one(base, requests[:2]))
    with measured(base.device) as spent:
        official = [reply for batch in answer_one_by_one(base, requests) for reply in batch]
    proof.official = [reply.tokens for reply in official]
    fast, spent_fast, path = answered(base, requests)
    differing = [a for a, b in zip(official, fast, strict=True) if a.tokens != b.tokens]
    return {
        "official": {**spent, "questions_per_second": len(official) / spent["seconds"]},
        "fast": {**spent_fast, "path": path, "questions_per_second": len(fast) / spent_fast["seconds"]},
        "equal": len(official) - len(differing),
        "of": len(official),
        "largest_gap_of_differing": max((reply.gap for reply in differing), default=0.0),
        "median_gap": median(reply.gap for reply in official),
        "agrees": all(reply.gap < 1e-3 for reply in differing),
    }


def fast_answers(proof: Proof, base: Any) -> dict[str, Any]:
    """Questions per second as `fedtune eval` answers them on this device by default."""
    replies, spent, path = answered(base, questions(proof.shape))
    equal = sum(a.tokens == b for a, b in zip(replies, proof.official, strict=True)) if proof.official else None
    return {**spent, "path": path, "questions_per_second": len(replies) / spent["seconds"], "equal": equal}


def answered(base: Any, requests: Sequence[Any]) -> tuple[list[Any], dict[str, Any], str]:
    """Return the replies of the path that the probe chooses, what it took without the probe, and its name."""
    from fedtune.evaluation.backends.fast import Budget, answer
    from fedtune.evaluation.backends.official import answer_one_by_one
    from fedtune.evaluation.backends.probe import choose_path

    choice = choose_path(base, requests, Budget.of(base.device))

    def once() -> list[Any]:
        ways = answer_one_by_one(base, requests)
        if choice.path is not None:
            ways = answer(base, requests, Budget.of(base.device), path=choice.path)
        return [reply for batch in ways for reply in batch]

    once()
    with measured(base.device) as spent:
        replies = once()
    return sorted(replies, key=lambda reply: reply.index), spent, f"{choice.name}: {choice.reason}"


def questions(shape: Shape) -> list[Any]:
    """Prompts that begin alike and go on for different lengths, as MedMCQA's do; one new token each."""
    from fedtune.evaluation.backends.generation import Request

    generator = np.random.default_rng(1)
    prefix = tuple(generator.integers(3, shape.vocabulary, shape.prefix).tolist())
    lengths = np.clip(generator.lognormal(4.0, 0.5, shape.questions), 8, 3 * shape.prefix).astype(int)
    return [Request(prefix + tuple(generator.integers(3, shape.vocabulary, n).tolist()), 1) for n in lengths]


# The plain ways


def run_plain(proof: Proof, folder: Path) -> None:
    """The same steps by transformers' Trainer and PEFT, on padded batches."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    shape, device = proof.shape, proof.device
    rows = make_rows(shape)
    bf16 = torch.bfloat16 if device.type == "cuda" else torch.float32
    model: list[Any] = []

    def load(quantized: bool, dtype: torch.dtype) -> None:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype) if quantized else None
        model[:] = [
            AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, device_map={"": device}, quantization_config=config
            )
        ]

    def way(quantized: bool, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
        if not model:
            load(quantized, dtype)
        return trainer_steps(model[0], rows, shape, device, bf16=dtype == torch.bfloat16, **options)

    quarter = max(1, shape.rows // 4)
    proof.run("leaderboard's way", lambda: way(True, torch.float32, checkpointing=True, steps=2))
    model.clear()
    proof.run("Trainer, FP4, bf16", lambda: way(True, bf16, steps=4, batch_size=quarter))
    proof.run("Trainer, FP4, bf16, checkpointing", lambda: way(True, bf16, checkpointing=True, steps=3))
    model.clear()
    proof.run("Trainer, bf16 weights", lambda: way(False, bf16, steps=4, batch_size=quarter))
    model.clear()


def trainer_steps(
    base: Any,
    rows: Any,
    shape: Shape,
    device: torch.device,
    *,
    bf16: bool,
    steps: int,
    batch_size: int | None = None,
    checkpointing: bool = False,
) -> dict[str, Any]:
    """Steps of transformers' Trainer; the first of them is a warm-up."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import Trainer, TrainerCallback, TrainingArguments

    if getattr(base, "is_loaded_in_4bit", False):
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointing)
    torch.manual_seed(0)
    lora = LoraConfig(r=32, lora_alpha=64, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    batch_size = batch_size or shape.rows
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait(device)
            ends.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait(device)
            ends[-1] += time.perf_counter()

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as folder, measured(device) as spent:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=shape.rows // batch_size,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            weight_decay=0.0,
            bf16=bf16,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=device.type == "cpu",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        data = list(range(shape.rows)) * steps
        trainer = InOrder(model, arguments, train_dataset=data, data_collator=padded_batch(rows), callbacks=[Clock()])
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    model.unload()
    base.gradient_checkpointing_disable()
    return {**speed(ends[1:], rows, shape), "peak_gib": spent["peak_gib"], "first_loss": losses[0], "losses": losses}


def padded_batch(rows: Any) -> Callable[[list[int]], dict[str, torch.Tensor]]:
    """A collator that pads the chosen rows on the right; prompts and padding are not learnt."""

    def collate(chosen: list[int]) -> dict[str, torch.Tensor]:
        longest = max(len(rows.input_ids[i]) for i in chosen)
        ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            tokens = torch.from_numpy(rows.input_ids[i]).long()
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
            labels[row, rows.prompt_lengths[i] : len(tokens)] = tokens[rows.prompt_lengths[i] :]
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    return collate


# What both sides share


def write_base(folder: Path, shape: Shape, device: torch.device) -> dict[str, Any]:
    """Write a random Llama in bf16 with the tokenizer of the tiny base."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.02,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    tiny = files("fedtune.models").joinpath("builtin", "tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(str(tiny.joinpath(name)), folder / name)
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {"parameters": sum(p.numel() for p in model.parameters()), "file_gib": size / 2**30}


def make_rows(shape: Shape) -> Any:
    """Rows of uneven lengths, as instructions have: most are short, some reach the longest."""
    from fedtune.data.tokenize import TokenizedRows

    generator = np.random.default_rng(0)
    drawn = shape.tokens * generator.lognormal(-0.9, 0.5, shape.rows)
    lengths = np.clip(drawn, shape.tokens // 4, shape.tokens).astype(int)
    lengths[-1] = shape.tokens
    ids = tuple(generator.integers(3, shape.vocabulary, length).astype(np.int32) for length in lengths)
    return TokenizedRows(ids, (lengths // 3).astype(np.int32), total=shape.rows, skipped=0)


def speed(seconds: Sequence[float], rows: Any, shape: Shape) -> dict[str, Any]:
    """Return tokens per second and the arithmetic that a step needs: forward, and backward without weight gradients."""
    tokens = sum(map(len, rows.input_ids))
    step = median(seconds)
    return {
        "step_seconds": step,
        "spread": [min(seconds), max(seconds)],
        "tokens": tokens,
        "tokens_per_second": tokens / step,
        "tflop_per_second": 4 * shape.parameters * tokens / step / 1e12,
    }


def measured_peak(device: torch.device) -> dict[str, Any]:
    """Return the rate of a large bf16 matrix product."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(13):
        wait(device)
        began = time.perf_counter()
        a @ b
        wait(device)
        times.append(time.perf_counter() - began)
    return {"tflop_per_second": 2 * size**3 / median(times[3:]) / 1e12}


@contextmanager
def measured(device: torch.device) -> Iterator[dict[str, Any]]:
    """Fill in the seconds that the block took and, on a GPU, its peak of memory."""
    spent: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wait(device)
    began = time.perf_counter()
    yield spent
    wait(device)
    spent["seconds"] = time.perf_counter() - began
    spent["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def gpu_tests(device: torch.device) -> dict[str, Any]:
    """Run every test that is marked `gpu`."""
    if device.type != "cuda":
        return {"not tried": "they need a GPU"}
    tests = [str(path) for path in sorted((PROJECT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return {
        "summary": lines[-1] if lines else "",
        "output": lines[-40:] if done.returncode else [],
        "agrees": not done.returncode,
    }


def machine(device: torch.device) -> dict[str, Any]:
    names = ("torch", "transformers", "peft", "bitsandbytes")
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores",
        **{name: version(name) for name in names},
    }


def as_table(found: dict[str, Any]) -> str:
    """Return the table for people."""
    ways = (
        "leaderboard's way",
        "Trainer, FP4, bf16, checkpointing",
        "Trainer, FP4, bf16",
        "Trainer, bf16 weights",
        "fedtune, 4 bits",
        "fedtune",
    )
    peak = found.get("peak", {}).get("tflop_per_second")
    slowest = found.get(ways[0], {}).get("tokens_per_second")
    lines = [
        f"{found['machine']['device']}, {found['shape']} shape, torch {found['machine']['torch']}",
        "",
        "| training | tokens/s | share of peak | times the leaderboard's | peak memory |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in ways:
        result = found.get(name, {})
        if rate := result.get("tokens_per_second"):
            share = f"{result['tflop_per_second'] / peak:.1%}" if peak else "-"
            times = f"{rate / slowest:.1f}" if slowest else "-"
            memory = f"{result['peak_gib']:.1f} GiB" if result["peak_gib"] else "-"
            lines.append(f"| {name} | {rate:,.0f} | {share} | {times} | {memory} |")
        elif result:
            lines.append(f"| {name} | {result.get('error', 'not run')[:80]} | - | - | - |")
    lines += ["", "| evaluation | questions/s | answers as the official ones |", "| --- | --- | --- |"]
    exact = found.get("evaluation, float32", {})
    if "official" in exact:
        lines.append(f"| official, float32 | {exact['official']['questions_per_second']:.1f} | |")
        lines.append(
            f"| fast, float32 | {exact['fast']['questions_per_second']:.1f} | {exact['equal']} of {exact['of']} |"
        )
    fast = found.get("evaluation, fast", {})
    if "questions_per_second" in fast:
        equal = f"{fast['equal']} of {exact['of']}" if "of" in exact else ""
        lines.append(f"| fast, default | {fast['questions_per_second']:.1f} | {equal} |")
    lines += ["", f"Failed: {', '.join(found['failed']) or 'nothing'}.", ""]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for gpu.json and gpu.md")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--minutes", type=float, default=8, help="after which no further part is begun")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where the base is written, 16 GB for the 8b shape")
    parser.add_argument("--only", action="append", metavar="PART", help="run this part; repeatable")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
