"""Models of transformers' causal architectures: 2 layers of width 32 with random weights.

`SIZES` are given to a config under whatever names it has for them, so that most architectures need nothing else.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "lru_width", "embedding_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    "num_decoder_layers": 2,
    "encoder_layers": 1,
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "ffn_hidden_size"), 48),
    "encoder_ffn_dim": 48,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_state", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_chunk_size", "mamba_d_head", "linear_key_head_dim", "linear_value_head_dim"), 8),
    "linear_num_key_heads": 2,
    **dict.fromkeys(("initializer_range", "init_std"), 0.3),
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 5,  # not 0, with which rows are padded: a pad token's embedding is zero and would hide mistakes
    "is_decoder": True,
    "scale_embedding": False,
}
"""Sizes by the names that configs give them."""

ONE_LINEAR_LAYER = {"layer_types": ["linear_attention", "full_attention"]}
ONE_CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
PER_LAYER_INPUTS = {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
CONFIGS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": ONE_LINEAR_LAYER,
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 16},
    "codegen": {"rotary_dim": 4, "n_ctx": 4096},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 32},
    "gemma3n_text": {
        **PER_LAYER_INPUTS, "laurel_rank": 4, "intermediate_size": [48, 48], "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {**PER_LAYER_INPUTS, "global_head_dim": 8},
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {
        **ONE_LINEAR_LAYER, "mamba_d_head": 16, "num_local_experts": 2, "shared_intermediate_size": 16,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
    "lfm2": ONE_CONVOLUTION,
    "lfm2_moe": {**ONE_CONVOLUTION, "num_dense_layers": 1},
    "lfm3": ONE_CONVOLUTION,
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 1, "chunk_size": 8},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention"], "mamba_num_heads": 4, "mamba_head_dim": 8,
        "ssm_state_size": 4, "n_groups": 1, "chunk_size": 8, "use_mamba_kernels": False,
    },
    "qwen3_5_moe_text": ONE_LINEAR_LAYER,
    "qwen3_5_text": ONE_LINEAR_LAYER,
    "qwen3_next": ONE_LINEAR_LAYER,
    "recurrent_gemma": {
        "num_hidden_layers": 3, "block_types": ["recurrent", "attention"], "attention_window_size": 512,
    },
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "num_buckets": 4},
    "roc_bert": dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 50)
    | dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), 16),
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0},
}  # fmt: skip
"""What architectures need beside `SIZES`."""


def build_causal_lm(architecture: str, vocab_size: int, **config: Any) -> Any:
    """A small causal language model of that architecture, the same at each call."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[architecture]
    names = {*config_class().to_dict(), *inspect.signature(config_class).parameters, *config_class.attribute_map}
    sizes = {name: size for name, size in SIZES.items() if name in names}
    if "qk_rope_head_dim" in names:  # latent attention: `head_dim` follows from it, and no heads share keys
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = 4
    settings = {**sizes, "vocab_size": vocab_size, **CONFIGS.get(architecture, {}), **config}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config_class(**settings)).eval()
