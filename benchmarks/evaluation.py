"""Seconds of `fedtune eval --mode official` and of the fast mode on a slice of real questions, and whether they agree.

    python benchmarks/evaluation.py DIR                                       # 256 questions of MedMCQA on builtin:tiny
    python benchmarks/evaluation.py DIR --bench pubmedqa --questions 64

DIR is a `--data-dir`. Both modes compute on the same FP4 weights in float32 on the CPU, in turn; the best of each counts, because
a machine that others use as well only ever adds time. On such a machine believe the CPU seconds, with `--threads 1`. Exits with 1
where an answer differs.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fedtune.config.schema import ModelConfig
from fedtune.evaluation.backends.fast import Budget, Work, answer
from fedtune.evaluation.backends.generation import Reply, Request
from fedtune.evaluation.backends.official import answer_one_by_one
from fedtune.evaluation.prompts import build_prompts
from fedtune.evaluation.settings import EvalSettings
from fedtune.evaluation.tasks.load import load_questions
from fedtune.evaluation.tasks.registry import parse_bench
from fedtune.models.base import Base, load_base


def main() -> int:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    base = load_base(ModelConfig(base=options.base, quantization="fp4", compute_dtype="fp32"))
    requests = requests_of(base, options)
    tokens = sum(len(request.tokens) for request in requests)
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32 on fp4 weights")
    print(f"{options.base}: {len(requests)} questions of {options.bench}, {tokens:,} tokens")

    work = Work()
    ways: dict[str, Callable[[], Iterator[list[Reply]]]] = {
        "official": lambda: answer_one_by_one(base, requests),
        "fast": lambda: answer(base, requests, Budget.of(base.device), work),
    }
    # Both once on a few questions first: what is computed at the first use of a model is nobody's time.
    list(answer_one_by_one(base, requests[:4]))
    list(answer(base, requests[:16], Budget.of(base.device)))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, list[str]] = {}
    for _ in range(options.repeats):
        for name, way in ways.items():
            began, cpu = time.perf_counter(), time.process_time()
            replies = [reply for batch in way() for reply in batch]
            seconds[name].append(time.perf_counter() - began)
            cpu_seconds[name].append(time.process_time() - cpu)
            texts[name] = [reply.text for reply in sorted(replies, key=lambda reply: reply.index)]
            print(f"  {name:8} {seconds[name][-1]:6.2f} s, {cpu_seconds[name][-1]:6.2f} s of CPU", flush=True)
    share = work.computed_tokens / work.prompt_tokens
    equal = sum(one == other for one, other in zip(texts["official"], texts["fast"], strict=True))
    for kind, times in (("seconds", seconds), ("CPU seconds", cpu_seconds)):
        plain, fast = min(times["official"]), min(times["fast"])
        print(f"best {kind}: official {plain:.2f}, fast {fast:.2f}, ratio {plain / fast:.2f}")
    print(f"fast puts {share:.0%} of the tokens through the model, padding included")
    print(f"agreement: {equal} of {len(requests)}")
    return 0 if equal == len(requests) else 1


def requests_of(base: Base, options: argparse.Namespace) -> list[Request]:
    (selection,) = parse_bench(options.bench)
    questions = load_questions(selection, options.data_dir, options.questions)
    settings = EvalSettings(ModelConfig(base=options.base), (), (selection,), options.data_dir)
    return [prompt.request for prompt in build_prompts(base, questions, settings)]


def cpu_name() -> str:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{count} CPU cores ({platform.machine()})"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, metavar="DIR", help="a folder as --data-dir takes it")
    parser.add_argument("--bench", default="medmcqa", help="one benchmark that answers with a letter or a word")
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--base", default="builtin:tiny", help="model.base")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--repeats", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
