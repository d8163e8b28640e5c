"""Checks a client's tokenised rows against its base model, before the first training step."""

from __future__ import annotations

from typing import Any

import datasets

from fedtune.config.schema import FedTuneConfig
from fedtune.data.tokenize import TokenizedRows, tokenize_rows
from fedtune.errors import UsageError
from fedtune.models.limits import Excess, Limits, first_excess, warn_of_length


class RowsError(UsageError):
    """Rows that the base model cannot take; the message names a row and may quote it."""

    def __init__(self, message: str, *, public: str, hint: str = "") -> None:
        """`public` says the same without anything of the data: a node sends it to the server."""
        super().__init__(message, hint=hint)
        self.public = public


def check_rows(
    rows: TokenizedRows, table: datasets.Dataset, tokenizer: Any, config: FedTuneConfig, limits: Limits, owner: str
) -> None:
    """Check that the base model has an embedding for every token and a position for every place of a client's rows.

    Args:
        rows: The tokenised rows.
        table: The rows that they were made of.
        tokenizer: The base model's.
        config: The run's.
        limits: What the base model takes.
        owner: Whose rows these are, such as `client 3`.

    Raises:
        RowsError: a token has no embedding, or a row has more tokens than the model has positions.
    """
    base, count = config.model.base, limits.embeddings
    fits = f"{base} has {count:,} embeddings (ids 0 to {count - 1})"
    hint = "Use the tokenizer that belongs to the base, or call model.resize_token_embeddings before the base is saved."
    if tokenizer.eos_token_id >= count:
        raise RowsError(
            f"The end-of-sequence token {tokenizer.eos_token!r} ({tokenizer.eos_token_id}) has no embedding: {fits}.",
            public="The base model has no embedding for its tokenizer's end-of-sequence token.",
            hint=hint,
        )
    excess = first_excess(rows.input_ids, limits)
    if excess is None:
        warn_of_length(max(map(len, rows.input_ids), default=0), limits, f"a row of {owner}", base)
        return
    where = f"Row {_row_number(excess, table, tokenizer, config)} of {owner} (counted from 1)"
    if excess.token is not None:
        token = tokenizer.convert_ids_to_tokens(excess.token)
        raise RowsError(
            f"{where} holds the token {token!r} ({excess.token}), which has no embedding: {fits}.",
            public="Rows of this node's data hold tokens that the base model has no embedding for.",
            hint=hint,
        )
    raise RowsError(
        f"{where} has {excess.length:,} tokens, and {base} has {limits.positions:,} positions.",
        public=f"Rows of this node's data have more tokens than the base model's {limits.positions:,} positions.",
        hint=f"Cut rows: --set training.sequence_length={limits.positions}",
    )


def _row_number(excess: Excess, table: datasets.Dataset, tokenizer: Any, config: FedTuneConfig) -> int:
    """Return the number in `table`, from 1, of a row that was kept: rows without a response were skipped before it."""
    kept = -1
    for number in range(len(table)):
        kept += len(tokenize_rows(table.select([number]), config.data, tokenizer, config.training.sequence_length))
        if kept == excess.place:
            return number + 1
    raise RuntimeError("a tokenised row is of no row of the table")
