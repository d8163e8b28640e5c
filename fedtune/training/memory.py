"""How much of an optimiser step goes through a model in one pass: as much as memory allows, as remembered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from fedtune.models.base import free_memory_bytes

if TYPE_CHECKING:
    from fedtune.training.layout import Layout

CPU_TOKENS = 4096
"""Most tokens of a pass on the CPU, where larger passes are no faster and memory is shared with everything else."""
WORTHWHILE_TOKENS = 2048
"""Passes of fewer tokens waste a GPU; recomputing activations is then the cheaper way to save memory."""


@dataclass
class Limits:
    """What is known of one model; the sizes grow only smaller, and only when memory ran out."""

    tokens: int
    """Most tokens of a pass."""
    checkpointing: bool
    """Whether activations are recomputed in the backward pass."""
    layouts: dict[int, Layout] = field(default_factory=dict)
    """How rows of up to so many tokens share a pass."""

    def retreat(self, lengths: Sequence[int], *, may_checkpoint: bool) -> bool:
        """Take less memory after a step of rows of these lengths ran out of it; False when nothing is left to try."""
        tokens = min(self.tokens, sum(lengths))
        if may_checkpoint and not self.checkpointing and tokens <= WORTHWHILE_TOKENS:
            self.checkpointing = True
            return True
        self.tokens = tokens // 2
        return tokens > min(lengths)


known: WeakKeyDictionary[Any, Limits] = WeakKeyDictionary()
"""Limits of each model that was trained in this process."""

SHORTEST_TOKENS = 8
"""Where memory holds no rows of so many tokens, nothing can be trained."""


def suggests_checkpointing(model: Any, device: torch.device) -> bool:
    """Whether the activations of a worthwhile pass would not fit into the GPU's free memory, by a rough count."""
    if device.type != "cuda":
        return False
    config = model.config.get_text_config()
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    if not isinstance(inner, int):
        inner = max(inner)  # one size for each layer, as in Gemma 3n
    # Kept per token and layer: inputs and outputs of norms, projections, adapters and attention; of the MLP's products.
    token_bytes = config.num_hidden_layers * (16 * hidden + 6 * inner) * model.dtype.itemsize
    return bool(WORTHWHILE_TOKENS * token_bytes > free_memory_bytes(device))


def cut(lengths: Sequence[int], limit: int, *, padded: bool) -> Iterator[slice]:
    """Cut rows of these lengths into runs of at most `limit` tokens, with padding if `padded`, but at least one row."""
    start, longest, total = 0, 0, 0
    for end, length in enumerate(lengths):
        longest, total = max(longest, length), total + length
        size = longest * (end + 1 - start) if padded else total
        if end > start and size > limit:
            yield slice(start, end)
            start, longest, total = end, length, length
    yield slice(start, len(lengths))
