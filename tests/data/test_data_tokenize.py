"""Token ids, the prompt's length in tokens, and rows with nothing to learn from."""

import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from fedtune.config.schema import DataConfig
from fedtune.data.prompt import render_prompt, render_text
from fedtune.data.tokenize import TokenizedRows, check_skipped, tokenize_rows
from fedtune.errors import ConfigError, UsageError

CONFIG = DataConfig(source="a.jsonl")
TINY = Path(__file__).parents[2] / "fedtune/models/builtin/tiny"
PAIRS = [
    ("Why?", "Because."),
    ("a\nb", "  two spaces"),
    ("é 日本", "🙂 naïve\n### Response: again"),
    ("", "x"),
    ("long " * 40, "word " * 30),
]


def table(*pairs: tuple[str, str | None]) -> datasets.Dataset:
    return datasets.Dataset.from_list([{"instruction": a, "output": b} for a, b in pairs])


def byte_level(template: str = "<s> $A", **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE as Llama 3 has it, trained on a few words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([render_text(*pair) for pair in PAIRS], trainer)
    specials = [("<s>", 0), ("</s>", 1)]
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single=template, special_tokens=specials),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **options
    )


def by_character() -> PreTrainedTokenizerFast:
    """One token a character, but " y" is one token, which straddles the boundary of prompt and response."""
    characters = sorted(set(render_prompt("abc") + " yes"))
    vocabulary = {text: i for i, text in enumerate(["<unk>", "</s>", " y", *characters])}
    backend = Tokenizer(models.BPE(vocabulary, [(" ", "y")], unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


class Slow:
    """A tokenizer without offsets, as those are that a model repository brings along."""

    is_fast = False

    def __init__(self, fast: PreTrainedTokenizerFast) -> None:
        self.fast = fast
        self.eos_token_id = fast.eos_token_id

    def __call__(self, texts: list[str], **options: Any) -> Any:
        assert "return_offsets_mapping" not in options
        return self.fast(texts, **options)


@pytest.mark.parametrize("kind", ["fast", "slow", "tiny"])
def test_whole_text_is_tokenised_at_once_and_eos_is_learnt(kind: str) -> None:
    if kind == "tiny" and not TINY.is_dir():
        pytest.skip("the tiny model is not there")
    plain = AutoTokenizer.from_pretrained(TINY) if kind == "tiny" else byte_level()
    rows = tokenize_rows(table(*PAIRS), CONFIG, Slow(plain) if kind == "slow" else plain, 4096)
    assert (len(rows), rows.total, rows.skipped) == (5, 5, 0)
    assert rows.prompt_lengths.dtype == rows.input_ids[0].dtype == np.int32
    for (instruction, response), ids, length in zip(PAIRS, rows.input_ids, rows.prompt_lengths, strict=True):
        whole = plain(render_text(instruction, response))["input_ids"]
        assert ids.tolist() == [*whole, plain.eos_token_id]
        # Byte-level tokens never span the colon and the space behind it, so the prompt's own count is the right one; a
        # space that is a token of its own (before a letter, with the tiny base) is not learnt.
        alone = (
            whole[len(plain(render_prompt(instruction))["input_ids"])]
            == plain(" ", add_special_tokens=False)["input_ids"][0]
        )
        assert length == len(plain(render_prompt(instruction))["input_ids"]) + alone
        assert plain.decode(ids[length:-1]) == (response if alone else f" {response}")


@pytest.mark.parametrize("slow", [False, True])
def test_straddling_token_belongs_to_the_response(slow: bool) -> None:
    plain = by_character()
    rows = tokenize_rows(table(("abc", "yes")), CONFIG, Slow(plain) if slow else plain, 4096)
    prompt = render_prompt("abc")
    assert rows.prompt_lengths.tolist() == [len(prompt)]
    tokens = plain.convert_ids_to_tokens(rows.input_ids[0].tolist())
    assert tokens[len(prompt) :] == [" y", "e", "s", "</s>"]
    rows = tokenize_rows(table(("abc", "see")), CONFIG, Slow(plain) if slow else plain, 4096)
    assert rows.prompt_lengths.tolist() == [
        len(prompt) + 1
    ]  # here the space is a token of its own, and nothing to learn


def test_long_rows_are_cut_at_the_end_and_then_have_no_eos() -> None:
    plain = byte_level()
    data = table(("Why?", "Because it is so."))
    whole = tokenize_rows(data, CONFIG, plain, 4096)
    ids, prompt = whole.input_ids[0], int(whole.prompt_lengths[0])
    for length in range(prompt - 1, len(ids) + 2):
        cut = tokenize_rows(data, CONFIG, plain, length)
        if length <= prompt:
            assert (len(cut), cut.skipped, cut.total) == (0, 1, 1)
        else:
            assert cut.input_ids[0].tolist() == ids[:length].tolist()
            assert cut.prompt_lengths.tolist() == [prompt]
    assert tokenize_rows(data, CONFIG, plain, len(ids) - 1).input_ids[0][-1] != plain.eos_token_id


def test_rows_with_nothing_to_learn_are_counted_and_the_rest_keeps_its_order() -> None:
    rows = tokenize_rows(
        table(("a", "1"), ("b", ""), ("c", None), ("d", " \n"), ("e " * 500, "2"), ("f", "3")),
        CONFIG,
        byte_level(),
        256,
    )
    assert (len(rows), rows.total, rows.skipped) == (2, 6, 4)
    assert [byte_level().decode(ids[n:]) for ids, n in zip(rows.input_ids, rows.prompt_lengths, strict=True)] == [
        "1</s>", "3</s>"
    ]  # fmt: skip


@pytest.mark.parametrize("slow", [False, True])
def test_tokenizer_that_adds_eos_itself_gets_no_second(slow: bool) -> None:
    plain, reference = byte_level("<s> $A </s>"), byte_level()
    rows = tokenize_rows(table(*PAIRS, ("a", "")), CONFIG, Slow(plain) if slow else plain, 4096)
    expected = tokenize_rows(table(*PAIRS), CONFIG, reference, 4096)
    assert [ids.tolist() for ids in rows.input_ids] == [ids.tolist() for ids in expected.input_ids]
    assert rows.prompt_lengths.tolist() == expected.prompt_lengths.tolist()
    assert rows.skipped == 1


def test_slow_tokenizer_of_transformers() -> None:
    # ByT5 is written in Python: one token a byte, each 3 above it, and EOS of its own accord.
    rows = tokenize_rows(table(("é", "ü"), ("a", "")), CONFIG, ByT5Tokenizer(), 4096)
    assert rows.prompt_lengths.tolist() == [len(render_prompt("é").encode()) + 1]  # and the space
    assert rows.input_ids[0].tolist() == [byte + 3 for byte in render_text("é", "ü").encode()] + [1]
    assert rows.skipped == 1


def test_rows_beyond_the_tokenizers_own_limit_give_no_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    rows = tokenize_rows(table(("a", "word " * 100)), CONFIG, byte_level(model_max_length=8), 4096)
    assert len(rows) == 1
    assert caplog.records == []


def test_many_rows_are_as_one_by_one() -> None:
    pairs = [(f"q{i}", "yes " * (i % 7) + str(i)) for i in range(2005)]
    plain = byte_level()
    rows = tokenize_rows(table(*pairs), CONFIG, plain, 96)
    assert len(rows) + rows.skipped == rows.total == 2005
    assert rows.skipped == 0
    for i in (0, 999, 1000, 2004):
        alone = tokenize_rows(table(pairs[i]), CONFIG, plain, 96)
        assert rows.input_ids[i].tolist() == alone.input_ids[0].tolist()
        assert rows.prompt_lengths[i] == alone.prompt_lengths[0]


def test_templates_and_tokenizer_are_checked() -> None:
    config = DataConfig(source="a.jsonl", instruction="{output}", response="{answer}")
    with pytest.raises(ConfigError, match=r"data\.response: the data has no column 'answer'"):
        tokenize_rows(table(("a", "b")), config, byte_level(), 64)
    endless = PreTrainedTokenizerFast(tokenizer_object=by_character().backend_tokenizer)
    with pytest.raises(UsageError, match="end-of-sequence"):
        tokenize_rows(table(("a", "b")), CONFIG, endless, 64)


def part(total: int, skipped: int) -> TokenizedRows:
    ids = tuple(np.zeros(2, np.int32) for _ in range(total - skipped))
    return TokenizedRows(ids, np.ones(total - skipped, np.int32), total, skipped)


def test_more_than_one_percent_skipped_is_refused() -> None:
    check_skipped([part(100, 2), part(100, 0)])
    with pytest.raises(UsageError, match=r"3 of 200 rows \(1\.5%\)") as caught:
        check_skipped([part(100, 2), part(100, 1)])
    assert "training.sequence_length" in caught.value.hint
    assert "data.response" in caught.value.hint
    with pytest.raises(UsageError, match="Client 1 has no row"):
        check_skipped([part(1000, 0), part(1, 1)])
