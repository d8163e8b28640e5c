"""Every family through the command line: train, read back, evaluate, merge; each compared with plain transformers and PEFT.

The table has one row for each family (and for some also with `adapter.targets=all-linear`):

    trained    the run's adapter is the one that plain transformers, PEFT and torch train on the same rows
    read back  PeftModel.from_pretrained finds every tensor in the run's adapter, with its values
    evaluated  the answers of `fedtune eval` are those of one prompt at a time, and the path that it took
    merged     the logits of `fedtune export --to merged` are those of base and adapter

A cell is `ok`, `refused: …` where the command ended with one sentence and exit code 2 or 3, or `FAILED: …`. A refusal that
REFUSED does not name fails too.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from support.families import FAMILIES, NOT_CAUSAL, build
from support.table import Rows, printed
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from fedtune.cli.app import app
from fedtune.config.load import load_config
from fedtune.config.schema import FedTuneConfig
from fedtune.data.order import steps_of_round
from fedtune.data.tokenize import TokenizedRows
from fedtune.federation.workspace import Workspace
from fedtune.models.adapter import initial_tensors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # what transformers and PEFT say about 150 models is not tested here
]

CELLS = ("trained", "read back", "evaluated", "merged")
REFUSED: dict[tuple[str, str], str] = {
    **{(name, "default"): "trained" for name in NOT_CAUSAL},
    ("reformer", "default"): "trained",  # its reversible layers pass no gradient to an adapter
    ("mamba", "all-linear"): "trained",  # PEFT refuses out_proj, past which its kernels go
    ("phimoe", "all-linear"): "trained",  # its router returns a tuple, which LoRA cannot wrap
    ("hrm_text", "default"): "merged",  # its files hold fused projections that the merge does not take apart
}
"""Families and targets that a command must refuse, and the cell that it refuses."""
ALL_LINEAR = (
    "bloom",
    "gemma3_vlm",
    "gpt2",
    "lfm2",
    "llama",
    "mamba",
    "mixtral",
    "phimoe",
    "qwen3_moe",
    "qwen3_next",
    "zamba2",
)
"""Families that are also tried with LoRA on all linear modules, MoE experts included where PEFT can."""
CASES = [(name, "default") for name in FAMILIES] + [(name, "all-linear") for name in ALL_LINEAR]
QUESTIONS = 6
RATE = 1e-2
"""So large that the adapter moves the logits far beyond rounding."""


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Rows]:
    yield from printed(request, ("family", "targets", *CELLS, "what went wrong"))


class RefusedError(Exception):
    """A command ended with one sentence."""


def fedtune(*words: str, cwd: Path) -> str:
    """Run a command in this process, which has paid for the imports; return its stdout."""
    with contextlib.chdir(cwd):
        done = CliRunner().invoke(app, list(words))
    if done.exit_code in (2, 3):
        raise RefusedError(" ".join(line.strip() for line in done.stderr.splitlines() if line.strip()))
    assert done.exit_code == 0, f"exit {done.exit_code}: {done.stderr.strip()[-400:]} {done.exception or ''}"
    return done.stdout


def settings(base: Path, data: Path, targets: str) -> list[str]:
    return [
        f"model.base='{base}'",
        "model.quantization='none'",
        "model.compute_dtype='fp32'",
        f"adapter.targets='{targets}'",
        "adapter.rank=4",
        "adapter.alpha=8",
        "adapter.dropout=0.0",
        f"data.source='{data}'",
        "data.instruction='{question}'",
        "data.response='{answer}'",
        "federation.clients=1",
        "federation.fraction=1.0",
        "federation.rounds=1",
        "training.max_steps=3",
        "training.batch_size=4",
        f"training.learning_rate_max={RATE}",
        f"training.learning_rate_min={RATE}",
        "training.gradient_clip=1.0",
    ]


def sentence(generator: np.random.Generator, most: int) -> str:
    words = [
        "red",
        "green",
        "blue",
        "yellow",
        "one",
        "two",
        "three",
        "four",
        "five",
        "the",
        "cat",
        "sees",
        "a",
        "dog",
        "and",
        "is",
        "here",
        "in",
        "a",
        "house",
    ]
    return " ".join(generator.choice(words, int(generator.integers(1, most))))


def write_rows(path: Path) -> Path:
    """Write 12 rows of different lengths, some longer than a window of 16 tokens."""
    generator = np.random.default_rng(0)
    rows = [{"question": sentence(generator, 30) + "?", "answer": sentence(generator, 12)} for _ in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_questions(path: Path) -> None:
    """Write questions of different lengths, in the form of the Financial PhraseBank; all are longer than the windows."""
    generator = np.random.default_rng(1)
    rows = [{"sentence": sentence(generator, 30) + " .", "label": i % 3} for i in range(QUESTIONS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def plain_model(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval().requires_grad_(False)


def train_plainly(base: Path, lora: LoraConfig, config: FedTuneConfig, rows: TokenizedRows) -> dict[str, torch.Tensor]:
    """Train the run's steps with transformers, PEFT and torch alone, and return the adapter as PEFT saves it."""
    lora.inference_mode = False
    model = get_peft_model(plain_model(base), lora)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = {name.replace(".default", ""): parameter for name, parameter in trained.items()}
    start = initial_tensors({name: tuple(p.shape) for name, p in saved.items()}, config.seed)
    with torch.no_grad():
        for name, parameter in saved.items():
            parameter.copy_(start[name])
    model.train()
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=config.training.weight_decay)
    order = {"seed": config.seed, "partition": 0, "server_round": 1, "reshuffle": config.data.reshuffle}
    for step in steps_of_round(len(rows), config.training, **order):  # type: ignore[arg-type]
        count = sum(len(rows.input_ids[i]) - int(rows.prompt_lengths[i]) for i in step)
        for i in step:
            ids, first = torch.tensor(rows.input_ids[i]).long()[None], int(rows.prompt_lengths[i])
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
            logits = model(**inputs).logits[0, first - 1 : -1]
            (torch.nn.functional.cross_entropy(logits, ids[0, first:], reduction="sum") / count).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return float(sum(tensor.float().square().sum() for tensor in tensors.values())) ** 0.5


class Family:
    """One family's way through the commands; each method is a cell."""

    def __init__(self, name: str, targets: str, folder: Path) -> None:
        self.folder = folder
        self.base = build(name, folder)
        self.words = settings(self.base, write_rows(folder / "rows.jsonl"), targets)
        self.adapter = folder

    def trained(self) -> str:
        flags = [word for setting in self.words for word in ("--set", setting)]
        fedtune("train", *flags, "--out", str(self.folder / "runs"), "--json", cwd=self.folder)
        [run] = (self.folder / "runs").iterdir()
        self.adapter = run / "peft_1"
        config = load_config(settings=self.words).config
        found = load_file(self.adapter / "adapter_model.safetensors")
        rows = Workspace(config).rows(0)
        expected = train_plainly(self.base, LoraConfig.from_pretrained(self.adapter), config, rows)
        # What never receives a gradient need not travel: plain PEFT then leaves its B at zero.
        left_out = expected.keys() - found.keys()
        assert not found.keys() - expected.keys(), f"extra tensors: {sorted(found.keys() - expected.keys())[:3]}"
        moved = [key for key in left_out if ".lora_B." in key and bool(expected[key].any())]
        assert not moved, f"tensors that plain PEFT trains are missing: {moved[:3]}"
        difference = norm({key: found[key] - expected[key] for key in found})
        # B starts at zero, so its norm is how far it went.
        way = norm({key: tensor for key, tensor in expected.items() if "lora_B" in key or "lora_embedding_B" in key})
        assert way > 0
        assert difference < 0.01 * way, f"the adapter differs by {difference / way:.1e} of the way it went"
        return f"ok {difference / way:.0e}"

    def read_back(self) -> str:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(plain_model(self.base), self.adapter)
        lost = [str(each.message) for each in said if "missing adapter keys" in str(each.message).lower()]
        assert not lost, lost[0][:200]
        held = get_peft_model_state_dict(model, save_embedding_layers=False)
        saved = load_file(self.adapter / "adapter_model.safetensors")
        assert held.keys() == saved.keys(), f"PEFT has other tensors: {sorted(held.keys() ^ saved.keys())[:3]}"
        assert all(torch.equal(held[key].float(), saved[key].float()) for key in saved), "PEFT read other values"
        return "ok"

    def evaluated(self) -> str:
        write_questions(self.folder / "fpb.jsonl")
        words = [
            "--bench",
            "fpb",
            "--data-dir",
            str(self.folder),
            "--peft",
            str(self.adapter),
            "--verify",
            str(QUESTIONS),
        ]
        out = fedtune("eval", *words, "--out", str(self.folder / "results"), "--json", cwd=self.folder)
        [result] = json.loads(out)["results"]
        agreement = result["verified"]
        assert agreement["asked"] == QUESTIONS
        assert agreement["equal"] + agreement["ties"] == QUESTIONS, (
            f"{agreement['equal']} of {QUESTIONS} answers are the same one by one"
        )
        return f"ok {result.get('path') or ''}".strip()

    def merged(self) -> str:
        out = self.folder / "merged"
        run = str(self.adapter.parent)
        fedtune("export", run, "--to", "merged", "--out", str(out), "--json", cwd=self.folder)
        ids = torch.randint(3, 850, (1, 24), generator=torch.Generator().manual_seed(1))
        both = PeftModel.from_pretrained(plain_model(self.base), self.adapter).eval()
        with torch.no_grad():
            expected, found = both(input_ids=ids).logits, plain_model(out)(input_ids=ids).logits
            with both.disable_adapter():
                base = both(input_ids=ids).logits
        size = float(expected.abs().max())
        assert float((expected - base).abs().max()) > 1e-3 * size, "the adapter changes nothing"
        difference = float((found - expected).abs().max()) / size
        assert difference < 1e-3, f"the logits differ by {difference:.1e} of the largest"
        return f"ok {difference:.0e}"


@pytest.mark.parametrize(("name", "targets"), CASES)
def test_a_family_gives_what_plain_transformers_and_peft_give(
    name: str, targets: str, table: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    family = Family(name, targets, tmp_path)
    cells: dict[str, str] = {}
    for cell in CELLS:
        try:
            cells[cell] = getattr(family, cell.replace(" ", "_"))()
        except RefusedError as refusal:
            cells[cell] = f"refused: {refusal}"
        except Exception as error:
            cells[cell] = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if cell == "trained" and not cells[cell].startswith("ok") and family.adapter == tmp_path:
            break  # there is no adapter to go on with
    short = [cells.get(cell, "-").partition(":")[0] for cell in CELLS]
    table.append((name, targets, *short, " | ".join(t for t in cells.values() if not t.startswith("ok"))[:400]))
    del family
    gc.collect()
    failed = {cell: text for cell, text in cells.items() if text.startswith("FAILED")}
    assert not failed, failed
    refused = [cell for cell, text in cells.items() if text.startswith("refused")]
    assert refused == ([REFUSED[name, targets]] if (name, targets) in REFUSED else []), cells
