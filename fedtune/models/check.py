"""Checks a base model in memory: its weights are all there, it is causal, and tokenizer and ends of text agree.

`load_base` runs these checks wherever a base is loaded. They read the weights once and run the model on three short rows.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fedtune.config.schema import ModelConfig
from fedtune.errors import ConfigError, MissingError, Problem
from fedtune.models.compat import on_adjusted_keys
from fedtune.models.stored import FULL_PRECISION, NAMED, Headers, StoredTensor, name_some

log = logging.getLogger(__name__)

PROBE_TOKENS = 16
"""Tokens of a row of the causality probe."""

_EXACT, _ROUNDED = 1e-4, 5e-2
"""How far earlier logits may move by rounding, as a share of the logits' spread: in float32, and in coarser arithmetic."""

_SWITCHED = 0.25
"""How far they may move without a gradient, where rounding sends a token to another expert."""

_LEAST_GRADIENT = 1e-4
"""A later token's share in an earlier logit's gradient from which on the model is not causal; a causal model's is zero."""


@dataclass
class LoadingReport:
    """What transformers found while it loaded a model, before it leaves out what the model's class ignores."""

    missing: set[str] = field(default_factory=set)
    unexpected: set[str] = field(default_factory=set)
    ignored_missing: set[str] = field(default_factory=set)
    ignored_unexpected: set[str] = field(default_factory=set)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    """Shapes in the file and in the model, by name."""


@contextmanager
def recorded_loading() -> Iterator[LoadingReport]:
    """Record what transformers' `from_pretrained` reports inside this context.

    `output_loading_info` leaves out every name that the model's class ignores, a whole decoder layer among them.
    """
    report = LoadingReport()

    def record(info: Any, adjust: Callable[[], None]) -> None:
        missing, unexpected = set(info.missing_keys), set(info.unexpected_keys)
        adjust()
        report.missing, report.unexpected = set(info.missing_keys), set(info.unexpected_keys)
        report.ignored_missing, report.ignored_unexpected = missing - report.missing, unexpected - report.unexpected
        report.mismatched = {name: (tuple(stored), tuple(own)) for name, stored, own in info.mismatched_keys}

    with on_adjusted_keys(record):
        yield report


def check_loading(model: Any, report: LoadingReport, headers: Headers, base: str) -> None:
    """Refuse a base of which transformers left weights random, unused or reshaped.

    Buffers that a model computes by itself, such as causal masks and rotary frequencies, are no finding.

    Args:
        model: The loaded model.
        report: What transformers reported.
        headers: The tensors of the base's files.
        base: The base's name.

    Raises:
        MissingError: weights are missing, unexpected or of another shape.
    """
    own = dict(model.named_parameters()) | dict(model.named_buffers())

    def computed(name: str) -> bool:
        tensor = own.get(name)
        return tensor is not None and _is_computed(name, tuple(tensor.shape))

    def constant(name: str) -> bool:
        # Its class knows that files lack it; what starts as one number everywhere is not random.
        return name in own and bool((own[name] == own[name].reshape(-1)[0]).all())

    missing = {name for name in report.missing if not computed(name)}
    missing |= {name for name in report.ignored_missing if not computed(name) and not constant(name)}
    left = {name for name in report.unexpected | report.ignored_unexpected if not _is_stored_buffer(name, headers)}
    ignorable = {name for name in left & report.ignored_unexpected if not _is_decoder_layer(name, own, headers)}
    unexpected = left - ignorable
    faults = []
    if missing:
        faults.append(f"missing: {name_some(missing)}")
    if unexpected:
        faults.append(f"unexpected: {name_some(unexpected)}")
    if report.mismatched:
        shapes = [f"{name} {stored} instead of {mine}" for name, (stored, mine) in sorted(report.mismatched.items())]
        rest = len(shapes) - NAMED
        faults.append(f"of another shape: {'; '.join(shapes[:NAMED])}" + (f" and {rest} more" if rest > 0 else ""))
    if faults:
        count = len(missing) + len(unexpected) + len(report.mismatched)
        raise MissingError(
            f"{count} weights of {base} do not fit its config.json; {'; '.join(faults)}.",
            hint="Copy weights and config.json from the same place, or choose another model.base.",
        )
    if ignorable:
        log.warning(
            "%s does not use %d of the base's tensors, such as %s", type(model).__name__, len(ignorable), min(ignorable)
        )


def _is_stored_buffer(name: str, headers: Headers) -> bool:
    """Whether a tensor of the file is a buffer that today's models compute by themselves."""
    found = [
        tensor for key, tensor in headers.items() if key == name or key.endswith(f".{name}") or name.endswith(f".{key}")
    ]
    return bool(found) and all(_is_computed(name, tensor.shape) for tensor in found)


def _is_computed(name: str, shape: tuple[int, ...]) -> bool:
    module, _, last = name.rpartition(".")
    if last in ("inv_freq", "original_inv_freq"):
        return len(shape) == 1
    if last in ("cos_cached", "sin_cached"):
        return "rotary" in module
    if last in ("bias", "causal_mask"):  # (1, 1, positions, positions), GPT-2's causal mask and its descendants'
        return len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    if last in ("masked_bias", "version"):
        return shape in ((), (1,))
    return last == "position_ids"


def _is_decoder_layer(name: str, own: Collection[str], headers: Headers) -> bool:
    """Whether an unused tensor belongs to a layer that the model lacks and that is built like a layer that it has.

    A layer for multi-token prediction holds tensors that no other layer has.
    """
    match = re.match(r"(.*?)\.(\d+)\.", name)
    if match is None:
        return False
    layers: dict[str, set[str]] = {}
    for key in headers:
        if of_layer := re.match(rf"{re.escape(match[1])}\.(\d+)\.(.+)", key):
            layers.setdefault(of_layer[1], set()).add(of_layer[2])
    # A file may leave out the prefix of the whole model.
    in_model = {number for number in layers if any(f".{match[1]}.{number}." in f".{key}" for key in own)}
    if match[2] in in_model:
        return False
    used = {tail for number in in_model for tail in layers[number]}
    return bool(used) and layers.get(match[2], set()) <= used


def check_finite(model: Any, headers: Headers, base: str, quantized_from: Path | None) -> None:
    """Refuse a base whose weights hold NaN or infinity.

    Args:
        model: As it was loaded.
        headers: Of its files.
        base: Its name.
        quantized_from: The folder whose weights were quantized while they were loaded, if they were: they are read once more,
            because a GPU's quantization loses a NaN without a trace.

    Raises:
        MissingError: one does; it is named.
    """
    values = _values(model, headers)
    if quantized_from is not None:
        values = chain(values, _stored_values(quantized_from, headers, model.device))
    for name, tensor in values:
        if tensor.numel() and tensor.is_floating_point() and tensor.device.type != "meta":
            low, high = tensor.aminmax()
            if not (bool(low.isfinite()) and bool(high.isfinite())):
                raise MissingError(
                    f"{name} of {base} holds a value that is not finite (NaN or infinity).",
                    hint="Copy the base model's files again, or choose another model.base.",
                )


def _values(model: Any, headers: Mapping[str, StoredTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a model's weights by name; of a quantized one the scales, which a weight that is not finite mostly spoils."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()
        state = getattr(parameter, "quant_state", None)  # of bitsandbytes' 4-bit weights
        if state is not None:
            for scales in (state.absmax, getattr(state.state2, "absmax", None), state.offset):
                if isinstance(scales, torch.Tensor):
                    yield name, scales
        scales = getattr(parameter, "SCB", None)  # of its int8 weights
        if isinstance(scales, torch.Tensor):
            yield name, scales
    for name, buffer in model.named_buffers():
        if name in headers:
            yield name, buffer


def _stored_values(folder: Path, headers: Headers, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what the base's files hold in full precision, in parts, on `device`."""
    for file in sorted({stored.file for stored in headers.values()}):
        with safe_open(folder / file, "pt") as tensors:
            for name, stored in headers.items():
                if stored.file == file and stored.dtype in FULL_PRECISION:
                    for part in tensors.get_tensor(name).flatten().split(_PART):
                        yield name, part.to(device)


_PART = 2**27
"""Numbers that are moved to the device at once."""


def probe_tokens(model: Any, tokenizer: Any) -> torch.Tensor:
    """Return the rows of the causality probe, (3, tokens): one row, it with another last token, it with another second half."""
    rows = model.get_input_embeddings().weight.shape[0]
    special = set(getattr(tokenizer, "all_special_ids", ())) | set(getattr(tokenizer, "added_tokens_decoder", ()))
    configs = (model.config, model.config.get_text_config(decoder=True))
    special |= {
        v for c in configs for k, v in vars(c).items() if k.endswith(("token_id", "token_index")) and _is_int(v)
    }
    usable = [id_ for id_ in range(min(rows, len(tokenizer) or rows)) if id_ not in special] or list(range(rows))
    spread = [usable[place * len(usable) // (2 * PROBE_TOKENS)] for place in range(2 * PROBE_TOKENS)]
    row, other = spread[::2], spread[1::2][::-1]
    half = PROBE_TOKENS // 2
    return torch.tensor([row, [*row[:-1], other[-1]], [*row[:half], *other[half:]]])


def check_causal(model: Any, tokenizer: Any, config: ModelConfig, dtype: torch.dtype) -> None:
    """Refuse a model whose logits depend on later tokens.

    Rows that differ in their last tokens go through the model together. Where their earlier logits differ at all, which
    rounding in a mixture of experts can do, the gradient of an earlier logit at a later token decides.

    Args:
        model: Frozen, in evaluation mode.
        tokenizer: The model's.
        config: Which base, and how its weights are held.
        dtype: Arithmetic of the forward pass.

    Raises:
        ConfigError: the model is not causal.
        MissingError: it cannot compute.
    """
    base = config.base
    ids = probe_tokens(model, tokenizer).to(model.get_input_embeddings().weight.device)
    half = PROBE_TOKENS // 2
    try:
        with torch.inference_mode(), _arithmetic(ids.device, dtype):
            logits = model(input_ids=ids, use_cache=False).logits.float()  # (3, tokens, vocabulary)
    except torch.OutOfMemoryError as error:
        raise MissingError(
            f"The device's memory holds {base}, and not {ids.numel()} tokens of text beside it.",
            hint="Free memory, or hold the base smaller: --set model.quantization=nf4",
        ) from error
    except Exception as error:
        quantized = config.quantization != "none"
        raise MissingError(
            f"{base} fails with model.quantization = {config.quantization} ({type(error).__name__}: {first_line(error)}).",
            hint="Try --set model.quantization=none." if quantized else "Choose another model.base or revision.",
        ) from error
    if logits.shape[:2] != ids.shape:
        problem = f"{base} ({type(model).__name__}) is not causal: it does not compute logits for every token of a row"
        raise ConfigError([Problem("model.base", problem)])
    if not bool(logits.isfinite().all()):
        raise MissingError(
            f"{base} computes logits that are not finite.",
            hint="Check the numbers in its config.json, such as rope_theta, or choose another model.base.",
        )
    spread = (logits - logits.mean(dim=-1, keepdim=True)).abs().max()
    moved = torch.stack(
        [(logits[0, :-1] - logits[1, :-1]).abs().max(), (logits[0, :half] - logits[2, :half]).abs().max()]
    )
    share = float(moved.max() / spread) if spread > 0 else 0.0
    if share == 0:
        return
    exact = dtype == torch.float32 and config.quantization != "int8"
    gradient = _later_gradient(model, ids[:1], half, dtype)
    if gradient is None:
        causal = share <= (_EXACT if exact else _ROUNDED)
    else:
        causal = gradient < _LEAST_GRADIENT and share <= (_ROUNDED if exact else _SWITCHED)
    if not causal:
        problem = (
            f"{base} ({type(model).__name__}) is not causal: its logits at earlier tokens change by {share:.1%} when later "
            "tokens change; choose a decoder model"
        )
        raise ConfigError([Problem("model.base", problem)])


def _later_gradient(model: Any, ids: torch.Tensor, half: int, dtype: torch.dtype) -> float | None:
    """Return how much an earlier logit depends on later tokens, relative to earlier ones; None where no gradient passes."""
    outputs: list[torch.Tensor] = []

    def track(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        outputs.append(output.detach().requires_grad_(True))
        return outputs[-1]

    handle = model.get_input_embeddings().register_forward_hook(track)
    try:
        with torch.enable_grad(), _arithmetic(ids.device, dtype):
            logits = model(input_ids=ids, use_cache=False).logits[0, half - 1].float()  # (vocabulary,)
            weights = torch.linspace(-1, 1, len(logits), device=logits.device)
            (gradient,) = torch.autograd.grad((logits * weights).sum(), outputs[:1])
    except (RuntimeError, NotImplementedError, IndexError):
        return None
    finally:
        handle.remove()
    # (1, tokens, width), or (tokens, 1, width) where the model puts time first.
    sizes = gradient.float().reshape(-1, gradient.shape[-1]).norm(dim=-1)
    if len(sizes) != ids.shape[1]:
        return None
    if not bool(sizes.isfinite().all()) or not bool(sizes[:half].max() > 0):
        return None
    return float(sizes[half:].max() / sizes[:half].max())


def _arithmetic(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context in which training and evaluation compute."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def check_agreement(model: Any, tokenizer: Any, base: str) -> None:
    """Log where tokenizer, embedding, ends of text and generation config of a base disagree; nothing of that stops a run."""
    rows = model.get_input_embeddings().weight.shape[0]
    beyond = sorted((id_, token) for token, id_ in tokenizer.get_vocab().items() if id_ >= rows)
    if beyond:
        names = ", ".join(repr(token) for _, token in beyond[:NAMED]) + (" …" if len(beyond) > NAMED else "")
        log.warning(
            "the tokenizer of %s knows %d tokens without a row in the embedding of %d (%s); rows that use one are refused",
            base,
            len(beyond),
            rows,
            names,
        )
    eos = tokenizer.eos_token_id
    text_config = model.config.get_text_config(decoder=True)
    sources = {
        "generation_config.json": _ids(getattr(getattr(model, "generation_config", None), "eos_token_id", None)),
        "config.json": _ids(getattr(text_config, "eos_token_id", None)),
    }
    for source, ids in sources.items():
        if eos is not None and ids and eos not in ids:
            others = ", ".join(_token(tokenizer, id_) for id_ in ids)
            log.warning(
                "%s ends a text with %s by its tokenizer and with %s by its %s; the first is learnt, and answers stop at each",
                base,
                _token(tokenizer, eos),
                others,
                source,
            )
            break
    bos, own = getattr(tokenizer, "bos_token_id", None), getattr(text_config, "bos_token_id", None)
    if isinstance(bos, int) and isinstance(own, int) and bos != own:
        log.warning(
            "%s begins a text with %s by its tokenizer and with %s by its config.json; the tokenizer's is used",
            base,
            _token(tokenizer, bos),
            _token(tokenizer, own),
        )


def ends_of_text(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return every token that ends a text: the tokenizer's EOS, which training teaches, and those of the generation config."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = [*_ids(tokenizer.eos_token_id), *_ids(getattr(model.generation_config, "eos_token_id", None))]
    return tuple(dict.fromkeys(id_ for id_ in ids if 0 <= id_ < rows))


def _ids(value: Any) -> list[int]:
    """Return an `eos_token_id` as a list: it may be a number, a list, or None."""
    values = value if isinstance(value, list | tuple) else [value]
    return [int(each) for each in values if _is_int(each)]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _token(tokenizer: Any, id_: int) -> str:
    token = tokenizer.convert_ids_to_tokens(id_) if 0 <= id_ < len(tokenizer) else None
    return f"{token!r} ({id_})" if token is not None else str(id_)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that says something, cut to a length that a sentence bears."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = next((line for line in lines if not line.endswith(":")), lines[0])
    return text if len(text) <= 200 else text[:197] + "…"
