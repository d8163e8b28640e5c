"""The leaderboard's own arithmetic, step by step: one prompt at a time, greedy (protocol, section 4); finance in its
padded batches of 32 (section 5). The reference that the fast path is held against.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fedtune.errors import UsageError
from fedtune.evaluation.answer import Reply, Request, stop_tokens
from fedtune.evaluation.benchmarks.base import Question
from fedtune.models.base import Base

BATCH_SIZE = 16
"""Rows in a batch of the leaderboard's scripts; the first row's answer sets how many new tokens all of them may have."""

FINANCE_BATCH_SIZE = 32
FINANCE_LENGTH = 512
"""Most tokens of a finance prompt and its answer together."""


def new_tokens(base: Base, questions: Sequence[Question], batch_size: int = BATCH_SIZE) -> list[int]:
    """Return how many new tokens each question is allowed: the token count of the gold answer of its batch's first row.

    Two rows with the same prompt get the later row's number, because the later row's output is stored for both.
    """
    golds = [question.gold for question in questions[::batch_size]]
    counts = [len(ids) for ids in base.tokenizer(golds, add_special_tokens=False)["input_ids"]] if golds else []
    last = {question.prompt: counts[place // batch_size] for place, question in enumerate(questions)}
    return [last[question.prompt] for question in questions]


@torch.inference_mode()
def answer_one_by_one(
    base: Base, requests: Sequence[Request], pad_token: int, *, keep_logits: bool = False
) -> Iterator[list[Reply]]:
    """Answer requests one at a time, in their order, through the model's own `generate`; yield each reply."""
    stops = stop_tokens(base)
    for place, request in enumerate(requests):
        ids = torch.tensor([request.tokens], device=base.device)
        out = base.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=sorted(stops) or None,
            pad_token_id=pad_token,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = out.logits[0][0].float().topk(2).values
        tokens = tuple(out.sequences[0, ids.shape[1] :].tolist())
        text = base.tokenizer.decode(tokens, skip_special_tokens=True)
        # (new tokens, vocabulary); of beams the first
        logits = torch.cat([step[:1] for step in out.logits]).float() if keep_logits else None
        yield [Reply(place, text, float(best[0] - best[1]), tokens, logits)]


def check_embeddings(base: Base) -> None:
    """Refuse to give a row for a pad token to embeddings that an adapter is on.

    Raises:
        UsageError: the finance batches need a new pad token, and an adapter changes the embeddings or the head.
    """
    model = base.model
    head = model.get_output_embeddings()
    plain = isinstance(model.get_input_embeddings(), torch.nn.Embedding) and isinstance(head, torch.nn.Linear | None)
    if not plain and not _has_pad_token(base):
        raise UsageError(
            "The official mode adds a pad token to this base for finance benchmarks, and cannot resize its embeddings, which "
            "the adapter changes (adapter.targets or adapter.modules_to_save).",
            hint="Use --mode fast, which adds no pad token.",
        )


def _has_pad_token(base: Base) -> bool:
    tokenizer = base.tokenizer
    return tokenizer.pad_token is not None and tokenizer.pad_token_id != tokenizer.eos_token_id


@torch.inference_mode()
def answer_finance(base: Base, prompts: Sequence[str]) -> Iterator[list[Reply]]:
    """Answer finance prompts in padded batches of 32, in their order; a reply is the whole decoded text's answer part.

    A missing pad token, or one equal to EOS, becomes a new `[PAD]`, and the embeddings are resized, as in the reference.
    """
    tokenizer = base.tokenizer
    stops = stop_tokens(base)
    with _with_pad_token(base):
        tokenizer.padding_side = "left"  # what is generated follows the last token of a row
        for start in range(0, len(prompts), FINANCE_BATCH_SIZE):
            batch = tokenizer(
                list(prompts[start : start + FINANCE_BATCH_SIZE]),
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=FINANCE_LENGTH,
                return_token_type_ids=False,
            ).to(base.device)
            width = batch["input_ids"].shape[1]
            out = base.model.generate(
                **batch,
                max_length=max(FINANCE_LENGTH, width + 1),  # `generate` refuses a prompt that leaves no room
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=sorted(stops) or None,
                pad_token_id=tokenizer.pad_token_id,
            )
            texts = tokenizer.batch_decode(out, skip_special_tokens=True)
            yield [Reply(start + row, answer_part(text), float("nan")) for row, text in enumerate(texts)]


@contextmanager
def _with_pad_token(base: Base) -> Iterator[None]:
    """Give a tokenizer without a pad token of its own one, and the embeddings a row for it; outside all is as it was."""
    tokenizer, model = base.tokenizer, base.model
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    check_embeddings(base)
    if _has_pad_token(base):
        try:
            yield
        finally:
            tokenizer.padding_side = side
        return
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    before = [
        (table, dict(table._parameters), {k: p.data for k, p in table._parameters.items() if p is not None})
        for table in tables
    ]
    sizes = [{k: v for k, v in vars(table).items() if k in ("num_embeddings", "out_features")} for table in tables]
    configs = {
        id(c): (c, c.vocab_size) for c in (model.config, model.config.get_text_config()) if hasattr(c, "vocab_size")
    }
    try:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        yield
    finally:
        model.set_input_embeddings(tables[0])
        model.set_output_embeddings(tables[1])
        for (table, parameters, data), size in zip(before, sizes, strict=True):
            table._parameters.update(parameters)
            for name, values in data.items():
                parameters[name].data = values
            vars(table).update(size)
        for config, vocabulary in configs.values():
            config.vocab_size = vocabulary
        tokenizer.pad_token, tokenizer.padding_side = pad, side


def answer_part(text: str) -> str:
    """Return what follows the first `Answer: ` of a decoded text, `None` where there is none (protocol, section 5)."""
    parts = text.split("Answer: ")
    return parts[1] if len(parts) > 1 else "None"
