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
_INDEXED: Options = {
    "index_topk": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "layer_types": ["indexed_attention", "indexed_attention"],
    "mlp_layer_types": ["dense", "sparse"],
}
_INKLING: Options = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 16,
    "d_rel": 8,
    "conv_kernel_size": 4,
    "layer_types": ["hybrid_sliding", "hybrid"],
    "mlp_layer_types": ["dense", "sparse"],
    "logits_mup_width_multiplier": 1.0,
}
_SEQ2SEQ: Options = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "dropout": 0.0,
    "activation_dropout": 0.0,
    "decoder_layerdrop": 0.0,
}
_GEMMA3: Options = {**_MIXED, "query_pre_attn_scalar": 8}
_GEMMA4: Options = {
    **_MIXED,
    "vocab_size_per_layer_input": 858,
    "hidden_size_per_layer_input": 8,
    "per_layer_config": {"01": {"head_dim": 16}},
}
_LLAMA4: Options = {
    **_MOE,
    "intermediate_size_mlp": 64,
    "intermediate_size": 32,
    "attention_chunk_size": 16,
    "layer_types": ["chunked_attention", "full_attention"],
    "no_rope_layers": [1, 0],
    "moe_layers": [1],
}
_LLAMA4_VISION: Options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
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
    "phi3_longrope": {
        "model_type": "phi3",
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "original_max_position_embeddings": 24,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.0, 1.0, 1.0],
            "long_factor": [1.0, 3.0, 9.0, 27.0],
            "original_max_position_embeddings": 24,
        },
    },
    "phimoe": {**_MOE, **_WINDOW, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
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
    "aria_text": {**_MOE, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": {**_MOE, **_LATENT},
    "axk2": {**_MOE, **_LATENT, **_INDEXED},
    "bailing_hybrid": {
        **_MOE,
        **_LATENT,
        "num_experts_per_token": 2,
        "num_expert_group": 1,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "bart": {**_SEQ2SEQ, "model_type": "bart"},
    "beam": {**_MOE, **_MIXED},
    "bert-generation": {**_BERT, "is_decoder": True},
    "bert_decoder": {**_BERT, "model_type": "bert", "is_decoder": True},
    "big_bird": {**_BERT, "is_decoder": True, "attention_type": "original_full"},
    "cohere2_moe": {**_MOE, **_MIXED, "logit_scale": 1.0},
    "cohere_compass_text": {
        "logit_scale": 1.0,
        **_MIXED,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "cpmant": {"dim_head": 8, "dim_ff": 64, "position_bias_num_buckets": 16, "prompt_length": 4},
    "ctrl": {**_GPT2, "dff": 64},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 2048,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v32": {**_MOE, **_LATENT, **_INDEXED},
    "deepseek_v4": {
        **_MOE,
        **_LATENT,
        **_INDEXED,
        "sliding_window": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "mlp_layer_types": ["moe", "moe"],
    },
    "dots3_note_text": {
        **_MOE,
        **_LATENT,
        **_INDEXED,
        "sliding_window": 16,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "indexed_attention"],
        "shared_experts_intermediate_size": 32,
        "per_layer_config": {},
    },
    "exaone_moe": {**_MOE, **_MIXED, "num_shared_experts": 1},
    "flint": {**_QWEN_MOE, **_MIXED, "mlp_only_layers": [0]},
    "fuyu": {
        "text_config": {**_COMMON, "model_type": "persimmon"},
        "image_size": 28,
        "patch_size": 14,
        "image_token_id": 857,
    },
    "gemma3n_text": {
        **_GEMMA3,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 858,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "intermediate_size": [64] * 4,
    },
    "gemma4_text": _GEMMA4,
    "gemma4_text_shared": {
        "model_type": "gemma4_text",
        **_MIXED,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 858,
        "hidden_size_per_layer_input": 8,
        "per_layer_config": {},
    },
    "gemma4_unified_text": {
        **_MIXED,
        "per_layer_config": {"01": {"head_dim": 16}},
        "use_bidirectional_attention": None,
    },
    "glm4_moe_lite": {**_MOE, **_LATENT},
    "glm_moe_dsa": {**_MOE, **_LATENT, **_INDEXED, "indexer_types": ["full", "shared"]},
    "gpt-sw3": _GPT2,
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "granite_swa": _MIXED,
    "granitemoe_swa": {**_MOE, **_MIXED},
    "hrm_text": {"num_hidden_layers": None, "num_layers_per_stack": 1, "embedding_scale": 1.0},
    "hy_v3": {**_MOE, "num_shared_experts": 1},
    "hy_v4": {**_MOE, **_LATENT, **_INDEXED, "indexer_types": ["full", "shared"]},
    "hyperclovax": {},
    "inkling_text": {**_MOE, **_INKLING, "rel_extent": 64},
    "inkling2_text": {
        **_MOE,
        **_INKLING,
        "unpadded_vocab_size": 858,
        "rel_extent": 64,
        "n_layers_per_attn_res_block": 1,
    },
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "kimi_linear": {
        **_MOE,
        **_LATENT,
        "num_experts_per_token": 2,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "kolibri1": {**_QWEN_MOE, **_MIXED},
    "laguna": {
        **_QWEN_MOE,
        **_MIXED,
        "num_attention_heads_per_layer": [4, 4],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "lfm3": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "sliding_attention", "full_attention"],
        "conv_L_cache": 3,
        "sliding_window": 16,
    },
    "llama4_text": _LLAMA4,
    "longcat_flash": {
        **_MOE,
        **_LATENT,
        "num_layers": 2,
        "ffn_hidden_size": 64,
        "moe_topk": 2,
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 32,
    },
    "mellum": {**_MOE, **_MIXED, "mlp_layer_types": ["dense", "sparse"]},
    "mimo_v2_flash": {
        **_MOE,
        **_MIXED,
        "mlp_layer_types": ["dense", "sparse"],
        "v_head_dim": 8,
    },
    "minicpm3": {**_LATENT, "dim_model_base": 32},
    "minimax_m2": {**_MOE, "intermediate_size": 32},
    "minimax_m3_vl_text": {
        **_MOE,
        "intermediate_size": 32,
        "dense_intermediate_size": 64,
        "shared_intermediate_size": 32,
        "rotary_dim": 4,
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["full_attention", "full_attention"],
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_block_size": 8,
        "index_topk_blocks": 2,
    },
    "ministral3": {},
    "nemotron_h": {
        **_MOE,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 32,
    },
    "qwen3_5_text": _HYBRID,
    "qwen3_5_moe_text": {**_QWEN_MOE, **_HYBRID},
    "qwen4_exp_text": {
        **_QWEN_MOE,
        **_LINEAR,
        "layer_types": ["linear_attention", "full_attention"],
        "hc_lowrank": 8,
        "ple_embed_dim": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "attention_head_size": 8,
        "feed_forward_size": 64,
        "axial_pos_embds": False,
        "num_buckets": 4,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
    "ernie": _BERT,
    "gemma4": {
        "text_config": {**_COMMON, **_GEMMA4},
        "boi_token_id": 853,
        "eoi_token_id": 854,
        "image_token_id": 855,
        "video_token_id": 856,
        "audio_token_id": 857,
    },
    "llama4": {"text_config": {**_COMMON, **_LLAMA4}, "vision_config": _LLAMA4_VISION, "image_token_index": 857},
    "megatron-bert": _BERT,
    "qwen3_5": {"text_config": {**_COMMON, **_HYBRID}},
    "roberta": _BERT,
    "roformer": {**_BERT, "embedding_size": 32},
    "xlm-roberta": _BERT,
    "electra": {**_BERT, "embedding_size": 32},
    "solar_open": _MOE,
    "trocr": {**_SEQ2SEQ, "d_model": 32, "decoder_layers": 2},
    "xlm": {
        "emb_dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "dropout": 0.0,
        "causal": True,
    },
    "xlnet": {
        "max_position_embeddings": None,
        "d_model": 32,
        "n_layer": 2,
        "n_head": 4,
        "d_inner": 64,
        "dropout": 0.0,
    },
    # Its heads' sizes are rounded up to 64 in one place and not in another.
    "xlstm": {
        "embedding_dim": 128,
        "hidden_size": 128,
        "num_blocks": 2,
        "num_heads": 4,
        "head_dim": None,
    },
    "youtu": _LATENT,
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "hybrid_layer_ids": [1],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "chunk_size": 16,
        "kv_channels": 16,
        "num_query_groups": 4,
        "adapter_rank": 4,
        "use_mamba_kernels": False,
    },
    "zaya": {**_MOE, "num_experts_per_tok": 1, "router_hidden_size": 16},
    "xglm": {"ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "d_model": 32, **_DROPOUT_FREE},
}
"""Options of each family's config, over the common ones; an option that is None is left out."""

QUICK = ("llama", "gemma3_text", "mamba", "qwen3_moe", "bloom")
"""Families that quick tests try; slow ones try all."""

NOT_CAUSAL = (
    "bert",
    "cpmant",
    "electra",
    "ernie",
    "megatron-bert",
    "roberta",
    "roformer",
    "xlm-roberta",
    "xlnet",
)
"""Families whose earlier logits depend on later tokens, as they are built here."""

_ENCODER = "an encoder that reads both ways, like bert"
_DECODER = "the decoder of a translation or summary model, like bart"
_MEDIA = "reads or makes sound or images; its text model is no causal model of its own, or is built under another name"
NOT_BUILT: dict[str, str] = {
    **dict.fromkeys(
        ("camembert", "data2vec-text", "rembert", "roberta-prelayernorm", "roc_bert", "xlm-roberta-xl", "xmod"),
        _ENCODER,
    ),
    **dict.fromkeys(
        (
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "marian",
            "mbart",
            "mvp",
            "pegasus",
            "plbart",
            "prophetnet",
        ),
        _DECODER,
    ),
    **dict.fromkeys(
        (
            "dots3_note",
            "emu3",
            "gemma3n",
            "gemma4_unified",
            "git",
            "got_ocr2",
            "mllama",
            "moshi",
            "moss_transcribe_diarize",
            "musicgen",
            "musicgen_melody",
            "phi4_multimodal",
            "qwen3_5_moe",
            "qwen4_exp",
            "whisper",
        ),
        _MEDIA,
    ),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "drafts tokens for another model's cache"),
    "blt": "reads bytes through hash tables of 500,000 rows, with a tokenizer of its own",
}
"""The other model types that transformers has as causal models, and why they are not built."""


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
