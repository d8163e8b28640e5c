"""Seconds of one client's round: fedtune's loop against a transformers.Trainer, on the same rows in the same order.

    python -m benchmarks.local_training                          # a random Llama, on this machine's device
    python -m benchmarks.local_training --base builtin:tiny --steps 10 --batch-size 16

Prints the seconds of both, alternating, and their ratio; machine and settings are stated beside them. On a machine that
others use as well, believe the CPU seconds, with `--threads 1`.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
import warnings
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from benchmarks.gpu import padded_batch
from fedtune.config.schema import AdapterConfig, ModelConfig, TrainingConfig
from fedtune.data.tokenize import TokenizedRows
from fedtune.models.adapter import AdaptedModel, attach, initial_tensors
from fedtune.models.base import Base, compute_dtype, load_base
from fedtune.training.local import train_locally

LEARNING_RATE = 1e-3


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    adapted = attach(make_base(options), AdapterConfig(rank=options.rank, alpha=2 * options.rank, dropout=0.0))
    start = initial_tensors(adapted, seed=0)
    vocabulary = adapted.base.model.config.vocab_size
    count = options.steps * options.batch_size * options.accumulation
    rows = make_rows(count, options.tokens, vocabulary)
    device = torch.cuda.get_device_name() if adapted.base.device.type == "cuda" else cpu_name()
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {adapted.base.compute_dtype}")
    parameters = sum(p.numel() for p in adapted.base.model.parameters()) / 1e6
    print(f"{options.base}: {parameters:.1f} M parameters with a rank-{options.rank} adapter; {options.steps} steps of")
    print(f"{options.batch_size} x {options.accumulation} rows of {options.tokens // 4} to {options.tokens} tokens")

    seconds: dict[str, list[tuple[float, float]]] = {"fedtune": [], "Trainer": []}
    ways = {"fedtune": with_fedtune, "Trainer": with_trainer}
    for repeat in range(options.repeats + 1):
        for name, way in ways.items():
            adapted.load(start)
            began, cpu = time.perf_counter(), time.process_time()
            loss = way(adapted, rows, options)
            if repeat:  # the first is a warm-up
                took = time.perf_counter() - began, time.process_time() - cpu
                seconds[name].append(took)
                print(f"  {name:8} {took[0]:7.2f} s, {took[1]:7.2f} s of CPU, last loss {loss:.4f}")
    for index, kind in enumerate(("seconds", "CPU seconds")):
        ours, theirs = (median(pair[index] for pair in seconds[name]) for name in ways)
        print(f"median {kind}: fedtune {ours:.2f}, Trainer {theirs:.2f}, ratio {theirs / ours:.2f}")


def with_fedtune(adapted: AdaptedModel, rows: TokenizedRows, options: argparse.Namespace) -> float:
    steps = list(np.arange(len(rows)).reshape(options.steps, -1))
    training = TrainingConfig(batch_size=options.batch_size, accumulation=options.accumulation)
    return train_locally(adapted, rows, steps, training, learning_rate=LEARNING_RATE, seed=(0,)).losses[-1]


def with_trainer(adapted: AdaptedModel, rows: TokenizedRows, options: argparse.Namespace) -> float:
    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulation,
            max_steps=options.steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            weight_decay=0.0,
            bf16=adapted.base.compute_dtype == torch.bfloat16,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=adapted.base.device.type == "cpu",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = InOrder(
            adapted.model, arguments, train_dataset=list(range(len(rows))), data_collator=padded_batch(rows)
        )
        # Its only output is the log that we read.
        trainer.log = lambda logs, *_: trainer.state.log_history.append(logs)
        trainer.train()
        adapted.model.eval()
        return float([entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1])


def make_base(options: argparse.Namespace) -> Base:
    if options.base != "random":
        return load_base(ModelConfig(base=options.base, quantization="none"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(ModelConfig(), device)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 256),
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(device, dtype).eval().requires_grad_(False)
    return Base(model, None, None, device, dtype, dequantized=False)


def make_rows(count: int, tokens: int, vocabulary: int) -> TokenizedRows:
    """Make rows whose lengths are uneven, as instructions' are: most are short, some reach `tokens`."""
    generator = np.random.default_rng(0)
    lengths = np.clip(tokens * generator.lognormal(-0.9, 0.5, count), tokens // 4, tokens).astype(int)
    ids = tuple(generator.integers(0, vocabulary, length).astype(np.int32) for length in lengths)
    return TokenizedRows(ids, (lengths // 3).astype(np.int32), total=count, skipped=0)


def cpu_name() -> str:
    return f"{platform.processor() or platform.machine()} CPU, {os.cpu_count()} cores"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="random", help="model.base, or random")
    parser.add_argument("--hidden", type=int, default=256, help="of the random Llama")
    parser.add_argument("--layers", type=int, default=4, help="of the random Llama")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256, help="in the longest row")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
