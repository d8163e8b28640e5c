"""Every name of transformers and PEFT that fedtune uses and their documentation does not promise, in one place.

A contract test checks each, so that a change in one of the libraries fails with the name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

__all__ = [
    "CONFIG_MAPPING",
    "PEFT_DEFAULTS",
    "BaseTunerLayer",
    "Conv1D",
    "DynamicLayer",
    "LinearAttentionCacheLayerMixin",
    "LoraEmbedding",
    "LoraLayer",
    "LoraLinear",
    "ModulesToSaveWrapper",
    "ParamWrapper",
    "convert_peft_config_for_transformers",
    "has_swapped_features",
    "on_adjusted_keys",
    "revert_weight_conversion",
    "set_attention",
]

_ADJUST = "_adjust_missing_and_unexpected_keys"


@contextmanager
def on_adjusted_keys(record: Callable[[Any, Callable[[], None]], None]) -> Iterator[None]:
    """Call `record(info, adjust)` in place of the step in which `from_pretrained` leaves out names that a class ignores.

    `info` has missing_keys, unexpected_keys and mismatched_keys; `adjust()` runs the step itself.
    """
    adjust = getattr(PreTrainedModel, _ADJUST)

    def adjust_and_record(model: Any, info: Any) -> None:
        record(info, lambda: adjust(model, info))

    with patch.object(PreTrainedModel, _ADJUST, adjust_and_record):
        yield


def set_attention(config: Any, implementation: str | None) -> None:
    """Set the attention of one part of a model back to what it was; the public setter also checks and changes sub-configs."""
    config._attn_implementation_internal = implementation


def has_swapped_features(module: ParamWrapper) -> bool:
    """Whether PEFT swapped input and output features of a stacked parameter."""
    return bool(module._did_swap_in_out_features)
