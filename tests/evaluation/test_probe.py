"""The probe: exact paths, wrong paths, refused models and settings of `generate`."""

import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import build
from tokenizers.processors import TemplateProcessing

from fedtune.config.schema import AdapterConfig, ModelConfig
from fedtune.errors import MissingError, UsageError
from fedtune.evaluation.backends import fast, probe
from fedtune.evaluation.backends.fast import PATHS, AnswerPath, Budget, answer, smallest_window
from fedtune.evaluation.backends.generation import Reply, Request, tokenize
from fedtune.evaluation.backends.official import answer_one_by_one
from fedtune.evaluation.backends.probe import ONE_BY_ONE, choose_path, warnings_about
from fedtune.models.adapter import attach
from fedtune.models.base import Base, load_base

TINY = ModelConfig(base="builtin:tiny", quantization="none", compute_dtype="fp32")
PROMPTS = [
    "On the isles grow",
    "On the isles",
    "On the isles grow mosses that healers dry and sell to sailors",
    "On",
] * 3


@pytest.fixture
def base() -> Base:
    return load_base(TINY)


def load(folder: Path, **changes: Any) -> Base:
    return load_base(
        ModelConfig(base=str(folder), quantization="none", compute_dtype="fp32").model_copy(update=changes)
    )


def requests(base: Base, new_tokens: int) -> list[Request]:
    return [Request(ids, new_tokens) for ids in tokenize(base, [f"{text} {n}" for n, text in enumerate(PROMPTS)])]


def by_index(replies: list[Reply]) -> list[str]:
    return [reply.text for reply in sorted(replies, key=lambda reply: reply.index)]


def plainly(base: Base, given: list[Request]) -> list[str]:
    return by_index([reply for batch in answer_one_by_one(base, given) for reply in batch])


def on(base: Base, given: list[Request], path: AnswerPath) -> list[str]:
    return by_index([reply for batch in answer(base, given, Budget(2048), path=path) for reply in batch])


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_every_path_is_exact_on_a_plain_model(base: Base, path: AnswerPath) -> None:
    given = [Request(request.tokens, 1 + n) for n, request in enumerate(requests(base, 1))]
    assert on(base, given, path) == plainly(base, given)


def test_the_fastest_exact_path_is_chosen(base: Base) -> None:
    for new_tokens in (1, 5, 40):
        choice = choose_path(base, requests(base, new_tokens), Budget(2048))
        assert choice.path == PATHS[0]
        assert "equal to one-by-one generation" in choice.reason


def test_an_attached_adapter_is_probed(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that mixes positions makes every padded path wrong."""
    given = requests(base, 3)
    adapted = attach(base, AdapterConfig(rank=2, targets="all-linear"))
    torch.manual_seed(0)
    adapted.load({name: torch.randn(shape) * 0.2 for name, shape in adapted.shapes.items()})
    assert choose_path(base, given, Budget(2048)).path == PATHS[0]
    norm = base.model.model.norm
    hook = norm.register_forward_hook(lambda _module, _inputs, output: output + output.mean(dim=1, keepdim=True))
    try:
        choice = choose_path(base, given, Budget(2048))
        assert choice.path == PATHS[4]  # rows of equal length go without padding and without a shared prefix
        assert "logits of new token 1 differ" in choice.reason
    finally:
        hook.remove()
        adapted.detach()


FAULTS = (TypeError, AttributeError, KeyError, RuntimeError, IndexError, NotImplementedError, AssertionError)


@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_path_that_raises_the_next_is_tried(
    base: Base, monkeypatch: pytest.MonkeyPatch, fault: type[Exception]
) -> None:
    def broken(*_: Any) -> list[Reply]:
        raise fault("no such thing here")

    monkeypatch.setattr(fast, "_answer_batch", broken)
    choice = choose_path(base, requests(base, 2), Budget(2048))
    assert choice.path == PATHS[3]
    assert f"{fault.__name__}: " in choice.reason
    monkeypatch.setattr(fast, "_generate_batch", broken)
    assert choose_path(base, requests(base, 2), Budget(2048)).name == ONE_BY_ONE


OUT_OF_MEMORY: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory"),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    MemoryError,
]


@pytest.mark.parametrize("make", OUT_OF_MEMORY)
def test_running_out_of_memory_does_not_exclude_a_path(
    base: Base, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Exception]
) -> None:
    real = fast._answer_batch

    def scarce(base: Base, given: list[Request], batch: list[int], *rest: Any) -> list[Reply]:
        if len(batch) > 1:
            raise make()
        return real(base, given, batch, *rest)

    monkeypatch.setattr(fast, "_answer_batch", scarce)
    budget = Budget(2048)
    assert choose_path(base, requests(base, 2), budget).path == PATHS[0]
    assert budget.tokens < 2048  # the evaluation begins with what the probe found to fit

    def none(*_: Any, **__: Any) -> None:
        raise make()

    monkeypatch.setattr(base.model, "generate", none)
    with pytest.raises(MissingError, match="does not fit in the device"):
        choose_path(base, requests(base, 2), Budget(2048))


def test_a_model_that_cannot_generate_is_refused(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise TypeError("no cache for you")

    monkeypatch.setattr(base.model, "generate", broken)
    with pytest.raises(UsageError, match=r"cannot generate with transformers \(TypeError: no cache for you\)"):
        choose_path(base, requests(base, 2), Budget(2048))


def test_logits_that_are_not_numbers_are_refused(base: Base) -> None:
    with torch.no_grad():
        base.model.model.norm.weight[0] = float("nan")
    with pytest.raises(MissingError, match="not numbers"):
        choose_path(base, requests(base, 1), Budget(2048))


SETTINGS = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "suppress_tokens": [5], "min_new_tokens": 3}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_generate_apply(base: Base, name: str) -> None:
    """Qwen2.5's instruct models ship a repetition penalty; `generate` applies it to greedy answers as well."""
    setattr(base.model.generation_config, name, SETTINGS[name])
    given = requests(base, 6)
    choice = choose_path(base, given, Budget(2048))
    assert choice.path == PATHS[4]
    assert name in choice.reason
    assert on(base, given, choice.path) == plainly(base, given)


def test_beams_are_searched_one_prompt_at_a_time(base: Base) -> None:
    """A beam may continue after the end of the answer, so there are more logits than tokens."""
    base.model.generation_config.num_beams = 3
    choice = choose_path(base, requests(base, 8), Budget(2048))
    assert choice.path is None
    assert "num_beams" in choice.reason


def test_a_stop_token_that_is_text_stays_in_the_answer(base: Base) -> None:
    given = requests(base, 12)
    token = next(iter(answer_one_by_one(base, given[:1])))[0].tokens[3]
    assert token not in base.tokenizer.all_special_ids
    base.model.generation_config.eos_token_id = [base.tokenizer.eos_token_id, token]
    plain = plainly(base, given)
    assert any(text.endswith(base.tokenizer.decode([token])) for text in plain)
    for path in PATHS:
        assert on(base, given, path) == plain


def test_prompts_longer_than_the_positions_are_a_warning(base: Base) -> None:
    """A rotary model computes positions beyond those that it has learnt."""
    base.model.config.max_position_embeddings = 5
    assert any("longer than the model's 5 positions" in text for text in warnings_about(base, requests(base, 1)))


def test_windows_are_known(tmp_path: Path) -> None:
    for family, window in (("mistral", 16), ("gemma3_text", 16), ("gpt_neo", 16), ("llama4_text", 16), ("llama", None)):
        assert smallest_window(load(build(family, tmp_path)).model) == window


def test_answers_that_fit_in_the_window_take_the_fast_path(tmp_path: Path) -> None:
    """Batches are short enough that padding pushes no token out of the window."""
    model = load(build("mistral", tmp_path))
    given = [request for request in requests(model, 1) if len(request.tokens) <= 14]
    given = [Request(request.tokens, 16 - len(request.tokens)) for request in given]
    assert len({len(request.tokens) for request in given}) > 1
    choice = choose_path(model, given, Budget(2048))
    assert choice.path == PATHS[0]
    assert on(model, given, PATHS[0]) == plainly(model, given)


def tiny_with(folder: Path, change: Callable[[Any], None]) -> Base:
    """Return the tiny base with a changed tokenizer."""
    from transformers import AutoTokenizer

    shutil.copytree(str(files("fedtune") / "models" / "builtin" / "tiny"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return load(folder)


def test_a_tokenizer_that_ends_prompts_is_a_warning(tmp_path: Path) -> None:
    def end(tokenizer: Any) -> None:
        eos = tokenizer.eos_token
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single=f"$A {eos}", special_tokens=[(eos, tokenizer.eos_token_id)]
        )

    model = tiny_with(tmp_path / "ends", end)
    given = requests(model, 4)
    assert given[0].tokens[-1] == model.tokenizer.eos_token_id
    assert any("ends every prompt with its EOS token" in text for text in warnings_about(model, given))
    choice = choose_path(model, given, Budget(2048))
    assert choice.path is not None
    assert on(model, given, choice.path) == plainly(model, given)
    assert warnings_about(load_base(TINY), given[:0]) == []


def test_a_tokenizer_that_pads_on_the_left_changes_nothing(base: Base) -> None:
    model = load_base(TINY)
    model.tokenizer.padding_side = "left"
    given = requests(model, 4)
    assert given == requests(base, 4)
    assert on(model, given, PATHS[0]) == plainly(base, given)


@pytest.mark.parametrize("changes", [{"compute_dtype": "bf16"}, {"quantization": "int8"}, {"quantization": "nf4"}])
def test_coarser_arithmetic_is_not_a_difference(changes: dict[str, str]) -> None:
    """bf16 and int8 round to two or three digits, and have a larger tolerance."""
    model = load_base(TINY.model_copy(update=changes))
    choice = choose_path(model, requests(model, 3), Budget(2048))
    assert choice.path == PATHS[0], choice.reason


def test_the_probe_uses_few_prompts(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    real = probe.answer_one_by_one

    def counting(base: Base, given: list[Request], *rest: Any, **more: Any) -> Any:
        counted.append(len(given))
        return real(base, given, *rest, **more)

    monkeypatch.setattr(probe, "answer_one_by_one", counting)
    choose_path(base, requests(base, 40) * 20, Budget(2048))
    assert sum(counted) <= 5  # the longest twice: a model that answers at random is refused


def test_ties_and_other_answers(base: Base) -> None:
    """Rounding may exchange two tokens whose logits are 1e-6 apart, but not 0.1."""
    tokens = (300, 301)
    text = base.tokenizer.decode(list(tokens))
    other = base.tokenizer.decode([300, 302])
    assert not text.startswith(other)
    for gap, expected in ((1e-6, True), (0.1, False)):
        logits = torch.zeros(2, 858)
        logits[0, 300], logits[1, 301], logits[1, 302] = 5.0, 5.0, 5.0 - gap
        plain = Reply(0, text, 5.0, tokens, logits)
        assert probe.is_tie(base, plain, other, str) is expected
    first = base.tokenizer.decode([400])
    assert not probe.is_tie(base, plain, first, str)  # it leaves at the first token, where the gap is 5
