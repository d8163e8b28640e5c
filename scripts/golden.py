"""Records what fedtune does in one JSON file and compares two such files, to show that a refactoring changes no result.

    python scripts/golden.py record before.json             # a few minutes on one core
    python scripts/golden.py record now.json --quick        # every strategy, and a little of the rest
    python scripts/golden.py record one.json --only 'strategy *' --only 'codec *'
    python scripts/golden.py compare before.json after.json           # exit code 1 and a list where they differ
    python scripts/golden.py compare before.json now.json --common    # only the cases that both files have

The script uses the command line only, so that it survives moved modules: it records exit codes, JSON output, and the files that
the commands write. It reads strategies, codecs, wire dtypes and other choices from the config's schema, so a new one becomes a
case without a change here. The commands run one after another in one process, which imports the libraries once; the case
`own process` checks that a command in a process of its own gives the same result.

A sha256 is valid for one machine and one set of library versions: make both recordings on the same machine, with the same
versions. `compare` says so where the versions differ.

The script removes what differs between any two recordings: times, paths, fedtune's version, the names of run directories. The
reasons stand at `TIMES`, `PROSE`, `RESIZED` and in `Recorder`. It records texts separately: `compare` reports that they have
changed and does not fail.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import fnmatch
import hashlib
import importlib
import io
import json
import os
import platform
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "flwr", "lm-eval", "numpy", "safetensors", "tokenizers")

TIMES = frozenset({"seconds", "questions_per_second", "tokens_per_second", "started", "metrics_bytes"})
"""Keys that measure or name a time; `metrics_bytes` is the length of a file that holds seconds in decimals."""

PROSE = frozenset(
    {
        *("card", "notes", "text", "checked", "explanation", "findings", "partial", "comparability", "questions_from"),
        *("ineligible", "ineligible_because", "plan_unknown_because", "unknown_because", "forecast_unknown_because"),
    }
)
"""Keys whose texts are sentences: their wording may change on purpose, so only the numbers in them must stay."""

RESIZED = ("README.md", "results.json", "pyproject.toml", "*.py")
"""Files whose size is not recorded: prose, seconds in decimals, fedtune's version, and names of modules that move."""

NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.]*\w)")
"""A number that stands alone: no part of a version, a file name or a hash."""

Words = tuple[str, ...]
Run = Callable[[Words, Path], "Done"]
Step = Words | Callable[[Path, Run], None]
"""A command's words without `fedtune`, or a change to the case's folder between two commands."""
Record = dict[str, Any]


# --- The cases -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Commands that run one after another in a folder of their own, whose files are recorded afterwards."""

    name: str
    steps: tuple[Step, ...]
    quick: bool = False
    """Whether `--quick` records it."""
    noisy: bool = False
    """The adapter holds random noise: it is left out, and so are losses after the first round, which follow from it."""
    own_process: bool = False
    mistakes: bool = False
    """The commands are mistakes on purpose: exit code and first line are recorded, files are not."""


def sets(*settings: str) -> Words:
    return tuple(word for setting in settings for word in ("--set", setting))


SMALL = (
    *("train", "--challenge", "tiny", "--json"),
    *sets("federation.rounds=3", "training.max_steps=2", "training.batch_size=4", "checkpoint.save_every=1"),
)
"""Three rounds, since strategies with momentum or two kinds of rounds show themselves in the third only."""
TINY = ("federation.rounds=2", "federation.fraction=0.25", "training.max_steps=1")
FEW_TARGETS = 'adapter.targets=["q_proj", "v_proj"]'
"""Saves half of the time where many cases differ in the algorithm only."""
AUDIT = ("budget", "latest", "--json")
EVAL = ("eval", "--bench", "tiny", "--peft", "peft_3", "--json")
NO_NOISE = ("privacy.noise_multiplier=1e-100", "privacy.epsilon=1e300")
"""Noise too small for any value of a float32, also for a zero: what remains of the private path is deterministic."""


def training_cases(choices: Mapping[str, Sequence[str]]) -> Iterator[Case]:
    """Yield cases that train: strategies, what travels, privacy, adapters, data, local training, resuming."""
    for name in choices["strategy.name"]:
        chosen = f"strategy.name={name}"
        yield Case(f"strategy {name}", ((*SMALL, *sets(chosen, FEW_TARGETS)), AUDIT), quick=True)
        half = sets(chosen, FEW_TARGETS, "federation.fraction=0.5", "communication.codec=int8")
        yield Case(f"strategy {name}, half the clients, int8", ((*SMALL, *half), AUDIT, EVAL))
        for mode in privacy_modes(choices):
            # A strategy that does not go with privacy is refused, and its exit code is recorded.
            private = sets(
                chosen, FEW_TARGETS, f"privacy.mode={mode}", *NO_NOISE, "federation.rounds=2", "training.max_steps=1"
            )
            yield Case(f"strategy {name}, {mode} privacy without noise", ((*SMALL, *private), AUDIT))
    for name, setting in (
        ("flexlora, ranks", "strategy.ranks=[2, 4, 8]"),
        ("multikrum, selected", "strategy.selected=2"),
        ("fedprox, strong", "strategy.proximal_mu=1.0"),
        ("fedadam, eta", "strategy.eta=0.01"),
        ("scaffold, server_learning_rate", "strategy.server_learning_rate=0.5"),
        ("bulyan, none hostile", "strategy.malicious=0"),
    ):
        chosen = f"strategy.name={name.partition(',')[0]}"
        yield Case(f"strategy {name}", ((*SMALL, *sets(chosen, FEW_TARGETS, setting)), AUDIT))

    codecs = choices["communication.codec"]
    for down in codecs:
        for up in codecs:
            travel = sets(*TINY, f"communication.downlink_codec={down}", f"communication.uplink_codec={up}")
            quick = down == up
            yield Case(f"codec {down} down, {up} up", ((*SMALL, *travel), AUDIT), quick=quick)
    for dtype in choices["communication.wire_dtype"]:
        travel = sets(*TINY, f"communication.wire_dtype={dtype}")
        yield Case(f"wire dtype {dtype}", ((*SMALL, *travel), AUDIT), quick=True)
    for mode in privacy_modes(choices):
        # A small clip, so that the noise does not carry a client's training off to values that are not finite.
        private = (f"privacy.mode={mode}", "privacy.noise_multiplier=20", "privacy.epsilon=50", "privacy.clip=0.001")
        private += ("training.max_steps=1",)
        yield Case(f"{mode} privacy", ((*SMALL, *sets(*private)), AUDIT), noisy=True, quick=True)
        spent = sets(f"privacy.mode={mode}", "privacy.noise_multiplier=4", "privacy.epsilon=3", "training.max_steps=1")
        yield Case(f"{mode} privacy, budget spent", ((*SMALL, *spent),), noisy=True)

    for name, settings in {
        "dora": ("adapter.dora=true",),
        "rslora": ("adapter.rslora=true",),
        "dora and rslora": ("adapter.dora=true", "adapter.rslora=true"),
        "modules_to_save": ('adapter.modules_to_save=["lm_head"]',),
        "modules_to_save, int8": ('adapter.modules_to_save=["lm_head"]', "communication.codec=int8"),
        "targets default": ("adapter.targets=default",),
        "targets all-linear": ("adapter.targets=all-linear",),
        "targets named": ('adapter.targets=["q_proj", "down_proj"]', "adapter.rank=3", "adapter.alpha=5"),
        "dropout": ("adapter.dropout=0.2",),
    }.items():
        few = sets("federation.fraction=0.5", *settings)
        yield Case(f"adapter {name}", ((*SMALL, *few), AUDIT, EVAL, ("export", "--to", "merged", "--json")))

    yield from data_cases(choices)

    for name, settings in {
        "accumulation": ("training.accumulation=3",),
        "epochs": ("training.epochs=1", "training.max_steps=100"),
        "clip and decay": ("training.gradient_clip=0.0", "training.weight_decay=0.1"),
        "short rows": ("training.sequence_length=72",),
        "same order": ("data.reshuffle=false",),
        "checkpointing": ("model.gradient_checkpointing=on",),
        "seed": ("seed=7",),
        **{f"optimizer {name}": (f"training.optimizer={name}",) for name in choices["training.optimizer"]},
        **{f"compute_dtype {name}": (f"model.compute_dtype={name}",) for name in choices["model.compute_dtype"]},
        **{f"quantization {name}": (f"model.quantization={name}",) for name in choices["model.quantization"]},
        **{
            f"dequantize {name}": ("model.quantization=nf4", f"model.dequantize={name}")
            for name in choices["model.dequantize"]
        },
    }.items():
        yield Case(f"training {name}", ((*SMALL, *sets(*TINY, *settings)),))

    # The cap stops the run after a round. Resumed with a higher cap, it must give the adapters of an uninterrupted run.
    for name in ("fedavg", "scaffold", "fedex-lora", "fedadam"):
        resumed = sets(f"strategy.name={name}", "federation.fraction=0.5", "communication.codec=int4")
        capped = sets(
            "communication.cap_mib=1.5" if name in ("scaffold", "fedex-lora") else "communication.cap_mib=0.5"
        )
        more = sets("communication.cap_mib=1000.0")
        yield Case(f"uninterrupted {name}", ((*SMALL, *resumed),))
        stopped = ((*SMALL, *resumed, *capped), AUDIT, ("train", "--resume", "latest", "--json", *more), AUDIT)
        yield Case(f"resumed {name}", stopped)
    baselines = (*SMALL, "--baselines", *sets("federation.rounds=1", "training.max_steps=1"))
    yield Case("baselines", (baselines,))


def data_cases(choices: Mapping[str, Sequence[str]]) -> Iterator[Case]:
    """Yield cases about the data: every partitioner on the challenge's rows, every kind of file, the templates."""
    by = {"dirichlet": ("data.partition_by=clinic", "data.alpha=0.3"), "natural": ("data.partition_by=clinic",)}
    for name in choices["data.partitioner"]:
        split = sets(*TINY, f"data.partitioner={name}", *by.get(name, ()))
        yield Case(f"partitioner {name}", ((*SMALL, *split), AUDIT))
    few = sets(*TINY, "federation.clients=4", "federation.fraction=0.5", "data.partitioner=iid")
    for suffix in ("jsonl", "json", "csv", "parquet"):
        yield Case(f"data {suffix}", ((*SMALL, *few, "--data", f"../inputs/rows.{suffix}"),))
    folder = sets(*TINY, "federation.fraction=0.7")
    yield Case("data folder", ((*SMALL, *folder, "--data", "../inputs/clients"), AUDIT))
    asked = sets('data.instruction="{input} ({group})"', 'data.response="{output}!"')
    yield Case("data templates", ((*SMALL, *few, *asked, "--data", "../inputs/rows.jsonl"),))
    label = sets("data.partitioner=dirichlet", "data.partition_by=group")
    yield Case("data dirichlet", ((*SMALL, *few, *label, "--data", "../inputs/rows.jsonl"),))


def forecast_cases(choices: Mapping[str, Sequence[str]], presets: Mapping[str, Sequence[str]]) -> Iterator[Case]:
    """Yield cases that load no base: forecasts, fits, grids, the resolved config."""
    for name in choices["strategy.name"]:
        chosen = f"strategy.name={name}"
        formats = [f"communication.codec={codec}" for codec in choices["communication.codec"]]
        formats += [f"communication.wire_dtype={dtype}" for dtype in choices["communication.wire_dtype"]]
        formats += ["communication.downlink_codec=int8", "communication.uplink_codec=int4", "federation.fraction=0.7"]
        formats += [f"federation.engine={engine}" for engine in choices["federation.engine"]]
        budgets = tuple(("budget", "--challenge", "tiny", *sets(chosen, each), "--json") for each in formats)
        modes = tuple(
            ("train", "--challenge", "tiny", *sets(chosen, f"privacy.mode={mode}"), "--dry-run", "--json")
            for mode in privacy_modes(choices)
        )
        yield Case(f"forecast {name}", (*budgets, *modes), quick=name == "fedavg")
    private = (f"privacy.mode={mode}" for mode in privacy_modes(choices))
    plans = tuple(("train", "--challenge", "tiny", *sets(each), "--dry-run") for each in private)
    yield Case("privacy plans", plans)
    for kind, names in presets.items():
        for name in names:
            asked = (f"--{kind}", name)
            yield Case(
                f"{kind} {name}",
                (
                    ("train", *asked, "--dry-run", "--json"),
                    ("train", *asked, "--dry-run"),
                    ("budget", *asked, "--json"),
                    *(
                        ("budget", *asked, "--fit", what, "--cap", "4GB", "--json")
                        for what in ("rank", "rounds", "clients")
                    ),
                    ("budget", *asked, "--uplink", "20Mbit/s", "--downlink", "100Mbit/s", "--json"),
                    ("budget", *asked, "--figure", "2080.93", "--json"),
                ),
                quick=kind == "recipe",
            )
    yield Case("grid", (("budget", "--challenge", "tiny", "--grid", "--json"),))
    kept = (
        keep_output("train", "--challenge", "tiny", "--dry-run"),
        ("train", "--config", "plan.toml", "--dry-run", "--json"),
    )
    yield Case("plan read back", kept)


def evaluation_cases() -> Iterator[Case]:
    """Yield cases that score the base model or an adapter, and existing generations."""
    asked = ("eval", "--base", "--model", "builtin:tiny", "--json", "--out", "out")
    tiny = (*asked, "--bench", "tiny")
    generations = "out/generation_tiny_base_fast.jsonl"
    yield Case(
        "eval tiny, rescored",
        (tiny, ("eval", "--rescore", generations, "--json"), ("eval", "--rescore", generations)),
        quick=True,
    )
    for name, words in {
        "official": ("--mode", "official", "--limit", "40"),
        "verified": ("--verify", "5", "--limit", "40"),
        "limited": ("--limit", "10", "--batch-size", "4"),
        "nf4": ("--quantization", "nf4", "--limit", "40"),
        "int8": ("--quantization", "int8", "--limit", "40"),
        "none": ("--quantization", "none", "--limit", "40"),
    }.items():
        yield Case(f"eval tiny, {name}", ((*tiny, *words),))
    questions = ("--data-dir", "../inputs/questions")
    benches = "medmcqa,medqa,pubmedqa,careqa,mmlu:anatomy,fpb,fiqa,tfns"
    scored = ("medmcqa", "medqa", "pubmedqa", "careqa", "mmlu_anatomy", "fpb", "fiqa", "tfns")
    rescored = tuple(("eval", "--rescore", f"out/generation_{each}_base_fast.jsonl", "--json") for each in scored)
    yield Case("eval benchmarks, fast", ((*asked, "--bench", benches, *questions), *rescored))
    yield Case("eval benchmarks, official", ((*asked, "--bench", benches, *questions, "--mode", "official"),))
    plain = "medmcqa,medqa,pubmedqa,mmlu:anatomy"
    yield Case("eval lm-eval", ((*asked, "--bench", plain, *questions, "--protocol", "lm-eval"),))


def export_cases() -> Iterator[Case]:
    """Yield cases that export a run: every target, dry and written, drafts, whole submissions, and the check of them."""
    train = (*SMALL, *sets("federation.fraction=0.5", "data.partitioner=iid"))
    hub = ("export", "--to", "hf-hub", "--repo", "someone/adapter", "--dry-run", "--license", "mit", "--json")
    for name, before in {"": (), "evaluated, ": ((*EVAL, "--base"),)}.items():
        yield Case(
            f"export {name}folder and hub",
            (
                train,
                *before,
                ("export", "--license", "apache-2.0", "--json"),
                ("export", "peft_2", "--tokenizer", "--out", "exports/second", "--json"),
                ("export", "--to", "folder", "--dry-run", "--json"),
                hub,
            ),
            quick=not name,
        )
    yield Case(
        "export merged",
        (
            train,
            ("export", "--to", "merged", "--dry-run", "--json"),
            ("export", "--to", "merged", "--json"),
            ("eval", "--bench", "tiny", "--base", "--model", "exports/run-peft_3-merged", "--json", "--out", "out"),
        ),
    )
    check = ("export", "--check", "exports/run-r3", "--json")
    yield Case(
        "export draft",
        (
            train,
            ("export", "--to", "submission", "--json"),
            ("export", "--to", "submission", "--draft", "--json"),
            check,
        ),
    )
    official = ("eval", "--bench", "tiny", "--peft", "peft_3", "--base", "--mode", "official", "--json")
    yield Case(
        "export submission",
        (
            train,
            official,
            ("export", "--to", "submission", "--dry-run", "--json"),
            ("export", "--to", "submission", "--json"),
            check,
            spoil("exports/run-r3/comm_cost.txt", "used 1", "used 2"),
            spoil("exports/run-r3/pyproject.toml", "model.lora.peft-lora-r = 8", "model.lora.peft-lora-r = 9"),
            check,
            ("budget", "exports/run-r3/comm_cost.txt", "--json", "--challenge", "tiny", *train[4:]),
            ("budget", "exports/run-r3/comm_cost.txt", "--json", "--readme", "exports/run-r3/README.md"),
        ),
    )


MISTAKES = """
train
train --challenge medcal
train --recipe aloe
train --set adaptr.rank=3 --set seed=-1
train --challenge tiny --set adapter.rank=0
train --challenge tiny --set strategy.name=fedavgg
train --challenge tiny --set strategy.beta=0.3
train --challenge tiny --set strategy.name=bulyan --set federation.fraction=0.5
train --challenge tiny --set strategy.name=flora --set adapter.dora=true
train --challenge tiny --set strategy.name=krum --set privacy.mode=central
train --challenge tiny --set federation.clients=4
train --challenge tiny --set communication.codec=int3
train --challenge tiny --set communication.cap_mib=0.001
train --challenge tiny --set model.base=./nothing
train --challenge tiny --set 'adapter.targets=["nose"]'
train --challenge tiny --data missing.jsonl
train --challenge tiny --data ../inputs/rows.jsonl --set 'data.response="{nothing}"' --set data.partitioner=iid
train --challenge tiny --engine nowhere
train --challenge tiny --engine superlink
train --challenge tiny --superlink 127.0.0.1:9
train --challenge tiny --nonsense
train --config none.toml
train --resume nowhere
train --resume latest --set adapter.rank=3 --set training.max_steps=9
train --challenge medical --baselines
eval --bench tiny
eval --base --model builtin:tiny
eval --bench medmqca --base --model builtin:tiny
eval --bench medmcqa --base --model builtin:tiny --data-dir no
eval --bench tiny --base --model ./nothing
eval --bench tiny --peft peft_9
eval --bench tiny --base --model builtin:tiny --limit 0
eval --bench tiny --base --model builtin:tiny --mode slow
eval --bench tiny --base --model builtin:tiny --protocol lm-eval
eval --rescore missing.json
eval --rescore ../inputs/rows.json
budget
budget --challenge tiny --fit everything
budget --challenge tiny --cap '5 bananas'
budget --challenge tiny --uplink 20Mbit/s
budget nothing
budget --challenge tiny --grid --fit rank
budget --challenge tiny --set communication.cap_mib=0.1
export --peft peft_7
export --to zip
export --to hf-hub
export --to hf-hub --repo 'a b' --dry-run
export --to merged --tokenizer
export --license 'My Own'
export --out runs
export --to submission
export --check nothing
node --challenge tiny --superlink http://there --data ../inputs/rows.jsonl --partition 0 --dry-run
node --challenge tiny --superlink 127.0.0.1:9 --insecure --data none.jsonl --partition 0 --dry-run
frain
"""


def mistake_cases() -> Iterator[Case]:
    """Yield the one case of mistakes on purpose, beside a run that is there."""
    words = [tuple(shlex.split(line)) for line in MISTAKES.strip().splitlines()]
    # A run that fails late must not become the latest one, which the other commands mean.
    words = [(*each, "--out", "failed") if each[0] == "train" and "--resume" not in each else each for each in words]
    begin = (*SMALL, *sets("federation.rounds=1", "training.max_steps=1"))
    yield Case("mistakes", (begin, *words), quick=True, mistakes=True)


def help_cases() -> Iterator[Case]:
    """Yield the help texts; they are prose, so `compare` only reports what changed in them."""
    commands = ("train", "eval", "budget", "export", "node")
    yield Case("help", (("--help",), ("--version",), *((name, "--help") for name in commands)), quick=True)
    tables = (("budget", "latest"), EVAL[:-1], ("budget", "--challenge", "tiny"), ("export", "--dry-run"))
    yield Case("tables", (tuple(word for word in SMALL if word != "--json"), *tables))


ENGINE = ("federation.fraction=0.5", "federation.rounds=2")


def cases_of(choices: Mapping[str, Sequence[str]], presets: Mapping[str, Sequence[str]]) -> list[Case]:
    """Return all cases but those of the engines."""
    cases = [
        *training_cases(choices),
        *forecast_cases(choices, presets),
        *evaluation_cases(),
        *export_cases(),
        *mistake_cases(),
        *help_cases(),
    ]
    same = next(case for case in cases if case.name == "strategy fedavg")
    return [*cases, Case("own process", same.steps[:1], quick=True, own_process=True)]


def privacy_modes(choices: Mapping[str, Sequence[str]]) -> list[str]:
    return [mode for mode in choices["privacy.mode"] if mode != "none"]


def keep_output(*words: str) -> Step:
    """Return a step that keeps a command's output as `plan.toml`."""

    def keep(folder: Path, run: Run) -> None:
        (folder / "plan.toml").write_text(run(words, folder).stdout, encoding="utf-8")

    return keep


def spoil(name: str, old: str, new: str) -> Step:
    """Return a step that changes a text in a file."""

    def change(folder: Path, _: Run) -> None:
        path = folder / name
        if path.is_file():
            path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")

    return change


SAME_ADAPTERS = {
    "own process": "strategy fedavg",
    **{f"resumed {name}": f"uninterrupted {name}" for name in ("fedavg", "scaffold", "fedex-lora", "fedadam")},
    "engine ray": "engine in-process",
    "engine superlink": "engine in-process, three files",
}
"""Pairs of cases that must give the same adapters, bit for bit."""


# --- Inputs ----------------------------------------------------------------------------------------------------------


def write_inputs(folder: Path) -> None:
    """Write rows to train on, in every format, and questions of every benchmark in its fields."""
    groups = ("sums", "products", "differences")
    rows = [
        {
            "instruction": f"Work out number {number}.",
            "input": f"What is {number} {sign} {number % 7}?",
            "output": str(answer),
            "group": group,
        }
        for number in range(1, 21)
        for group, sign, answer in zip(
            groups,
            ("plus", "times", "minus"),
            (number + number % 7, number * (number % 7), number - number % 7),
            strict=True,
        )
    ]
    folder.mkdir()
    write_lines(folder / "rows.jsonl", rows)
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    for number in range(3):
        write_lines(folder / "clients" / f"{number}.jsonl", rows[number * 7 : number * 7 + 7 + number])
    for name, questions in QUESTIONS.items():
        write_lines(folder / "questions" / f"{name}.jsonl", questions)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


COLOURS = ("amber", "violet", "scarlet", "silver")
QUESTIONS: dict[str, list[Record]] = {
    "medmcqa": [
        {
            "question": f"Herb {n}, what colour",
            **dict(zip(("opa", "opb", "opc", "opd"), COLOURS, strict=True)),
            "cop": n % 4,
        }
        for n in range(5)
    ],
    "medqa": [
        {
            "question": f"Patient {n} comes back. What is next?",
            "options": [{"key": key, "value": f"{key.lower()}{n}"} for key in "ABCD"],
            "answer": f"c{n}",
        }
        for n in range(4)
    ],
    "pubmedqa": [
        {"CONTEXTS": ["They ran.", "They slept."], "QUESTION": f"Is {n} enough?", "final_decision": decision}
        for n, decision in enumerate(("yes", "no", "maybe"))
    ],
    "careqa": [
        {"question": f"Bone {n}.", **dict(zip(("op1", "op2", "op3", "op4"), COLOURS, strict=True)), "cop": n + 1}
        for n in range(4)
    ],
    "mmlu/anatomy": [{"input": f"Where is {n}?", **dict.fromkeys("ABCD", "here"), "target": "D"} for n in range(4)],
    "fpb": [{"sentence": f"Profit rose {n} times .", "label": n} for n in range(3)],
    "fiqa": [
        {"sentence": f"Long $T{n}", "sentiment_score": n - 1.0, "format": ("post", "headline")[n % 2]} for n in range(3)
    ],
    "tfns": [{"text": f"$T{n} falls", "label": n} for n in range(3)],
}


# --- Running commands ------------------------------------------------------------------------------------------------

TREE = ROOT
"""The checkout whose fedtune is recorded."""


@dataclass(frozen=True)
class Done:
    """What a command did."""

    exit: int
    stdout: str
    stderr: str


def entry_point(tree: Path) -> tuple[str, str]:
    """Return module and function of the `fedtune` command, as the checkout's own pyproject.toml names them."""
    table = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))
    module, _, function = table["project"]["scripts"]["fedtune"].partition(":")
    return module, function


def entry_code(tree: Path) -> str:
    """Return what the installed `fedtune` script does, for `python -c`."""
    module, function = entry_point(tree)
    return f"from {module} import {function}; {function}()"


def environment(work: Path) -> dict[str, str]:
    """Return an environment without the user's settings, logins and caches."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "FLWR_", "FEDTUNE_", "RAY_"))
    }
    kept.pop("COLUMNS", None)  # tables would be cut to it
    home = work / "home"
    home.mkdir(exist_ok=True)
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(TREE),
        "HOME": str(home),
        "HF_HOME": str(home / "hub"),
        # No server listens there: a request to the hub fails at once, in the same way on every machine.
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # One thread adds up in one order; with several the sums depend on how many there are.
        "OMP_NUM_THREADS": "1",
        "TERM": "dumb",
    }


class Driver:
    """A process that runs one command after another; started anew when a command has ended it."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._process: subprocess.Popen[str] | None = None

    def ask(self, **question: Any) -> Any:
        """Send one question to the process and return its answer; start the process if it does not run."""
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, str(Path(__file__).resolve()), "drive", str(TREE)]
            with (self._work / "driver.log").open("a") as log:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment(self._work),
                )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:  # the command has ended the whole process
            return {"exit": self._process.wait(), "stdout": "", "stderr": "the process ended"}
        return json.loads(answer)

    def run(self, words: Words, folder: Path) -> Done:
        return Done(**self.ask(words=words, folder=str(folder)))

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()


def run_alone(words: Words, folder: Path) -> Done:
    """Run a command in a process of its own."""
    command = [sys.executable, "-c", entry_code(TREE), *words]
    done = subprocess.run(
        command, cwd=folder, env=environment(folder.parent), capture_output=True, text=True, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


def drive(tree: str) -> None:
    """Answer questions on stdin, one JSON line each: run a command, or say what the config's schema holds."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print to file descriptor 1 must not run between the answers
    module, function = entry_point(Path(tree))
    for line in sys.stdin:
        question = json.loads(line)
        if question.get("schema"):
            fedtune = importlib.import_module("fedtune")
            package = Path(str(fedtune.__file__)).parent
            presets = {
                kind: sorted(path.stem for path in package.rglob(f"{kind}s/*.toml")) for kind in ("challenge", "recipe")
            }
            answer: Any = {"schema": fedtune.FedTuneConfig.model_json_schema(), "presets": presets}
        else:
            answer = run_here(question["words"], Path(question["folder"]), module, function)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def run_here(words: Sequence[str], folder: Path, module: str, function: str) -> Record:
    """Run a command in this process, as its entry point would."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["fedtune", *words]
    with contextlib.chdir(folder), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            getattr(importlib.import_module(module), function)()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return {"exit": code, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}


def choices_in(schema: Record) -> dict[str, list[str]]:
    """Return the values of every key of the config that has a fixed choice; `strategy.name` is told by the union's parts."""
    found: dict[str, list[str]] = {}

    def parts(node: Record) -> list[Record]:
        options = [*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("allOf", ())]
        if "$ref" in node:
            options.append(schema["$defs"][node["$ref"].rpartition("/")[2]])
        return [node, *(each for option in options for each in parts(option))]

    def walk(node: Record, path: str) -> None:
        for part in parts(node):
            if values := [str(value) for value in part.get("enum", [part["const"]] if "const" in part else [])]:
                found[path] = list(dict.fromkeys([*found.get(path, ()), *values]))
            for name, child in part.get("properties", {}).items():
                walk(child, f"{path}.{name}".strip("."))

    walk(schema, "")
    return found


# --- Recording -------------------------------------------------------------------------------------------------------


@dataclass
class Recorder:
    """Turns one case's outputs and files into what must stay the same, and into texts that may change."""

    folder: Path
    noisy: bool = False
    names: dict[str, str] = field(default_factory=dict)
    """Text that differs in every recording, and what is recorded in its place."""
    texts: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Where the work lies differs; a checkout may lie anywhere as well.
        self.names[str(self.folder.parent)] = "<work>"
        self.names[str(TREE)] = "<tree>"

    def rename_runs(self) -> None:
        """Give new run directories a fixed name: theirs is made of date and time."""
        runs = self.folder / "runs"
        fixed = re.compile(r"run(-\d+)?|evaluations")
        for path in sorted(runs.iterdir()) if runs.is_dir() else ():
            if path.is_dir() and not fixed.fullmatch(path.name):
                free = next(name for name in ("run", *(f"run-{n}" for n in range(2, 99))) if not (runs / name).exists())
                self.names[path.name] = free
                path.rename(runs / free)

    def clean(self, text: str) -> str:
        for old, new in self.names.items():
            text = text.replace(old, new)
        return text

    def command(self, words: Words, done: Done) -> Record:
        """Return a command's record: its exit code, and what it printed where that is data."""
        where = shlex.join(("fedtune", *words))
        if done.exit == 1 or "Traceback" in done.stderr:
            print(f"  {where}: exit code {done.exit}: {done.stderr.strip().splitlines()[-1:]}", flush=True)
        if said := "\n".join(line for line in done.stderr.splitlines() if line.startswith(("warning:", "error:"))):
            self.texts[f"{where}: stderr"] = self.clean(said)
        record: Record = {"exit": done.exit}
        if "--json" in words and done.stdout:
            try:
                output = json.loads(done.stdout)
            except ValueError:
                output = {"not JSON": done.stdout}
            record["output"] = self.plain(output, f"{where}: output")
        elif "--dry-run" in words and words[0] == "train" and done.stdout:
            # The plan below the config is in comments.
            record["output"] = self.plain(tomllib.loads(done.stdout), f"{where}: output")
            self.texts[f"{where}: stdout"] = self.clean(done.stdout)
        elif done.stdout:
            self.texts[f"{where}: stdout"] = without_times(self.clean(done.stdout))
        return record

    def files(self) -> Record:
        """Return the records of all files in the case's folder."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                name = path.relative_to(self.folder).as_posix()
                # A journal's name ends in a hash of all that it depends on, fedtune's version among it.
                name = re.sub(r"(/answers/.*)-[0-9a-f]{8}(\.jsonl)", r"\1\2", name)
                found[name] = self.file(path, name)
        return found

    def file(self, path: Path, name: str) -> Any:
        """Return the record of one file: whatever in it must stay the same."""
        data = path.read_bytes()
        match path.suffix:
            case ".safetensors":
                return None if self.noisy else tensors_record(data)
            case ".key" | ".log":
                return None  # a random secret; texts with times
            case ".html":
                return None if self.noisy else self.page(data.decode())  # its curves follow from the noise
            case ".md":
                text = self.clean(data.decode())
                self.texts[name] = text
                return {"numbers": numbers(text)}
            case ".py":
                # A submission's apps import fedtune's modules, which a refactoring moves: record only that they compile.
                ast.parse(data)
                self.texts[name] = data.decode()
                return {"compiles": True}
            case ".txt":
                return self.clean(data.decode()).splitlines()
            case ".toml":
                return self.plain(tomllib.loads(data.decode()), name)
            case ".json" if path.name == "manifest.json":
                # Files with times have another hash in every recording: it must be the hash of the file in this folder.
                return {
                    each: (path.parent / each).is_file() and sha256((path.parent / each).read_bytes()) == digest
                    for each, digest in json.loads(data).items()
                }
            case ".json" if path.name == "account.json":
                table = json.loads(data)  # each account holds a random secret, and the file a hash over all
                accounts = {name: {**account, "key": None} for name, account in table["accounts"].items()}
                for release in (each for account in accounts.values() for each in account["releases"] if self.noisy):
                    release["digest"] = None
                return {"json": self.plain({**table, "accounts": accounts, "sha256": None}, name)}
            case ".json":
                value = json.loads(data)
                plain = self.plain(value, name)
                # Where nothing was removed, the layout of the file must stay as well.
                return {"json": plain, "sha256": sha256(data)} if plain == value else {"json": plain}
            case ".jsonl":
                lines = [self.plain(json.loads(line), name) for line in data.decode().splitlines()]
                # A journal's lines of times, one per batch, whose size depends on the free memory.
                lines = [line for line in lines if not (isinstance(line, dict) and set(line) == {"prompt_tokens"})]
                if len(lines) <= 200:
                    return lines
                return {"lines": len(lines), "sha256": sha256(json.dumps(lines).encode())}
        return {"bytes": len(data), "sha256": sha256(data)}

    def page(self, text: str) -> Record:
        """Return a report's curves as they are, and the numbers in its text, whose words may change."""
        text = self.clean(text)
        curves = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
        words = re.sub(r"<style>.*?</style>|<svg.*?</svg>|<[^>]*>", " ", text, flags=re.DOTALL)
        return {"curves": [sha256(each.encode()) for each in curves], "numbers": numbers(words)}

    def plain(self, value: Any, where: str) -> Any:
        """Return a JSON value without what differs from one recording to the next."""
        if isinstance(value, str):
            return self.clean(value)
        if isinstance(value, list):
            return [self.plain(each, f"{where}[{place}]") for place, each in enumerate(value)]
        if not isinstance(value, dict):
            return value
        kept: Record = {}
        untold = {"train_loss", "losses"} if self.noisy and value.get("round", 1) > 1 else set()
        untold |= {"last_loss"} if self.noisy else set()
        for key, each in value.items():
            if key in TIMES or key in untold:
                continue
            if key in PROSE and (isinstance(each, str) or is_texts(each)):
                text = self.clean("\n".join([each] if isinstance(each, str) else each))
                self.texts[f"{where}.{key}"] = text
                kept[key] = {"numbers": numbers(text), "texts": 1 if isinstance(each, str) else len(each)}
            elif key == "versions" and isinstance(each, dict):
                kept[key] = {name: number for name, number in each.items() if name != "fedtune"}  # a release changes it
            elif key == "dependencies" and is_texts(each):
                kept[key] = [re.sub(r"==.*", "", name) for name in each]  # fedtune's version once more
            elif key == "files" and isinstance(each, dict):
                resized = [name for name in each if any(fnmatch.fnmatch(name, pattern) for pattern in RESIZED)]
                kept[key] = each | dict.fromkeys(resized)
            else:
                kept[key] = self.plain(each, f"{where}.{key}")
        return kept


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def without_times(text: str) -> str:
    """Return a printed text without seconds, and without a table's last column where that is a speed."""
    if "questions/s" in text:
        text = re.sub(r"[\d.,]+(?= │$)", "…", text, flags=re.MULTILINE)
    return re.sub(r"\d+(\.\d+)? s\b", "… s", text)


def numbers(text: str) -> list[str]:
    return NUMBER.findall(text)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tensors_record(data: bytes) -> Record:
    """Return the hashes of a safetensors file: of all of it, of its header (names, shapes, types) and of its values.

    The state of a private client holds its secret, a random `noise_key`: then only the hash of the other values is recorded.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header, values = data[8:start], data[start:]
    places = {name: each["data_offsets"] for name, each in json.loads(header).items() if name != "__metadata__"}
    public = [place for name, place in sorted(places.items()) if not re.search(r"(^|[._])key$", name)]
    if len(public) < len(places):
        return {"header": sha256(header), "values": sha256(b"".join(values[first:last] for first, last in public))}
    return {"sha256": sha256(data), "header": sha256(header), "values": sha256(values)}


def record_case(case: Case, folder: Path, driver: Driver) -> tuple[Record, dict[str, str]]:
    """Run a case's commands; return what must stay the same, and the texts."""
    folder.mkdir()
    recorder = Recorder(folder, case.noisy)
    commands: Record = {}
    for step in case.steps:
        run = run_alone if case.own_process else driver.run
        if callable(step):
            step(folder, run)
            continue
        done = run(step, folder)
        recorder.rename_runs()
        where = shlex.join(step)
        if where in commands:
            where += " (again)"
        commands[where] = recorder.command(step, done)
        if case.mistakes and step is not case.steps[0]:
            error = re.search(r"^error:.*(\n  .*)?", done.stderr, re.IGNORECASE | re.MULTILINE)
            commands[where] = {"exit": done.exit, "text": recorder.clean(error[0] if error else done.stderr)}
    if case.mistakes:
        return commands, {}
    return {"commands": commands, "files": recorder.files()}, recorder.texts


def record(options: argparse.Namespace) -> int:
    """Record the chosen cases into a file; return the exit code."""
    began = time.monotonic()
    result: Record = {"about": about(), "cases": {}, "mistakes": {}, "texts": {}}
    with tempfile.TemporaryDirectory(prefix="golden-") as place:
        work = Path(place).resolve()
        write_inputs(work / "inputs")
        if options.engines:
            record_engines(work, result)
        driver = Driver(work)
        told = driver.ask(schema=True)
        cases = cases_of(choices_in(told["schema"]), told["presets"])
        chosen = [case for case in cases if is_chosen(case, options)]
        for number, case in enumerate(chosen, 1):
            start = time.monotonic()
            kept, texts = record_case(case, work / re.sub(r"\W+", "-", case.name), driver)
            result["mistakes" if case.mistakes else "cases"][case.name] = kept
            result["texts"][case.name] = texts
            shutil.rmtree(work / re.sub(r"\W+", "-", case.name))
            print(f"{number}/{len(chosen)} {case.name} · {time.monotonic() - start:.1f} s", flush=True)
        driver.close()
    problems = broken_promises(result["cases"])
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    count = len(result["cases"]) + len(result["mistakes"])
    values = sum(1 for section in ("cases", "mistakes") for _ in leaves(result[section]))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = f"{time.monotonic() - began:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of it on a core"
    print(f"wrote {options.out}: {count} cases, {values:,} values, {seconds}")
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def is_chosen(case: Case, options: argparse.Namespace) -> bool:
    if options.only:
        return any(fnmatch.fnmatch(case.name, pattern) for pattern in options.only)
    return case.quick or not options.quick


def about() -> Record:
    """Return what the hashes hold for: the machine and the versions."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def adapters_in(case: Record) -> dict[str, str]:
    """Return the hash of every adapter of a case's runs, by its folder's name."""
    names = {
        Path(name).parent.name: each
        for name, each in case["files"].items()
        if name.endswith("adapter_model.safetensors")
    }
    return {name: each["sha256"] for name, each in names.items() if name.startswith("peft_")}


def broken_promises(cases: Record) -> list[str]:
    """Return which cases did not end with the adapters of the case that they must agree with."""
    found = []
    for name, other in SAME_ADAPTERS.items():
        if name in cases and other in cases:
            ours, theirs = adapters_in(cases[name]), adapters_in(cases[other])
            if not ours or ours != theirs:
                found.append(f"{name}: its adapters are not those of {other}")
    return found


# --- Engines ---------------------------------------------------------------------------------------------------------


def record_engines(work: Path, result: Record) -> None:
    """Record the same federations on every engine: clients in this process, on Ray, and as nodes of a SuperLink."""
    files = work / "inputs" / "clients"
    settings = (*SMALL, *sets("federation.rounds=2"))
    half = (*settings, *sets("federation.fraction=0.5"))
    three = (*settings, *sets("federation.clients=3"))
    for name, words in {
        "engine in-process": half,
        "engine ray": (*half, "--engine", "ray"),
        "engine in-process, three files": (*settings, "--data", str(files)),
    }.items():
        result["cases"][name] = record_engine(work, name, words)
    with superlink(work, files) as address:
        words = (*three, "--superlink", address)
        # The port is a free one, another in every recording.
        result["cases"]["engine superlink"] = record_engine(work, "engine superlink", words, {address: "<superlink>"})


def record_engine(work: Path, name: str, words: Words, names: Mapping[str, str] | None = None) -> Record:
    start = time.monotonic()
    folder = work / re.sub(r"\W+", "-", name)
    folder.mkdir()
    done = run_alone(words, folder)
    recorder = Recorder(folder)
    recorder.names.update(names or {})
    recorder.rename_runs()
    command = recorder.command(words, done)
    files = {
        path: each for path, each in recorder.files().items() if "/state/" not in path and not path.endswith(".html")
    }
    for path, lines in files.items():
        if path.endswith(("ledger.jsonl", "metrics.jsonl")):
            # Replies arrive in the order in which clients finish; node ids and their lengths are Flower's, drawn at random.
            plain = ({key: value for key, value in line.items() if key != "serialised_bytes"} for line in lines)
            files[path] = sorted(plain, key=lambda line: json.dumps(line, sort_keys=True))
    print(f"{name} · {time.monotonic() - start:.1f} s", flush=True)
    return {"commands": {recorder.clean(shlex.join(words)): command}, "files": files}


@contextlib.contextmanager
def superlink(work: Path, files: Path) -> Iterator[str]:
    """Start a SuperLink on the loopback, with a node for each file, and give its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    address = f"127.0.0.1:{port}"
    running: list[subprocess.Popen[bytes]] = []

    def start(name: str, ready: str, *command: str) -> None:
        said = work / f"{name}.log"
        with said.open("wb") as log:
            running.append(subprocess.Popen(command, cwd=work, env=environment(work), stdout=log, stderr=log))
        deadline = time.monotonic() + 300
        while ready not in said.read_text(errors="replace"):
            if time.monotonic() > deadline or running[-1].poll() is not None:
                raise RuntimeError(f"{name} did not start: {said.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)

    try:
        start("superlink", "running on", "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port))
        for number, file in enumerate(sorted(files.iterdir())):
            words = ("node", "--superlink", address, "--insecure", "--challenge", "tiny", "--partition", str(number))
            command = (sys.executable, "-c", entry_code(TREE), *words, "--data", str(file))
            start(f"node-{number}", "SuperNode ID", *command)
        yield address
    finally:
        for process in reversed(running):
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


# --- Comparing -------------------------------------------------------------------------------------------------------

Keys = tuple[str, ...]
MISSING = object()


def leaves(value: Any, path: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Yield every value of a record that holds no other, with its path; of an empty object or list the object itself."""
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from leaves(each, (*path, key))
    elif isinstance(value, list) and value:
        for place, each in enumerate(value):
            yield from leaves(each, (*path, f"[{place}]"))
    else:
        yield path, value


def differences(before: Any, after: Any) -> list[tuple[Keys, Any, Any]]:
    """Return the paths at which two records differ, with both values; MISSING where one of them has none."""
    old, new = dict(leaves(before)), dict(leaves(after))
    found = [(path, old.get(path, MISSING), new.get(path, MISSING)) for path in dict.fromkeys((*old, *new))]
    return [each for each in found if not is_same(*each[1:])]


def is_same(one: Any, other: Any) -> bool:
    """Whether two values are the same in type and digits: 1 is not 1.0, and NaN is NaN."""
    if one is MISSING or other is MISSING:
        return one is other
    return json.dumps(one) == json.dumps(other)


def shown(value: Any) -> str:
    text = "nothing" if value is MISSING else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 90 else f"{text[:87]}…"


def place_of(path: Keys) -> str:
    """Return where a value stands, in words: file or command, then the keys inside it."""
    if path[:1] == ("commands",):
        path = (f"fedtune {path[1]}", *path[2:])
    elif path[:1] == ("files",):
        path = path[1:]
    first, rest = (path[0], path[1:]) if path else ("the whole case", ())
    inside = ".".join(rest).replace(".[", "[")
    return f"{first}: {inside}" if inside else first


def compare(options: argparse.Namespace) -> int:
    """Print how two recordings differ; return the exit code."""
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (options.before, options.after))
    for path, old, new in differences(before["about"], after["about"]):
        print(f"note: recorded with another {' '.join(path)}: {shown(old)} and {shown(new)}; hashes may differ for it")
    failed, count, cases = 0, 0, 0
    for section in ("cases", "mistakes"):
        for name in dict.fromkeys((*before[section], *after[section])):
            old, new = before[section].get(name), after[section].get(name)
            if old is None or new is None:
                if not options.common:
                    print(f"{name}: only in {options.before if new is None else options.after}")
                    failed += 1
                continue
            found = differences(old, new)
            if section == "mistakes":
                # Their texts may change on purpose.
                texts = [each for each in found if each[0][-1] == "text"]
                found = [each for each in found if each not in texts]
                show(f"text of a mistake in {name}", texts, options.all)
            excepted = [each for each in found if is_excepted(name, each[0], options.exceptions)]
            found = [each for each in found if each not in excepted]
            if excepted:
                print(f"{name}: {len(excepted)} differences are excepted")
            show(name, found, options.all)
            failed += len(found)
            cases += 1
            count += sum(1 for _ in leaves(old))
    changed = [
        (name, differences(old, after["texts"][name]))
        for name, old in before["texts"].items()
        if name in after["texts"] and old != after["texts"][name]
    ]
    if changed:
        number = sum(len(found) for _, found in changed)
        print(f"{number} texts of {len(changed)} cases have changed, which is no difference (--texts shows them)")
        if options.texts:
            for name, found in changed:
                show(f"text in {name}", found, options.all)
    if failed:
        print(f"{failed} differences in {cases} cases")
        return 1
    print(f"the same: {count:,} values in {cases} cases")
    return 0


def is_excepted(case: str, path: Keys, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(f"{case}: {place_of(path)}", pattern) for pattern in patterns)


def show(name: str, found: Sequence[tuple[Keys, Any, Any]], all_of_them: bool) -> None:
    limit = len(found) if all_of_them else 10
    for path, old, new in found[:limit]:
        print(f"{name}: {place_of(path)}: {shown(old)} → {shown(new)}")
    if found[limit:]:
        print(f"{name}: … and {len(found) - limit} more (--all shows them)")


def main() -> None:
    global TREE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run the cases and write what they do")
    recording.add_argument("out", type=Path, metavar="OUT.json")
    recording.add_argument("--quick", action="store_true", help="only the cases that are marked as quick")
    recording.add_argument(
        "--only", metavar="NAME", action="append", help="cases by name, with * and ?; may be repeated"
    )
    recording.add_argument("--engines", action="store_true", help="also Ray and a SuperLink, which take minutes")
    recording.add_argument("--tree", type=Path, default=ROOT, help="the checkout to record; this one unless given")
    comparing = commands.add_parser("compare", help="exit code 1 and a list where two recordings differ")
    comparing.add_argument("before", type=Path, metavar="BEFORE.json")
    comparing.add_argument("after", type=Path, metavar="AFTER.json")
    comparing.add_argument("--common", action="store_true", help="only the cases that both have")
    comparing.add_argument("--all", action="store_true", help="every difference, not ten a case")
    comparing.add_argument("--texts", action="store_true", help="also the texts that have changed")
    comparing.add_argument(
        "--except",
        dest="exceptions",
        metavar="PATTERN",
        action="append",
        default=[],
        help="differences that are wanted, as 'CASE: FILE*' with * and ?; may be repeated",
    )
    driving = commands.add_parser("drive", help="for the script itself: run the commands that come on stdin")
    driving.add_argument("tree")
    options = parser.parse_args()
    if options.command == "drive":
        drive(options.tree)
        return
    if options.command == "record":
        TREE = options.tree.resolve()
    sys.exit(record(options) if options.command == "record" else compare(options))


if __name__ == "__main__":
    main()
