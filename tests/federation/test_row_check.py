"""Rows that a base model cannot take are found before the first training step, on every side."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import build
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fedtune.config.load import load_config
from fedtune.config.schema import BUILTIN_TINY, FedTuneConfig, ModelConfig
from fedtune.errors import ClientError, UsageError
from fedtune.federation.events import Event, StepDone
from fedtune.federation.node.policy import NodeSettings, config_on_node
from fedtune.federation.row_check import RowsError
from fedtune.federation.train import train
from fedtune.federation.workspace import NodeWorkspace
from fedtune.models.hub import resolve_base
from fedtune.models.limits import Limits, first_excess, limits_of
from fedtune.runs.directory import RunDirectory

SECRET = "Mrs Quimby"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return Path(shutil.copytree(resolve_base(ModelConfig(base=BUILTIN_TINY)).folder, tmp_path / "tiny"))


def add_token(folder: Path, **special: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if special:
        tokenizer.add_special_tokens(special)
    else:
        tokenizer.add_tokens(["<sep>"])
    tokenizer.save_pretrained(folder)


def rows(path: Path, texts: Sequence[str]) -> Path:
    """Write a file of instructions; a long text is the response to a short one, and one without text has no response."""
    long = [len(text) > 100 for text in texts]
    lines = [
        {"instruction": "Say it." if is_long else text, "output": text if is_long else "yes" if text else ""}
        for text, is_long in zip(texts, long, strict=True)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config_of(base: Path, data: Path, *settings: str) -> FedTuneConfig:
    mine = [
        f'model.base="{base}"',
        f'data.source="{data}"',
        'data.partitioner="iid"',
        "model.quantization=none",
        'adapter.targets="all-linear"',
        "federation.clients=2",
        "federation.fraction=1.0",
        "federation.rounds=1",
        "training.max_steps=1",
        "training.batch_size=2",
        'data.instruction="{instruction}"',
        'data.response="{output}"',
        *settings,
    ]
    return load_config(settings=mine).config


def refused(config: FedTuneConfig, out: Path) -> str:
    events: list[Event] = []
    with pytest.raises(UsageError) as caught:
        train(config, out=out, listener=events.append)
    assert caught.value.exit_code == 2
    assert not any(isinstance(event, StepDone) for event in events)
    return str(caught.value)


def test_a_token_without_an_embedding_is_named_with_its_row(tiny: Path, tmp_path: Path) -> None:
    add_token(tiny)
    data = rows(tmp_path / "rows.jsonl", [*["Say it."] * 9, "A <sep> B", *["Say it."] * 2])
    text = refused(config_of(tiny, data), tmp_path / "runs")
    assert "holds the token '<sep>' (858), which has no embedding" in text
    assert "has 858 embeddings (ids 0 to 857)" in text
    assert " of client " in text


def test_the_rows_number_counts_rows_that_were_skipped(tiny: Path, tmp_path: Path) -> None:
    add_token(tiny)
    data = rows(tmp_path / "rows.jsonl", ["Say it.", "", "Say it.", "A <sep> B", "<sep>"])
    with pytest.raises(RowsError, match=r"Row 4 of this node's data \(counted from 1\) holds the token '<sep>'"):
        direct(tiny, data)


def direct(base: Path, data: Path, *settings: str) -> None:
    """Tokenise as a node does, without its wrapping of errors."""
    workspace = node(base, data, *settings)
    super(NodeWorkspace, workspace).rows(0)


def node(base: Path, data: Path, *settings: str) -> NodeWorkspace:
    config = config_of(base, data, *settings)
    own = NodeSettings(data=str(data), base=str(base))
    return NodeWorkspace(config_on_node(config.model_dump_json(), "", own))


def test_a_node_keeps_token_and_row_to_itself(tiny: Path, tmp_path: Path, caplog: Any) -> None:
    add_token(tiny)
    data = rows(tmp_path / "rows.jsonl", ["Say it.", f"{SECRET} <sep>"])
    with pytest.raises(ClientError) as caught:
        node(tiny, data).rows(0)
    assert str(caught.value) == "Rows of this node's data hold tokens that the base model has no embedding for."
    assert "Row 2 of this node's data (counted from 1) holds the token '<sep>'" in caplog.text


def test_a_node_keeps_its_paths_to_itself_when_its_base_is_refused(tmp_path: Path, caplog: Any) -> None:
    folder = build("bert", tmp_path)
    data = rows(tmp_path / "rows.jsonl", ["Say it."] * 4)
    with pytest.raises(ClientError) as caught:
        node(folder, data).base  # noqa: B018
    assert str(caught.value) == "This node's base model is refused (model.base); its own log says why."
    assert "is not causal" in caplog.text
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ClientError, match="This node's base model is refused"):
        node(folder, data).base  # noqa: B018


def test_a_token_that_no_row_uses_stops_nothing(tiny: Path, tmp_path: Path, caplog: Any) -> None:
    add_token(tiny)
    data = rows(tmp_path / "rows.jsonl", ["Say it."] * 8)
    train(config_of(tiny, data), out=tmp_path / "runs")
    assert "knows 1 tokens without a row in the embedding" in caplog.text


def test_an_end_of_text_without_an_embedding(tiny: Path, tmp_path: Path) -> None:
    add_token(tiny, eos_token="<end>")
    data = rows(tmp_path / "rows.jsonl", ["Say it."] * 8)
    text = refused(config_of(tiny, data), tmp_path / "runs")
    assert "The end-of-sequence token '<end>' (858) has no embedding" in text


def with_positions(name: str, positions: int, tmp_path: Path) -> Path:
    """Write a family with fewer positions."""
    folder = build(name, tmp_path)
    table = json.loads((folder / "config.json").read_text())
    table |= {
        key: positions for key in ("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len") if key in table
    }
    (folder / "config.json").write_text(json.dumps(table))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_rows_longer_than_learned_positions(name: str, tmp_path: Path) -> None:
    folder = with_positions(name, 128, tmp_path)
    data = rows(tmp_path / "rows.jsonl", [*["Say it."] * 7, "word " * 200])
    text = refused(config_of(folder, data, "training.sequence_length=256"), tmp_path / "runs")
    assert "tokens, and" in text
    assert "has 128 positions. Cut rows: --set training.sequence_length=128" in text
    with pytest.raises(ClientError, match="more tokens than the base model's 128 positions"):
        node(folder, data, "training.sequence_length=256").rows(0)
    # As long as the model allows: trains.
    train(config_of(folder, data, "training.sequence_length=128"), out=tmp_path / "runs")


def test_rows_longer_than_a_rotary_model_was_made_for_are_said(tmp_path: Path, caplog: Any) -> None:
    folder = with_positions("llama", 128, tmp_path)
    data = rows(tmp_path / "rows.jsonl", [*["Say it."] * 7, "word " * 200])
    train(config_of(folder, data, "training.sequence_length=150"), out=tmp_path / "runs")
    assert f"has up to 150 tokens, and {folder} was made for 128" in caplog.text


@pytest.mark.parametrize(
    ("name", "positions", "fixed"),
    [
        ("gpt2", 64, True),
        ("opt", 64, True),
        ("biogpt", 64, True),
        ("gptj", 64, True),
        ("ctrl", 64, True),
        ("mpt", 64, True),
        ("gpt_neo", 64, True),
        ("roberta", 63, True),
        ("llama", 64, False),
        ("gpt_neox", 64, False),
    ],
)
def test_limits_are_those_where_the_model_fails(name: str, positions: int, fixed: bool, tmp_path: Path) -> None:
    folder = with_positions(name, 64, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert limits_of(model) == Limits(858, positions, fixed)

    def fails(length: int) -> bool:
        try:
            with torch.no_grad():
                model(torch.full((1, length), 5), use_cache=False)
        except (IndexError, RuntimeError):
            return True
        return False

    assert not fails(positions)
    assert fails(positions + 1) is fixed
    assert fails(positions) is False


def test_first_excess_by_hand() -> None:
    limits = Limits(embeddings=10, positions=3, fixed=True)
    assert first_excess([[0, 9, 1], [2]], limits) is None
    found = first_excess([[0, 9, 1], [2, 10, 11], [1] * 4], limits)
    assert found is not None
    assert (found.place, found.token, found.length) == (1, 10, 3)
    found = first_excess([[1] * 4], limits)
    assert found is not None
    assert (found.place, found.token, found.length) == (0, None, 4)
    assert first_excess([[1] * 4], Limits(10, 3, fixed=False)) is None


def test_a_run_records_how_the_base_was_held(tiny: Path, tmp_path: Path) -> None:
    data = rows(tmp_path / "rows.jsonl", ["Say it."] * 8)
    result = train(config_of(tiny, data, "model.quantization=nf4", "model.dequantize=off"), out=tmp_path / "runs")
    held = {"quantization": "nf4", "stored_quantized": False, "dequantized": False}
    assert RunDirectory(result.run).read_about()["base_weights"] == held
