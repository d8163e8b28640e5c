"""The fast mode equals one-by-one generation on the same weights in float32, with batches and shared prefixes."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config.schema import AdapterConfig, ModelConfig
from fedtune.errors import MissingError
from fedtune.evaluation.backends import fast
from fedtune.evaluation.backends.fast import Budget, Work, answer, group_by_prefix
from fedtune.evaluation.backends.generation import Reply, Request, tokenize
from fedtune.evaluation.backends.official import answer_one_by_one, answer_padded
from fedtune.evaluation.prompts import build_prompts
from fedtune.evaluation.settings import EvalSettings
from fedtune.evaluation.tasks.base import Question, TokenCounts
from fedtune.evaluation.tasks.load import load_questions
from fedtune.evaluation.tasks.registry import all_tasks, parse_bench
from fedtune.evaluation.tasks.sentiment import SentimentTask, answer_part
from fedtune.models.adapter import attach
from fedtune.models.base import Base, load_base


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(ModelConfig(base="builtin:tiny", quantization="fp4", compute_dtype="fp32"))


def requests_of(base: Base, bench: str, data_dir: Path | None = None, limit: int | None = None) -> list[Request]:
    (selection,) = parse_bench(bench)
    settings = EvalSettings(ModelConfig(base="builtin:tiny"), (), (selection,), Path())
    return [prompt.request for prompt in build_prompts(base, load_questions(selection, data_dir, limit), settings)]


def texts(batches: object) -> list[str]:
    replies: list[Reply] = [reply for batch in batches for reply in batch]  # type: ignore[attr-defined]
    assert sorted(reply.index for reply in replies) == list(range(len(replies)))  # each exactly once
    return [reply.text for reply in sorted(replies, key=lambda reply: reply.index)]


def test_fast_equals_plain_on_all_shipped_questions(base: Base) -> None:
    requests = requests_of(base, "tiny")
    work = Work()
    quick = texts(answer(base, requests, Budget(2048), work))
    assert quick == texts(answer_one_by_one(base, requests))
    assert len(set(quick)) > 1
    assert work.computed_tokens < 0.8 * work.prompt_tokens  # shared prefixes were computed once


@pytest.mark.slow
def test_fast_equals_plain_on_two_thousand_real_questions(base: Base, shared_data: Path) -> None:
    requests = requests_of(base, "medmcqa", shared_data / "benchmarks", 2000)
    assert texts(answer(base, requests, Budget(2048))) == texts(answer_one_by_one(base, requests))


def test_fast_equals_plain_on_real_questions(base: Base, shared_data: Path) -> None:
    """A sample of every real benchmark that is available; make test-slow uses 2,000 questions."""
    requests = []
    for bench, limit in (("medmcqa", 100), ("medqa", 25), ("pubmedqa", 15), ("mmlu:anatomy", 40)):
        requests += requests_of(base, bench, shared_data / "benchmarks", limit)
    assert texts(answer(base, requests, Budget(2048))) == texts(answer_one_by_one(base, requests))


def test_long_answers_equal_too(base: Base) -> None:
    """With several new tokens: attention must not read the key-values of right padding."""
    requests = [Request(one.tokens, 1 + number % 7) for number, one in enumerate(requests_of(base, "tiny")[:60])]
    plain = texts(answer_one_by_one(base, requests))
    assert texts(answer(base, requests, Budget(4096))) == plain
    prose = [
        Request(ids, 12) for ids in tokenize(base, ["On the isles grow ", "On the isles", "Healers", "A moss"] * 5)
    ]
    assert texts(answer(base, prose, Budget(500))) == texts(answer_one_by_one(base, prose))


def test_an_adapter_changes_answers(base: Base) -> None:
    requests = requests_of(base, "tiny")[:32]
    bare = texts(answer(base, requests, Budget(2048)))
    adapted = attach(base, AdapterConfig(rank=4, alpha=64, targets="all-linear"))
    try:
        torch.manual_seed(0)
        adapted.load({name: torch.randn(shape) * 0.2 for name, shape in adapted.shapes.items()})
        quick = texts(answer(base, requests, Budget(2048)))
        assert quick != bare
        assert quick == texts(answer_one_by_one(base, requests))
    finally:
        adapted.detach()
    assert texts(answer(base, requests, Budget(2048))) == bare


def test_out_of_memory_halves_the_budget_and_continues(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = requests_of(base, "tiny")[:40]
    plain = texts(answer(base, requests, Budget(4096)))
    real = fast._answer_batch

    def scarce(base: Base, requests: list[Request], batch: list[int], *rest: object) -> list[Reply]:
        if len(batch) > 3:
            raise torch.OutOfMemoryError
        return real(base, requests, batch, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(fast, "_answer_batch", scarce)
    budget, work = Budget(4096), Work()
    assert texts(answer(base, requests, budget, work)) == plain
    assert budget.tokens < 4096
    assert work.halvings == sorted(work.halvings, reverse=True)

    def none(*_: object) -> list[Reply]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(fast, "_answer_batch", none)
    with pytest.raises(MissingError, match="does not fit in the device"):
        list(answer(base, requests, Budget(4096)))


TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=40).map(tuple)


@given(st.lists(TOKENS, max_size=30), st.lists(st.integers(0, 3), max_size=60).map(tuple))
def test_groups_are_a_partition_with_common_prefixes(sequences: list[tuple[int, ...]], start: tuple[int, ...]) -> None:
    sequences = [start + sequence for sequence in sequences]
    groups = group_by_prefix(sequences)
    assert sorted(place for group in groups for place in group.members) == list(range(len(sequences)))
    for group in groups:
        for place in group.members:
            assert sequences[place][: len(group.prefix)] == group.prefix
            assert len(sequences[place]) > len(group.prefix)  # something is left to compute


def test_two_instructions_make_two_groups() -> None:
    """As in FIQA, whose posts and headlines have different instructions."""
    rng = random.Random(0)
    sequences = [(head,) * 30 + (rng.randrange(9), rng.randrange(9)) for head in (1, 2) for _ in range(20)]
    groups = group_by_prefix(sequences)
    assert sorted((len(group.members), len(group.prefix)) for group in groups) == [(20, 30), (20, 30)]


def question(prompt: str, gold: str) -> Question:
    return Question(prompt, prompt, gold)


def test_the_first_gold_of_a_batch_sets_the_new_tokens(base: Base) -> None:
    """Protocol, section 4: the batch size is part of it; a repeated prompt gets the later row's number."""
    count = {gold: len(base.tokenizer(gold, add_special_tokens=False)["input_ids"]) for gold in ("yes", "maybe", "A")}

    def new_tokens(rows: list[Question], batch_size: int) -> list[int]:
        task = all_tasks()["pubmedqa"]
        return task.new_tokens(TokenCounts(rows, [], [count[each.gold] for each in rows], batch_size))

    assert count["maybe"] > count["A"] == 1
    rows = [question(str(number), "maybe" if number in (0, 5) else "A") for number in range(8)]
    assert new_tokens(rows, batch_size=4) == [count["maybe"]] * 4 + [1] * 4
    assert new_tokens(rows, batch_size=8) == [count["maybe"]] * 8
    rows[1] = question("7", "A")  # the prompt of the last row
    assert new_tokens(rows, batch_size=4)[1] == 1


def test_finance_answers(base: Base) -> None:
    assert answer_part("Instruction: x\nAnswer: positive") == "positive"
    assert answer_part("Answer: a Answer: b") == "a "
    assert answer_part("nothing") == "None"
    prompts = [f"Instruction: What is it?\nInput: {'rain ' * n}\nAnswer: " for n in (1, 200, 3)]
    replies = [reply for batch in answer_padded(base, prompts, SentimentTask.padded_batches) for reply in batch]
    assert [reply.index for reply in replies] == [0, 1, 2]
    assert base.tokenizer.padding_side == "right"
