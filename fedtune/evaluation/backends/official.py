"""The leaderboard's own arithmetic: one prompt at a time (protocol, section 4), or padded batches (section 5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager

import torch

from fedtune.errors import UsageError
from fedtune.evaluation.backends.generation import Reply, Request, greedy, pad_token_of
from fedtune.evaluation.tasks.base import PaddedBatches
from fedtune.models.base import Base


@torch.inference_mode()
def answer_one_by_one(base: Base, requests: Sequence[Request], *, keep_logits: bool = False) -> Iterator[list[Reply]]:
    """Answer requests one at a time, in their order, through the model's own `generate`; yield each reply."""
    settings = greedy(base)
    for index, request in enumerate(requests):
        ids = torch.tensor([request.tokens], device=base.device)
        out = base.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.new_tokens,
            pad_token_id=pad_token_of(base),
            return_dict_in_generate=True,
            output_logits=True,
            **settings,
        )
        best = out.logits[0][0].float().topk(2).values
        tokens = tuple(out.sequences[0, ids.shape[1] :].tolist())
        text = base.tokenizer.decode(tokens, skip_special_tokens=True)
        # (new tokens, vocabulary); the first row is the first beam
        logits = torch.cat([step[:1] for step in out.logits]).float() if keep_logits else None
        yield [Reply(index, text, float(best[0] - best[1]), tokens, logits)]


def answer_padded(
    base: Base, prompts: Sequence[str], batches: PaddedBatches, known: Set[int] = frozenset()
) -> Iterator[list[Reply]]:
    """Answer prompts in padded batches, in their order, as the leaderboard's finance script does.

    Args:
        base: The base model.
        prompts: One per question.
        batches: Size and limits of the batches.
        known: Indices of prompts that need no reply. A batch with any other prompt is computed as a whole, because its
            longest prompt sets the padding.
    """
    for start in range(0, len(prompts), batches.size):
        batch = prompts[start : start + batches.size]
        wanted = [row for row in range(len(batch)) if start + row not in known]
        if wanted:
            texts = _generate_padded(base, batch, batches.max_length)
            yield [Reply(start + row, batches.output(texts[row]), float("nan")) for row in wanted]


@torch.inference_mode()
def _generate_padded(base: Base, prompts: Sequence[str], max_length: int) -> list[str]:
    """Return prompts and answers as texts.

    A missing pad token, or one equal to EOS, becomes a new `[PAD]`, and the embeddings are resized, as in the leaderboard's
    script.
    """
    tokenizer = base.tokenizer
    settings = greedy(base)
    with _with_pad_token(base):
        tokenizer.padding_side = "left"  # the new tokens follow the last token of a row
        batch = tokenizer(
            list(prompts),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=max_length,
            return_token_type_ids=False,
        ).to(base.device)
        width = batch["input_ids"].shape[1]
        out = base.model.generate(
            **batch,
            max_length=max(max_length, width + 1),  # `generate` refuses a prompt that leaves no token for the answer
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        )
        texts: list[str] = tokenizer.batch_decode(out, skip_special_tokens=True)
        return texts


def check_embeddings(base: Base) -> None:
    """Check that the embeddings can get a row for a pad token.

    Raises:
        UsageError: padded batches need a new pad token, and an adapter changes the embeddings or the head.
    """
    model = base.model
    head = model.get_output_embeddings()
    plain = isinstance(model.get_input_embeddings(), torch.nn.Embedding) and isinstance(head, torch.nn.Linear | None)
    if not plain and not _has_pad_token(base):
        raise UsageError(
            "The official mode adds a pad token to this base model for finance benchmarks. It cannot resize the embeddings, "
            "because the adapter changes them (adapter.targets or adapter.modules_to_save).",
            hint="Use --mode fast, which adds no pad token.",
        )


def _has_pad_token(base: Base) -> bool:
    tokenizer = base.tokenizer
    return tokenizer.pad_token is not None and tokenizer.pad_token_id != tokenizer.eos_token_id


@contextmanager
def _with_pad_token(base: Base) -> Iterator[None]:
    """Give the tokenizer a pad token of its own, and the embeddings a row for it; restore everything afterwards."""
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
