"""Rows to token ids, once a run: the whole text at once, the prompt's length in tokens, EOS learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from fedtune.config.schema import DataConfig
from fedtune.data.prompt import fields_of, fill, render_prompt, render_text
from fedtune.errors import UsageError

Tokens = npt.NDArray[np.int32]

MAX_SKIPPED_SHARE = 0.01
_BATCH = 1000


@dataclass(frozen=True, eq=False)
class TokenizedRows:
    """One client's rows as token ids; the loss is computed on `input_ids[i][prompt_lengths[i]:]`."""

    input_ids: tuple[Tokens, ...]
    """One array of shape (tokens,) per row that was kept: prompt, response, EOS unless the row was cut."""
    prompt_lengths: Tokens
    """Shape (rows,): the first so many tokens of each row are prompt; always fewer than the row has."""
    total: int
    """Rows before skipping."""
    skipped: int
    """Rows with nothing to learn from, left out."""

    def __len__(self) -> int:
        return len(self.input_ids)


def tokenize_rows(
    rows: datasets.Dataset, config: DataConfig, tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> TokenizedRows:
    """Tokenise every row's training text (protocol, section 1) and find where its response begins.

    Prompt and response are tokenised as one text, so a token may straddle their boundary: it counts as response.
    The space in front of the response is part of the prompt.

    Args:
        rows: One client's rows, in the order to keep.
        config: Its templates `instruction` and `response`.
        tokenizer: The base model's; a slow one (without offsets) works too.
        sequence_length: Tokens in a row at most; a longer row is cut at the end and then has no EOS.

    Raises:
        ConfigError: a template names a column that the rows do not have.
        UsageError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise UsageError("The tokenizer has no end-of-sequence token, so a model could not learn to stop.")
    answers = fields_of(config.response)
    kept: list[Tokens] = []
    lengths: list[int] = []
    for start in range(0, len(rows), _BATCH):
        columns = rows[start : start + _BATCH]
        prompts, texts = [], []
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(columns, values, strict=True))
            response = fill(config.response, row, "data.response")
            # A template's own words around a missing answer are nothing to learn either.
            if response.strip() and (not answers or fill("".join(f"{{{name}}}" for name in answers), row).strip()):
                instruction = fill(config.instruction, row, "data.instruction")
                # The space in front of the response is prompt: a tokenizer that makes it a token of its own has nothing
                # to learn there, and a model that has learnt to begin with a space answers other prompts with one.
                prompts.append(render_prompt(instruction) + " ")
                texts.append(render_text(instruction, response))
        if not texts:
            continue
        for ids, length in zip(*_tokenize(prompts, texts, tokenizer), strict=True):
            # Some tokenizers append EOS of their own accord.
            body = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
            if length < min(len(body), sequence_length):
                kept.append(np.array([*body, tokenizer.eos_token_id][:sequence_length], dtype=np.int32))
                lengths.append(length)
    return TokenizedRows(tuple(kept), np.array(lengths, dtype=np.int32), len(rows), len(rows) - len(kept))


def _tokenize(
    prompts: list[str], texts: list[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[int]]:
    """Return the ids of each text and the number of them that lie wholly in its prompt."""
    options: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    if not tokenizer.is_fast:
        ids: list[list[int]] = tokenizer(texts, **options)["input_ids"]
        return ids, [
            _common_prefix(alone, whole)
            for alone, whole in zip(tokenizer(prompts, **options)["input_ids"], ids, strict=True)
        ]
    encoded = tokenizer(texts, return_offsets_mapping=True, **options)
    lengths = []
    for prompt, offsets in zip(prompts, encoded["offset_mapping"], strict=True):
        # The first token that ends behind the prompt's last character begins the response. Special tokens end at 0.
        behind = np.array(offsets, dtype=np.int64)[:, 1] > len(prompt)
        lengths.append(int(behind.argmax()) if behind.any() else len(behind))
    return encoded["input_ids"], lengths


def _common_prefix(first: list[int], second: list[int]) -> int:
    """Return how many leading tokens agree: the prompt's own count, less an EOS or a token across the boundary."""
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return length


def check_skipped(parts: Sequence[TokenizedRows]) -> None:
    """Refuse data of which too much has nothing to learn from.

    Raises:
        UsageError: more than 1 % of all clients' rows were skipped, or a client has no row left.
    """
    total, skipped = sum(part.total for part in parts), sum(part.skipped for part in parts)
    hint = "Raise training.sequence_length, or check that data.response names the column with the answers."
    if skipped > MAX_SKIPPED_SHARE * total:
        raise UsageError(
            f"{skipped} of {total} rows ({skipped / total:.1%}) have nothing to learn from: "
            "their response is empty or lies behind training.sequence_length.",
            hint=hint,
        )
    empty = [index for index, part in enumerate(parts) if not len(part)]
    if empty:
        raise UsageError(f"Client {empty[0]} has no row with anything to learn from.", hint=hint)
