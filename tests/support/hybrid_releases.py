"""What ``config.json`` of released state-space and hybrid models says, at small sizes."""

from __future__ import annotations

from typing import Any

SSM = {
    **{"mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2},
    **{"mamba_n_heads": 8, "mamba_proj_bias": False, "mamba_chunk_size": 16, "hidden_act": "silu"},
}
PLAIN = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
LFM2 = {
    **{"conv_L_cache": 3, "conv_bias": False, "norm_eps": 1e-5, "rope_theta": 1000000.0, "num_key_value_heads": 2},
    **{"max_position_embeddings": 128000, "use_pos_enc": True, "pad_token_id": 0, "num_heads": 4},
}
NEMOTRON = {
    **{**PLAIN, "attention_bias": False, "chunk_size": 16, "conv_kernel": 4, "expand": 2, "head_dim": 8},
    **{"hidden_dropout": 0.0, "layer_norm_epsilon": 1e-5, "mamba_head_dim": 8, "mamba_hidden_act": "silu"},
    **{"mamba_num_heads": 8, "mamba_proj_bias": False, "mlp_bias": False, "mlp_hidden_act": "relu2", "n_groups": 2},
    **{"num_key_value_heads": 2, "num_logits_to_keep": 1, "rescale_prenorm_residual": True, "ssm_state_size": 8},
    **{"residual_in_fp32": False, "rms_norm_eps": 1e-5, "sliding_window": None, "tie_word_embeddings": False},
    **{"time_step_floor": 0.0001, "time_step_limit": [0.0, float("inf")], "time_step_max": 0.1},
    **{"time_step_min": 0.001, "use_bias": False, "use_conv_bias": True, "use_mamba_kernels": True},
}
QWEN = {
    **{**PLAIN, "attention_bias": False, "attn_output_gate": True, "full_attention_interval": 4, "head_dim": 16},
    **{"hidden_act": "silu", "linear_conv_kernel_dim": 4, "linear_key_head_dim": 8, "linear_num_key_heads": 2},
    **{"linear_num_value_heads": 4, "linear_value_head_dim": 8, "mamba_ssm_dtype": "float32", "mlp_only_layers": []},
    **{"mtp_num_hidden_layers": 1, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    "rope_parameters": {
        **{"mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25},
        **{"rope_theta": 10000000, "rope_type": "default"},
    },
}

RELEASES: dict[str, dict[str, Any]] = {
    "falcon-mamba-7b": {
        **{"model_type": "falcon_mamba", "conv_kernel": 4, "expand": 16, "hidden_act": "silu", "intermediate_size": 64},
        **{"layer_norm_epsilon": 1e-5, "mixer_rms_eps": 1e-6, "rescale_prenorm_residual": False, "state_size": 16},
        **{"residual_in_fp32": True, "tie_word_embeddings": False, "time_step_rank": 4, "time_step_scale": 1.0},
        **{"use_bias": False, "use_conv_bias": True, "use_falcon_mambapy": False, "use_mambapy": False},
    },
    "Jamba-v0.1": {
        **{"model_type": "jamba", **PLAIN, "attn_layer_offset": 1, "attn_layer_period": 3, "expert_layer_offset": 1},
        **{"expert_layer_period": 2, "hidden_act": "silu", "mamba_conv_bias": True, "mamba_d_conv": 4},
        **{"mamba_d_state": 16, "mamba_dt_rank": 4, "mamba_expand": 2, "mamba_inner_layernorms": True},
        **{"mamba_proj_bias": False, "num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
        **{"output_router_logits": False, "rms_norm_eps": 1e-6, "router_aux_loss_coef": 0.001, "sliding_window": None},
        **{"tie_word_embeddings": False, "use_mamba_kernels": True, "max_position_embeddings": 262144},
    },
    "Bamba-9B": {
        **{"model_type": "bamba", **PLAIN, **SSM, "attention_bias": False, "attn_layer_indices": [1]},
        **{"attn_rotary_emb": 4, "mamba_n_groups": 1, "mlp_bias": False, "num_key_value_heads": 2},
        **{"max_position_embeddings": 262144, "num_logits_to_keep": 1, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
        **{"rope_scaling": None, "tie_word_embeddings": False},
    },
    "granite-4.0-h-tiny": {
        **{
            "model_type": "granitemoehybrid",
            **PLAIN,
            **SSM,
            "attention_bias": False,
            "attention_multiplier": 0.0078125,
        },
        **{"embedding_multiplier": 12, "init_method": "mup", "layer_types": ["mamba", "mamba", "attention", "mamba"]},
        **{"logits_scaling": 6, "mamba_n_groups": 1, "normalization_function": "rmsnorm", "num_experts_per_tok": 3},
        **{"num_key_value_heads": 2, "num_local_experts": 6, "position_embedding_type": "nope", "rms_norm_eps": 1e-5},
        **{"residual_multiplier": 0.22, "rope_scaling": None, "rope_theta": 10000, "shared_intermediate_size": 20},
        **{"tie_word_embeddings": True, "output_router_logits": False, "router_aux_loss_coef": 0.01},
    },
    "LFM2-1.2B": {
        **{"model_type": "lfm2", **LFM2, "block_auto_adjust_ff_dim": True, "block_dim": 32, "block_ff_dim": 40},
        **{"block_ffn_dim_multiplier": 1.0, "block_multiple_of": 8, "block_norm_eps": 1e-5, "block_use_swiglu": True},
        **{"conv_dim": 32, "conv_dim_out": 32, "full_attn_idxs": [2]},
    },
    "LFM2-8B-A1B": {
        **{"model_type": "lfm2_moe", **LFM2, "layer_types": ["conv", "conv", "full_attention", "conv"]},
        **{"moe_intermediate_size": 12, "norm_topk_prob": True, "num_dense_layers": 2, "num_experts": 6},
        **{"num_experts_per_tok": 4, "routed_scaling_factor": 1.0, "use_expert_bias": True},
    },
    "Nemotron-H-8B": {
        **{"model_type": "nemotron_h", **NEMOTRON, "hybrid_override_pattern": "M-M-M*-M-", "num_hidden_layers": 9},
        **{"attention_head_dim": 8},
    },
    "Nemotron-3-Nano-30B-A3B": {
        **{"model_type": "nemotron_h", **NEMOTRON, "hybrid_override_pattern": "MEMEM*EME", "num_hidden_layers": 9},
        **{"moe_intermediate_size": 12, "moe_shared_expert_intermediate_size": 20, "n_group": 1, "topk_group": 1},
        **{"n_routed_experts": 8, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 3},
        **{"routed_scaling_factor": 2.5, "partial_rotary_factor": 1.0, "rope_theta": 10000},
    },
    "Olmo-Hybrid-7B": {
        **{"model_type": "olmo_hybrid", **PLAIN, "attention_bias": False, "hidden_act": "silu", "rms_norm_eps": 1e-6},
        **{"layer_types": ["linear_attention"] * 3 + ["full_attention"], "linear_allow_neg_eigval": True},
        **{"linear_conv_kernel_dim": 4, "linear_key_head_dim": 6, "linear_num_key_heads": 4},
        **{"linear_num_value_heads": 4, "linear_value_head_dim": 12, "num_key_value_heads": 4},
        **{"rope_parameters": {"rope_theta": None, "rope_type": "default"}, "tie_word_embeddings": False},
    },
    "Qwen3.5-9B": {"model_type": "qwen3_5_text", **QWEN},
    "Qwen3.5-35B-A3B": {
        **{"model_type": "qwen3_5_moe_text", **QWEN, "moe_intermediate_size": 12, "num_experts": 6},
        **{"num_experts_per_tok": 3, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 12},
    },
    "xLSTM-7b": {
        **{"model_type": "xlstm", "embedding_dim": 32, "num_blocks": 4, "num_heads": 4, "use_bias": False},
        **{"add_out_norm": True, "norm_eps": 1e-6, "norm_reduction_force_float32": True, "qk_dim_factor": 0.5},
        **{"v_dim_factor": 1.0, "mode": "inference", "chunk_size": 16, "eps": 1e-6, "ffn_proj_factor": 2.667},
        **{"ffn_round_up_to_multiple_of": 16, "gate_soft_cap": 15.0, "output_logit_soft_cap": 30.0},
        **{"weight_mode": "single", "tie_word_embeddings": False, "max_inference_chunksize": 16384},
    },
}
"""By the release's name."""
