"""A checksum of a base model's weights: whoever uses the base must leave every bit of it as it was loaded.

The bits of a tensor are added up as whole numbers, so nothing is rounded. A tensor of n words w is laid out in rows of 1,024;
its sum is Σ w[row, column] · (odd number of the column) over a row, then over the rows with an odd number each, modulo 2**64: a
changed bit and exchanged values both change it. It costs one pass over the memory, on the device where the weights are.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fedtune.errors import FedTuneError

_COLUMNS = 1024
_ROWS = 2**15
"""Rows that are multiplied at a time on a GPU, 256 MiB: what a product takes there for a moment."""
_SMALL = 2**16
"""Bytes up to which a tensor on the CPU is hashed by Python, which is quicker than several calls of torch."""

_watched: weakref.WeakKeyDictionary[Any, _Watched] = weakref.WeakKeyDictionary()


class _Watched:
    """A model's tensors with their checksums."""

    def __init__(self, model: Any) -> None:
        self.tensors = dict(_tensors(model))
        self.sums = _sums(self.tensors.values())
        self.parameters = {id(parameter) for parameter in model.parameters()}


def watch(model: Any) -> None:
    """Take the checksum of a model that carries no adapter, once; asked again for the same model, do nothing."""
    if model not in _watched:
        _watched[model] = _Watched(model)


def parameters_of(model: Any) -> set[int]:
    """Return the ids of the parameters that a watched model had by itself."""
    return _watched[model].parameters


def check(model: Any, when: str, besides: Iterable[torch.Tensor] = ()) -> None:
    """Check that a watched model's tensors are bit for bit what they were.

    Args:
        model: The model; it may carry an adapter now.
        when: What has been done with it, for the message: "after client 3 trained".
        besides: Parameters that an adapter holds other values in at the moment.

    Raises:
        FedTuneError: a tensor differs, or has been replaced by another.
    """
    watched = _watched[model]
    left_out = {id(tensor) for tensor in besides}
    there = {id(tensor) for _, tensor in _tensors(model)}
    now = _sums(watched.tensors.values())
    for (name, tensor), before, after in zip(watched.tensors.items(), watched.sums, now, strict=True):
        if id(tensor) in left_out:
            continue
        if before != after or id(tensor) not in there:
            raise FedTuneError(
                f"The base model's {name} is not what was loaded, {when}: results would be of another model.",
                hint="What was computed with it is not kept. Run it again, and report the model and the adapter's settings.",
            )


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a model's weights by name: parameters, what belongs to quantized ones, and the buffers that are saved with it."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            full = f"{prefix}.{name}" if prefix else name
            yield full, tensor
            yield from _quantization(full, tensor)
        for name, tensor in module.named_buffers(recurse=False):
            # Buffers that are not saved are computed, some anew for longer texts.
            if name not in module._non_persistent_buffers_set and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{prefix}.{name}" if prefix else name, tensor


def _quantization(name: str, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    state = getattr(parameter, "quant_state", None)
    for part in ("absmax", "offset"):
        if isinstance(tensor := getattr(state, part, None), torch.Tensor):
            yield f"{name}.{part}", tensor
    if (nested := getattr(state, "state2", None)) is not None:
        yield f"{name}.nested_absmax", nested.absmax


def _sums(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Return the tensors' checksums; the only wait for the device is at the end."""
    found: list[int | torch.Tensor] = [_sum(tensor.detach()) for tensor in tensors]
    on_device = [each for each in found if isinstance(each, torch.Tensor)]
    values = iter(torch.stack(on_device).tolist() if on_device else [])
    return [next(values) if isinstance(each, torch.Tensor) else each for each in found]


def _sum(tensor: torch.Tensor) -> int | torch.Tensor:
    flat = tensor.contiguous().flatten().view(torch.uint8)
    if tensor.device.type == "cpu" and flat.numel() <= _SMALL:
        return hash(flat.numpy().tobytes())
    words = flat[: flat.numel() // 8 * 8].view(torch.int64)
    odd = torch.arange(1, 2 * _COLUMNS, 2, device=tensor.device)
    rows = words[: words.numel() // _COLUMNS * _COLUMNS].view(-1, _COLUMNS)
    factors = (2 * torch.arange(len(rows), device=tensor.device) + 1) * _SPREAD  # none where there are no rows
    columns = factors @ rows if tensor.device.type == "cpu" else _product(factors, rows)
    rest = words[rows.numel() :]
    tail = flat[words.numel() * 8 :].to(torch.int64)
    return (
        (columns * odd).sum()
        + (rest * odd[: len(rest)]).sum() * _SPREAD
        + (tail * odd[: len(tail)]).sum() * (_SPREAD + 2)
    )


def _product(factors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return `factors @ rows`, which a GPU does not have for whole numbers."""
    columns = torch.zeros_like(rows[0]) if len(rows) else rows.new_zeros(rows.shape[1])
    for part, by in zip(torch.split(rows, _ROWS), torch.split(factors, _ROWS), strict=True):
        columns += (part * by[:, None]).sum(0)
    return columns


_SPREAD = 0x1E3779B97F4A7C15
"""An odd number with well-mixed bits, so that factors of neighbouring rows share none of them."""
