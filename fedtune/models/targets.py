"""Which modules and parameters an adapter is put on: PEFT's own resolution, less what training on text never reaches.

Everything here works on a copy of the model without memory for its weights, so that every process of a run, with or without
the base, comes to the same result.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode

from fedtune.config.schema import AdapterConfig, FedTuneConfig
from fedtune.errors import ConfigError, Problem
from fedtune.models.compat import (
    PEFT_DEFAULTS,
    Conv1D,
    LoraEmbedding,
    ParamWrapper,
    convert_peft_config_for_transformers,
)

log = logging.getLogger(__name__)

_ATTENTION = re.compile(
    r"(q|k|v|o|qkv|kv|out|query|key|value|query_key_value|qkv_proj|in_proj(_\w+)?|attn_(q|k|v|o|qkv)"
    r"|(q|k|v|o|kv|qk|out|query|key|value|qkvz|ba)(_[ab])?(_proj|_layer)(_with_mqa)?|c_attn|Wqkv|wqkv|W[qkvo]|w[qkvo]"
    r"|receptance|output_proj|(q|k|v|out)_lin|project_[qkv]|query_key)"
)
"""Names of attention projections, and of the projections that state-space models have in their place."""
_ATTENTION_PARENT = re.compile(r"(^|\.)[^.]*(attn|attention|mixer|mamba|ssm|conv)[^.]*\.[^.]+$", re.IGNORECASE)
"""A module whose parent is an attention or state-space block."""
_TOWER = re.compile(r"(^|[._])(vision|visual|image|audio|speech|video|encoder|projector|mtp)", re.IGNORECASE)
"""Parts that a text model does not use, by name; only asked where the model cannot be tried out."""


@dataclass(frozen=True)
class Targets:
    """What an adapter's config comes to on one model."""

    config: LoraConfig
    """For `get_peft_model` on any copy of the model."""
    dropout: float
    """Dropout of linear layers; `config.lora_dropout` is 0 where PEFT allows none."""
    modules: tuple[str, ...]
    """Adapted modules by their full names; embeddings and modules that hold adapted parameters included."""
    not_linear: tuple[str, ...]
    """Those of them whose update is not the product B·A of a linear layer: embeddings and stacked experts."""
    notes: tuple[str, ...]
    """What the user should know, one sentence each."""


_resolved: dict[tuple[type, str, AdapterConfig], Targets] = {}
_KEPT = 16
"""Results that are kept, as a plan and the run after it ask for the same one."""


def empty_copy(model: Any) -> Any:
    """Return a copy of a transformers model without memory for its weights, without adapter and quantization."""
    config = copy.deepcopy(model.config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with torch.device("meta"):
        return type(model)(config)


def resolve_targets(empty: Any, adapter: AdapterConfig) -> Targets:
    """Find the modules and parameters of a model that `adapter` is put on.

    Args:
        empty: a transformers model on the meta device; it is of no further use.
        adapter: the adapter's settings.

    Raises:
        ConfigError: `adapter.targets` names what this model does not have or PEFT cannot adapt, or the settings do not go
            with what is targeted.
    """
    key = (type(empty), empty.config.to_json_string(), adapter)
    if key not in _resolved:
        if len(_resolved) >= _KEPT:
            _resolved.clear()
        _resolved[key] = _resolve(empty, adapter)
    return _resolved[key]


def _resolve(empty: Any, adapter: AdapterConfig) -> Targets:
    notes: list[str] = []
    config = _requested(empty, adapter, notes)
    config.lora_dropout = 0.0
    probe = _attached(empty, copy.deepcopy(config))
    trained = _reached_by_gradient(probe)
    modules, parameters = _adapted(probe)
    unreached = {name for name in modules if not _is_reached(name, trained, probe)}
    unreached -= _asked_for(adapter, modules, unreached)
    left_parameters = [name for name in parameters if not _is_reached(name.rpartition(".")[0], trained, probe)]
    if unreached or left_parameters:
        kept = [name for name in modules if name not in unreached]
        if not kept and len(left_parameters) == len(parameters):
            problem = "none of these modules takes part when the model reads text; name others"
            raise ConfigError([Problem("adapter.targets", problem)])
        excluded = _roots(unreached, kept)
        if excluded:
            config.exclude_modules = f"({'|'.join(map(re.escape, excluded))})(\\..*)?"
        if left_parameters:
            config.target_parameters = sorted(set(parameters) - set(left_parameters))
        number = len(unreached) + len(left_parameters)
        notes.append(
            f"{number} targeted modules in {_listed(excluded or left_parameters)} take no part in training on text: "
            "they get no adapter (naming one in full in adapter.targets keeps it)"
        )
        modules, parameters = kept, [name for name in parameters if name not in left_parameters]
    experts = {name.rpartition(".")[0] for name in parameters}
    embeddings = {name for name, module in probe.get_base_model().named_modules() if isinstance(module, LoraEmbedding)}
    if experts and adapter.dropout:
        notes.append(
            f"adapter.dropout = {adapter.dropout:g} applies to linear layers only: PEFT has no dropout for the parameters "
            f"of {_listed(sorted(experts))}, and adapter_config.json says lora_dropout 0"
        )
    config.lora_dropout = 0.0 if experts else adapter.dropout
    not_linear = sorted((experts | embeddings) & {*modules, *experts})
    return Targets(config, adapter.dropout, (*modules, *sorted(experts)), tuple(not_linear), tuple(notes))


def check_strategy(config: FedTuneConfig, not_linear: Iterable[str]) -> None:
    """Refuse strategies that compute with the product B·A where an update is not that.

    Raises:
        ConfigError: `strategy.name` is one of them, and the adapter is on embeddings or stacked experts.
    """
    if config.strategy.averages_products and (names := list(not_linear)):
        problem = (
            f"{config.strategy.name} averages the products B·A of linear layers, and the adapter is on "
            f"{_listed(names)}, whose update is another; leave it out of adapter.targets or choose another strategy"
        )
        raise ConfigError([Problem("strategy.name", problem)])


def set_dropout(model: Any, dropout: float) -> None:
    """Put dropout on the adapter of linear layers of a PeftModel whose config has none."""
    from fedtune.models.compat import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper) and "default" in module.lora_dropout:
            module.lora_dropout["default"] = torch.nn.Dropout(dropout)


def lora_config(adapter: AdapterConfig) -> LoraConfig:
    """Return `adapter` in PEFT's terms, before PEFT resolves it on a model."""
    targets = adapter.targets
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=None if targets == "default" else list(targets) if isinstance(targets, tuple) else targets,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        modules_to_save=list(adapter.modules_to_save) or None,
    )


def quietly_adapted(model: Any, config: LoraConfig, **options: Any) -> Any:
    """Return PEFT's model of `config` around `model`, without its advice."""
    with warnings.catch_warnings():
        # PEFT asks transformers by a name that transformers has deprecated.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        # The config's reference says what becomes of tied modules.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        # GPT-2's Conv1D has its weights turned; PEFT sees that by itself, and says so.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        # A pattern that names no module of a part that was left out.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        warnings.filterwarnings("ignore", "target_(modules|parameters)=.* were set but no", RuntimeWarning)
        return get_peft_model(model, config, **options)


def _requested(model: Any, adapter: AdapterConfig, notes: list[str]) -> LoraConfig:
    """Return the config that PEFT is given: targets named, and checked to be there."""
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    config = lora_config(adapter)
    if adapter.targets == "default":
        # Given in full: where PEFT renames targets of stacked experts first, it forgets to look up the default.
        known = PEFT_DEFAULTS.get(model.config.model_type)
        if known is not None:
            config.target_modules = known if isinstance(known, str) else set(known)
        elif found := _default_targets(model, linear):
            config.target_modules = set(found)
            listed = ", ".join(found)
            notes.append(f"PEFT has no default targets for {model.config.model_type}: the adapter is on {listed}")
    elif isinstance(adapter.targets, tuple):
        _sort_out(model, adapter.targets, linear, config)
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError as error:
        raise ConfigError([Problem("adapter.targets", str(error).rstrip("."))]) from error
    _check_modules_to_save(model, adapter)
    return config


def _sort_out(model: Any, targets: tuple[str, ...], linear: list[str], config: LoraConfig) -> None:
    """Tell names of modules from names of parameters, and refuse what is neither."""
    able = {*linear, *(name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding))}
    of_modules = {id(p) for name in able for p in model.get_submodule(name).parameters(recurse=False)}
    parameters = {name for name, p in model.named_parameters() if p.ndim in (2, 3) and id(p) not in of_modules}

    def has(target: str, names: Iterable[str]) -> bool:
        return any(name == target or name.endswith(f".{target}") for name in names)

    named = [target for target in targets if not has(target, able) and has(target, parameters)]
    left = [target for target in targets if not has(target, able) and target not in named]
    if left:
        # Names that an architecture had before transformers stacked its experts.
        older = LoraConfig(target_modules=left)
        try:
            convert_peft_config_for_transformers(older, model, None)
        except ValueError as error:
            raise ConfigError([Problem("adapter.targets", str(error).rstrip("."))]) from error
        unknown = [target for target in left if target in (older.target_modules or ())]
        if unknown:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            problem = f"this model has no linear module {', '.join(unknown)}; it has {known}"
            raise ConfigError([Problem("adapter.targets", problem)])
    if named:
        config.target_modules = set(targets) - set(named)
        config.target_parameters = sorted(named)


def _default_targets(model: Any, linear: list[str]) -> list[str]:
    """Return the attention projections that a model has, where PEFT knows no default for its architecture."""
    text = model.config.get_text_config()
    known = PEFT_DEFAULTS.get(text.model_type)
    # Subclasses, such as routers and grouped projections, compute otherwise than LoRA expects.
    linear = [name for name in linear if type(model.get_submodule(name)) in (torch.nn.Linear, Conv1D)]
    inside = [name for name in linear if not _TOWER.search(name)]
    if isinstance(known, list) and set(known) <= {name.rpartition(".")[2] for name in inside}:
        return sorted(known)
    # Some text models call all of their layers an encoder.
    return _attention_targets(model, inside) or _attention_targets(model, linear)


def _attention_targets(model: Any, linear: list[str]) -> list[str]:
    """Return names, as targets, of the attention projections among linear modules."""
    # PEFT refuses these of state-space models: their fast kernels go past the module.
    refused = {"out_proj", "conv1d"} if re.search("mamba|falcon_h1|nemotron_h", model.config.model_type) else set()
    output = model.get_output_embeddings()
    inside = [name for name in linear if model.get_submodule(name) is not output]
    in_blocks = [name for name in inside if _ATTENTION_PARENT.search(name)]
    found = {end for name in in_blocks or inside if _ATTENTION.fullmatch(end := name.rpartition(".")[2])} - refused
    if not found:
        found = {name.rpartition(".")[2] for name in in_blocks} - refused
    # A name that also stands elsewhere, as a feed-forward's `value`, is given with its block's.
    names: set[str] = set()
    for end in found:
        elsewhere = [name for name in inside if name.rpartition(".")[2] == end and name not in in_blocks]
        own = [name for name in in_blocks if name.rpartition(".")[2] == end]
        names |= {".".join(name.split(".")[-2:]) for name in own} if elsewhere and own else {end}
    return sorted(names)


def _attached(model: Any, config: LoraConfig) -> Any:
    try:
        return quietly_adapted(model, config, low_cpu_mem_usage=True)
    except ValueError as error:
        linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
        if "use_dora" in str(error):
            problem = "PEFT has no DoRA for experts that are stacked in one parameter"
            raise ConfigError([Problem("adapter.dora", problem)]) from error
        problem = re.sub(r"^\[PEFT:.*?\] ", "", str(error).splitlines()[0]).rstrip(".")
        if config.target_modules is None:
            names = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            problem = f"PEFT knows no default for {model.config.model_type}; name some of {names}"
        raise ConfigError([Problem("adapter.targets", problem)]) from error


def _adapted(model: Any) -> tuple[list[str], list[str]]:
    """Return the adapted modules' and parameters' names in the base, in the model's order."""
    return list(model.base_model.targeted_module_names), list(model.base_model.targeted_parameter_names)


def _reached_by_gradient(model: Any) -> set[str] | None:
    """Return the modules of the base whose adapter gets a gradient from the model's output for text.

    None where the model cannot be tried out without weights, as where routing depends on values.
    """
    base = model.get_base_model()
    for setting, value in (("_attn_implementation", "eager"), ("_experts_implementation", "batched_mm")):
        for config in {id(c): c for c in (base.config, base.config.get_text_config())}.values():
            if getattr(config, setting, None) is not None:
                setattr(config, setting, value)
    base.eval()
    try:
        # Tensors that have a shape and a device, and no values: some operations do not know the meta device.
        with _silent("torch._subclasses.fake_tensor"), FakeTensorMode(), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module in base.modules():
                for name, held in list(module._parameters.items()):
                    if held is not None:
                        fake = torch.empty(held.shape, dtype=held.dtype)
                        module._parameters[name] = torch.nn.Parameter(fake, held.requires_grad)
                for name, buffer in list(module._buffers.items()):
                    if buffer is not None:
                        module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
            ids = torch.zeros((1, 4), dtype=torch.long)
            base(input_ids=ids, use_cache=False).logits.float().sum().backward()
    except Exception as error:
        log.debug("%s cannot be tried out without weights: %s", base.config.model_type, error)
        return None
    found = {
        name.partition(".lora_")[0].replace(".base_layer", "")
        for name, parameter in base.named_parameters()
        if ".lora_" in name and parameter.grad is not None
    }
    return found or None


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Let a logger say nothing inside."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _is_reached(name: str, trained: set[str] | None, model: Any) -> bool:
    if trained is not None:
        return name in trained
    base = model.get_base_model()
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    inside = {id(module) for module in decoder.modules()}
    return id(base.get_submodule(name)) in inside or not _TOWER.search(name)


def _asked_for(adapter: AdapterConfig, modules: list[str], unreached: set[str]) -> set[str]:
    """Return the unreached modules that the user named in full, or by a name that nothing else has."""
    asked: set[str] = set()
    for target in adapter.targets if isinstance(adapter.targets, tuple) else ():
        named = {name for name in modules if name == target or name.endswith(f".{target}")}
        if named <= unreached:
            asked |= named
    return asked


def _roots(names: set[str], kept: list[str]) -> list[str]:
    """Return the largest parts of the model that hold all of `names` and none of `kept`."""
    roots = set()
    for name in names:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            root = ".".join(parts[:length])
            if not any(other == root or other.startswith(f"{root}.") for other in kept):
                roots.add(root)
                break
    return sorted(roots)


def _check_modules_to_save(model: Any, adapter: AdapterConfig) -> None:
    """PEFT passes over names that no module has."""
    for wanted in adapter.modules_to_save:
        if not any(name == wanted or name.endswith(f".{wanted}") for name, _ in model.named_modules()):
            raise ConfigError([Problem("adapter.modules_to_save", f"this model has no module {wanted}")])


def _listed(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
