"""Small random base models of many architectures: `build("mixtral", folder)` writes one to `folder/mixtral`.

Each has 2-4 layers of width 32 and the tokenizer of `builtin:tiny`. Weights are random and wide: a wrong mask, a wrong
position or a lost tensor moves the logits far beyond rounding. Sliding windows are 16 tokens, so that rows of ordinary
length are longer. From a shell: `PYTHONPATH=tests python -m support.families OUT [NAME…]`.
"""

from __future__ import annotations

import shutil
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

Options = dict[str, Any]

_COMMON: Options = {
    "vocab_size": 858,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.15,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "tie_word_embeddings": False,
}
_WINDOW: Options = {"sliding_window": 16}
_MOE: Options = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_QWEN_MOE: Options = {**_MOE, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 32}
_LINEAR: Options = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_HYBRID: Options = {**_LINEAR, "layer_types": ["linear_attention", "full_attention"]}
_MIXED: Options = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_LATENT: Options = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
_GPT2: Options = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 2048,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_MAMBA: Options = {"state_size": 8, "conv_kernel": 4, "expand": 2}
_MAMBA2: Options = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
_GEMMA3: Options = {**_MIXED, "query_pre_attn_scalar": 8}
_DROPOUT_FREE: Options = {"dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0}
_BERT: Options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

FAMILIES: dict[str, Options] = {
    "llama": {},
    "mistral": _WINDOW,
    "qwen2": {"use_sliding_window": True, "max_window_layers": 0, **_WINDOW},
    "qwen3": {},
    "gemma2": {**_GEMMA3, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0},
    "gemma3_text": _GEMMA3,
    "phi3": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, **_WINDOW},
    "gpt2": _GPT2,
    "gpt_neox": {"rotary_pct": 0.5},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, **_DROPOUT_FREE},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"head_dim": None, "alibi": False, "new_decoder_architecture": False, "multi_query": True},
    "olmo2": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "qwen3_moe": _QWEN_MOE,
    "mamba": _MAMBA,
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "conv_L_cache": 3},
    "qwen3_next": {**_QWEN_MOE, **_HYBRID},
    "bert": _BERT,
    "afmoe": {**_MOE, **_MIXED, "num_dense_layers": 1},
    "apertus": {},
    "arcee": {},
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "biogpt": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **_DROPOUT_FREE},
    "bitnet": {},
    "codegen": {**_GPT2, "rotary_dim": 4},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {**_MIXED, "logit_scale": 1.0},
    "cwm": _MIXED,
    "deepseek_v2": {**_MOE, **_LATENT},
    "deepseek_v3": {**_MOE, **_LATENT},
    "diffllama": {},
    "doge": {},
    "dots1": {**_MOE, "sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
    "ernie4_5": {},
    "ernie4_5_moe": {**_MOE, "moe_num_experts": 4, "moe_k": 2},
    "exaone4": _MIXED,
    "falcon_alibi": {"model_type": "falcon", "head_dim": None, "alibi": True, "new_decoder_architecture": False},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64},
    "falcon_mamba": _MAMBA,
    "flex_olmo": _MOE,
    "gemma": {},
    "gemma3_vlm": {
        "model_type": "gemma3",
        "text_config": {**_COMMON, **_GEMMA3},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
        "boi_token_index": 855,
        "eoi_token_index": 856,
        "image_token_index": 857,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": _MOE,
    "gpt_bigcode": {**_GPT2, "multi_query": True},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
        "embed_dropout": 0.0,
        "resid_dropout": 0.0,
    },
    "gpt_oss": {**_MOE, **_MIXED},
    "gptj": {**_GPT2, "rotary_dim": 4},
    "granite": {},
    "granitemoe": _MOE,
    "granitemoehybrid": {**_MOE, **_MAMBA2, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "granitemoeshared": {**_MOE, "shared_intermediate_size": 32},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {**_MOE, "moe_topk": 2},
    "jamba": {
        **_MOE,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "jetmoe": {**_MOE, "kv_channels": 8},
    "lfm2_moe": {
        **_MOE,
        "layer_types": ["conv", "full_attention"],
        "conv_L_cache": 3,
        "num_dense_layers": 1,
    },
    "mamba2": {**_MAMBA, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "minimax": {**_MOE, "layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    "ministral": _MIXED,
    "mixtral": {**_MOE, **_WINDOW},
    "modernbert-decoder": _BERT,
    "mpt": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 2048,
        "expansion_ratio": 2,
        "resid_pdrop": 0.0,
        "emb_pdrop": 0.0,
    },
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo3": _MIXED,
    "olmo_hybrid": _HYBRID,
    "olmoe": _MOE,
    "openai-gpt": _GPT2,
    "persimmon": {},
    "phi": {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "phimoe": {**_MOE, **_WINDOW},
    "qwen2_moe": _QWEN_MOE,
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "lru_width": 32,
        "attention_window_size": 16,
        "conv1d_width": 4,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv": {"attention_hidden_size": 32, "context_length": 2048},
    "seed_oss": {"residual_dropout": 0.0},
    "stablelm": {},
    "starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0, **_WINDOW},
    "vaultgemma": _GEMMA3,
    "xglm": {"ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "d_model": 32, **_DROPOUT_FREE},
}
"""Options of each family's config, over the common ones; an option that is None is left out."""

NOT_BUILT: dict[str, str] = {}
"""The model types of transformers' causal models that no family here has, and why."""


def build(name: str, folder: Path) -> Path:
    """Write the model `name` with its tokenizer to `folder/name`, the same bits at each call, and return that folder."""
    options = {key: value for key, value in {**_COMMON, **FAMILIES[name]}.items() if value is not None}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        config = AutoConfig.for_model(options.pop("model_type", name), **options)
        model = AutoModelForCausalLM.from_config(config).float()
        _widen(model)
    special = {key: options[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**special)
    out = folder / name
    model.save_pretrained(out)
    tiny = files("fedtune") / "models" / "builtin" / "tiny"
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(str(tiny / file), out)
    return out


@torch.no_grad()
def _widen(model: torch.nn.Module) -> None:
    """Make narrow matrices wide, and give what starts as a constant (biases, norms, attention sinks) values of its own."""
    for parameter in model.parameters():
        if parameter.numel() < 2:
            continue
        if parameter.ndim >= 2 and parameter.std() < 0.1:
            parameter.normal_(0, 0.15)
        elif parameter.std() == 0:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


if __name__ == "__main__":
    for each in sys.argv[2:] or FAMILIES:
        print(build(each, Path(sys.argv[1])))  # noqa: T201
