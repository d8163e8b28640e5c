"""A base that does not pass its checks is refused by every command that takes one, in one sentence and before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.families import build
from typer.testing import CliRunner, Result

from fedtune.cli.app import app
from fedtune.config.schema import BUILTIN_TINY, ModelConfig
from fedtune.models.hub import resolve_base

Change = Callable[[Path], object]


def without_a_layers_mlp(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.2.mlp.")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def stored_as_gptq(folder: Path) -> None:
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def not_causal(folder: Path) -> None:
    shutil.copytree(build("bert", folder.parent), folder, dirs_exist_ok=True)


def edit(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


CASES: dict[str, tuple[Change, int, str]] = {
    "weights missing": (without_a_layers_mlp, 3, "missing: model.layers.2.mlp.down_proj.weight"),
    "stored quantized": (stored_as_gptq, 2, "stored as gptq with 4 bits"),
    "not causal": (not_causal, 2, "is not causal"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), 3, "holds a JSON list"),
    "layers are a word": (lambda folder: edit(folder, num_hidden_layers="two"), 3, 'num_hidden_layers = "two" in its'),
    "no positions": (
        lambda folder: edit(folder, max_position_embeddings=0),
        3,
        "max_position_embeddings = 0, which must",
    ),
    "own code": (
        lambda folder: edit(folder, model_type="own", auto_map={"AutoConfig": "a.B"}),
        2,
        "runs code of its own",
    ),
}
ONLY_LOADED = ("weights missing", "not causal")
"""What config.json and the headers alone do not show."""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return Path(shutil.copytree(resolve_base(ModelConfig(base=BUILTIN_TINY)).folder, tmp_path / "tiny"))


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "400"})


def check(result: Result, code: int, words: str) -> None:
    assert result.exit_code == code, result.stderr
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert "internal error" not in result.stderr
    assert "fault of fedtune" not in result.stderr


def settings(base: Path) -> list[str]:
    return ["--set", f'model.base="{base}"', "--set", "model.quantization=none"]


@pytest.mark.parametrize(("change", "code", "words"), CASES.values(), ids=CASES)
def test_train_and_eval(tiny: Path, tmp_path: Path, change: Change, code: int, words: str) -> None:
    change(tiny)
    check(invoke("train", "--challenge", "tiny", "--out", tmp_path / "runs", *settings(tiny)), code, words)
    assert not list((tmp_path / "runs").glob("*")), "refused before a run directory is made"
    out = ["--out", tmp_path / "scores", "--quantization", "none"]
    check(invoke("eval", "--base", "--bench", "tiny", "--model", tiny, *out), code, words)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ONLY_LOADED])
def test_dry_run_and_node(tiny: Path, tmp_path: Path, name: str) -> None:
    change, code, words = CASES[name]
    change(tiny)
    data = tmp_path / "mine.jsonl"
    data.write_text(json.dumps({"instruction": "Say it.", "input": "", "output": "A"}) + "\n")
    node = [
        "--superlink",
        "127.0.0.1:1",
        "--partition",
        "0",
        "--dry-run",
        "--insecure",
        "--data",
        data,
        "--model",
        tiny,
    ]
    check(invoke("node", *node), code, words)
    plan = invoke("train", "--challenge", "tiny", "--dry-run", *settings(tiny))
    if code == 2:
        check(plan, code, words)
    else:  # a plan that cannot know its bytes says why
        assert plan.exit_code == 0
        assert words in plan.stdout


def test_a_node_names_a_row_that_its_base_cannot_take(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["<sep>"])
    tokenizer.save_pretrained(tiny)
    data = tmp_path / "mine.jsonl"
    rows = [{"text": text, "answer": "A"} for text in ("Say it.", "Say <sep> it.")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    node = [
        "--superlink",
        "127.0.0.1:1",
        "--partition",
        "0",
        "--dry-run",
        "--insecure",
        "--data",
        data,
        "--model",
        tiny,
    ]
    mine = ["--set", 'data.instruction="{text}"', "--set", 'data.response="{answer}"']
    check(invoke("node", *node, *mine), 2, "Row 2 of mine.jsonl (counted from 1) holds the token '<sep>' (858)")


def test_a_rank_that_no_memory_holds_is_no_internal_error(tmp_path: Path) -> None:
    words = ["train", "--challenge", "tiny", "--dry-run", "--set", "adapter.rank=1000000000000"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 3
    assert "Memory does not suffice: 476,837.2 GiB were requested." in " ".join(result.stderr.split())
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(app, ["eval", "--bench", "tiny", "--peft", str(tmp_path / "empty")])
    assert result.exit_code == 3
    assert "has no file adapter_config.json" in " ".join(result.stderr.split())
