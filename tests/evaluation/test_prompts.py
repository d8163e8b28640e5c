"""Questions that a base model cannot read are refused before the first answer; answers stop at every end of text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import build
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fedtune.config.schema import BUILTIN_TINY, ModelConfig
from fedtune.errors import UsageError
from fedtune.evaluation import driver
from fedtune.evaluation.backends.fast import Budget, answer
from fedtune.evaluation.backends.generation import Request
from fedtune.evaluation.backends.official import answer_one_by_one
from fedtune.evaluation.driver import evaluate
from fedtune.evaluation.settings import EvalSettings, Mode
from fedtune.evaluation.subjects import Subject
from fedtune.evaluation.tasks.registry import parse_bench
from fedtune.models.base import load_base
from fedtune.models.hub import resolve_base


def settings_of(base: Path, out: Path, mode: Mode = "fast") -> EvalSettings:
    model = ModelConfig(base=str(base), quantization="none", compute_dtype="fp32")
    return EvalSettings(model, (Subject("base"),), tuple(parse_bench("tiny")), out, mode=mode)


def refused(base: Path, tmp_path: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> str:
    def never(*_: object) -> None:
        raise AssertionError("a question was answered")

    for name in ("answer", "answer_one_by_one", "answer_padded"):
        monkeypatch.setattr(driver, name, never)
    with pytest.raises(UsageError) as caught:
        evaluate(settings_of(base, tmp_path / "out", mode))
    return str(caught.value)


@pytest.mark.parametrize("mode", ["fast", "official"])
def test_a_token_without_an_embedding(tmp_path: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(resolve_base(ModelConfig(base=BUILTIN_TINY)).folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.add_tokens(["Question:"]) == 1  # in every prompt
    tokenizer.save_pretrained(folder)
    text = refused(folder, tmp_path, mode, monkeypatch)
    assert "of tiny contains the token 'Question:' (858), which has no embedding" in text


@pytest.mark.parametrize("mode", ["fast", "official"])
def test_more_tokens_than_positions(tmp_path: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build("gpt2", tmp_path)
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(table | {"n_positions": 16, "n_ctx": 16}))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    text = refused(folder, tmp_path, mode, monkeypatch)
    assert "tokens with its answer, and the gpt2 model has 16 positions" in text


def test_answers_stop_at_the_tokenizers_and_at_the_generation_configs_end(tmp_path: Path) -> None:
    """A model whose next token is always the next id. Both modes stop at the first end token."""
    folder = tmp_path / "tiny"
    shutil.copytree(resolve_base(ModelConfig(base=BUILTIN_TINY)).folder, folder)
    words = AutoTokenizer.from_pretrained(folder)
    base = load_base(ModelConfig(base=str(folder), quantization="none", compute_dtype="fp32"))
    vocabulary = base.model.config.vocab_size
    with torch.no_grad():
        for layer in base.model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        generator = torch.Generator().manual_seed(0)
        codes = torch.nn.functional.normalize(
            torch.randn(vocabulary, base.model.config.hidden_size, generator=generator), dim=-1
        )
        base.model.model.embed_tokens.weight.copy_(codes)
        base.model.model.norm.weight.fill_(1.0)
        base.model.lm_head.weight = torch.nn.Parameter(codes.roll(1, dims=0))  # tied until now
    assert words.eos_token_id not in (300, 310)

    def answers(tokenizer_end: int, generation_end: Any) -> set[str]:
        base.tokenizer.eos_token_id = tokenizer_end
        base.model.generation_config.eos_token_id = generation_end
        request = [Request((294, 295), 30)]
        fast = [reply.text for batch in answer(base, request, Budget(512)) for reply in batch]
        plain = [reply.text for batch in answer_one_by_one(base, request) for reply in batch]
        assert fast == plain
        return set(fast)

    # These ends are ordinary words, and stay in the text as in the leaderboard's scripts.
    to = {end: base.tokenizer.decode(list(range(296, end + 1)), skip_special_tokens=True) for end in (300, 310)}
    assert answers(300, 310) == {to[300]}
    assert answers(310, 300) == {to[300]}
    assert answers(310, [300, 305]) == {to[300]}
    assert answers(310, None) == {to[310]}
    assert answers(310, [99_999]) == {to[310]}
