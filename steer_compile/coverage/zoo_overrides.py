"""Numbers that make a configuration tiny: one table for every class, one with the exceptions."""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]

HIDDEN = 32
VOCAB = 97
LAYERS = 3
MOST_LAYERS = 6

#: Field name -> tiny value, for every configuration class that has the field.
SIZES: Fields = {
    # width of the stream
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim", "attention_hidden_size", "lru_width"), HIDDEN
    ),
    **dict.fromkeys(
        ("word_embed_proj_dim", "input_embedding_size", "embedding_size", "embed_dim", "hidden_dim"), HIDDEN
    ),
    # depth
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers", "encoder_layers"),
        LAYERS,
    ),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "num_layers_per_stack"), LAYERS),
    "depth": 2,
    # heads
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads"), 4
    ),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_query_groups", "kv_n_heads"), 2),
    **dict.fromkeys(("swa_num_attention_heads", "linear_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("swa_num_key_value_heads", "linear_num_key_heads", "index_n_heads", "indexer_n_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "dim_head", "d_head", "kv_channels", "attention_head_dim"), 8),
    **dict.fromkeys(("attention_head_size", "index_head_dim", "indexer_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "v_head_dim", "d_rel"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim"), 4),
    "qk_head_dim": 8,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "hc_lowrank", "laurel_rank", "gated_norm_rank"), 16),
    # feed forward
    **dict.fromkeys(("intermediate_size", "ffn_dim", "dim_ff", "dff", "d_inner", "n_inner", "feed_forward_size"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("dense_intermediate_size", "intermediate_size_mlp", "prefix_dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "router_hidden_size"), 24),
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("num_shared_experts", "n_shared_experts", "moe_num_shared_experts", "first_k_dense_replace"), 1),
    "zero_expert_num": 2,
    # learned sparsity: fewer keys than the inputs are long
    "index_topk": 4,
    **dict.fromkeys(("index_topk_blocks", "index_local_blocks"), 1),
    "index_block_size": 4,
    "num_dense_layers": 1,
    # vocabulary and positions
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "shape_vocab_size"), VOCAB),
    **dict.fromkeys(("pronunciation_vocab_size", "audio_vocab_size"), VOCAB),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 64),
    **dict.fromkeys(("max_target_positions", "max_source_positions", "model_max_length", "rel_extent"), 64),
    **dict.fromkeys(("sliding_window", "window_size", "local_attention", "sliding_window_size"), 6),
    **dict.fromkeys(("attention_chunk_size", "attention_window_size", "keep_window_size"), 6),
    **dict.fromkeys(("original_max_position_embeddings",), 32),
    "hidden_size_per_layer_input": 8,
    # state space and linear attention
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 2),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size"), 4),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    "mamba_d_ssm": 64,
    # image towers
    "prompt_length": 4,
    "image_size": 16,
    "patch_size": 4,
}

#: Multipliers: never 1, so that a stage which forgets one shows up.
MULTIPLIERS: Fields = {
    "embedding_multiplier": 1.7,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.3,
    "logits_scaling": 1.9,
    "logit_scale": 0.3,
    "lm_head_multiplier": 0.7,
    "attention_in_multiplier": 1.2,
    "attention_out_multiplier": 0.8,
    "key_multiplier": 0.9,
    "ssm_in_multiplier": 1.3,
    "ssm_out_multiplier": 0.7,
    "ssm_multipliers": [1.1, 0.9, 1.2, 0.8, 1.3],
    "mlp_multipliers": [0.8, 1.2],
    "routed_scaling_factor": 1.3,
    "moe_routed_scaling_factor": 1.3,
    "router_scaling_factor": 1.3,
    "route_scale": 1.3,
    "final_logit_softcapping": 5.0,
    "attn_logit_softcapping": 7.0,
    "logits_soft_cap": 5.0,
    "moe_router_logit_softcapping": 3.0,
    "logits_mup_width_multiplier": 2.0,
    "full_attn_alpha_factor": 1.3,
    "full_attn_beta_factor": 0.7,
    "linear_attn_alpha_factor": 1.2,
    "linear_attn_beta_factor": 0.8,
    "mlp_alpha_factor": 1.1,
    "mlp_beta_factor": 0.9,
    "embedding_scale": 3.0,
    "embedding_fraction": 0.7,
    "scale_embedding": True,
    "rescale_embeddings": True,
    "mup_enabled": True,
    "scale_attn_by_inverse_layer_idx": True,
    "rescale_every": 2,
    "time_step_scale": 1.5,
}

#: Float buffers that scale, gate or route; their noise is that of a parameter.
NOISY_BUFFERS = ("layer_scalar", "e_score_correction_bias", "expert_bias", "balancing_biases")

#: Switches and identifiers that are the same for every class.
COMMON: Fields = {
    "is_decoder": True,
    "use_mamba_kernels": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "eod_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}

#: What the generic path gets wrong, by model type (a nested configuration is "type.field"). "layers" picks layers of
#: the default configuration by number; every other entry is a constructor argument.
OVERRIDES: dict[str, Fields] = {
    # sizes that must agree with each other
    "blt.global_config": {"hidden_size": 2 * HIDDEN},
    "blt.encoder_config": {"hidden_size_global": 2 * HIDDEN, "vocab_size": 260},
    "blt.decoder_config": {"hidden_size_global": 2 * HIDDEN, "vocab_size": 260},
    "blt.patcher_config": {"vocab_size": 260},
    "blt": {"encoder_hash_byte_group_vocab": 50, "vocab_size": 260},
    "longcat_flash": {"head_dim": 4},
    "deepseek_v4": {
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "index_topk": 2,
    },
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    **dict.fromkeys(("llama4.text_config", "llama4_text"), {"layers": [0, 1, 3]}),
    **dict.fromkeys(("big_bird", "bigbird_pegasus"), {"attention_type": "original_full"}),
    "mamba2": {"num_heads": 8},
    "reformer": {
        "attn_layers": ["local", "lsh", "local"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [8, 24],
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
        "hash_seed": 0,
    },
    # patterns that are not lists, or that the default configuration does not spell out
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "full_attn_idxs": None},
    "laguna": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "mellum": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding", "hybrid"], "num_experts_per_tok": 1},
    "hrm_text": {"num_layers_per_stack": 2, "L_cycles": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    **dict.fromkeys(
        ("gemma3n.text_config", "gemma3n_text"),
        {"layers": [0, 4, 18, 19], "num_kv_shared_layers": 2, "intermediate_size": [48] * 4},
    ),
    "mllama.text_config": {"cross_attention_layers": [1]},
    # shared blocks: two uses, so that the second is a second run of the same module
    **dict.fromkeys(
        ("zamba", "zamba2"),
        {
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "num_hidden_layers": 4,
            "attention_hidden_size": 2 * HIDDEN,
            "attention_head_dim": 16,
        },
    ),
    # limits of the implementation
    "xmod": {"default_language": "en_XX"},
    "dbrx.attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "dbrx.ffn_config": {"hidden_size": HIDDEN},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
    },
    **dict.fromkeys(
        ("qwen4_exp.text_config", "qwen4_exp_text"),
        {
            "indexer_kv_heads": 1,
            "indexer_budget": 4,
            "indexer_compress_ratio": 2,
            "ple_layer_ids": [1],
            "ple_embed_dim": HIDDEN,
            "ngram_vocab_size_base": 50,
            "make_ngram_vocab_size_divisible_by": 8,
            "heads_per_ngram": 2,
            "split_ngram_parts": 1,
        },
    ),
    "gemma4.text_config": {"global_head_dim": 16, "enable_moe_block": True},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified.text_config": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), {"backbone_hidden_size": HIDDEN}),
    **dict.fromkeys(
        ("gemma4_assistant.text_config", "gemma4_unified_assistant.text_config"),
        {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "global_head_dim": 16},
    ),
}

#: Nested configurations that have no default: field -> model type.
NESTED: dict[str, dict[str, str]] = {
    "gemma4_assistant": {"text_config": "gemma4_text"},
    "gemma4_unified_assistant": {"text_config": "gemma4_unified_text"},
}
