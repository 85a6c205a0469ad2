"""Tiny models of families with state-space, convolution and other recurrent layers, most of them hybrids."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import transformers

from tests.support.family_sizes import ATTENTION, EPS, SMALL, SPECIAL

SSM = {"mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 16}


def bamba(**changes: Any) -> Any:
    options = {
        "num_hidden_layers": 3,
        "attn_layer_indices": [1],
        "intermediate_size": 40,
        "rms_norm_eps": 3 * EPS,
        "time_step_limit": [0.01, 1.1],
    }
    return transformers.BambaConfig(**{**SMALL, **SPECIAL, **ATTENTION, **SSM, **options, **changes})


def falcon_mamba(**changes: Any) -> Any:
    options = {"state_size": 4, "mixer_rms_eps": EPS}
    return transformers.FalconMambaConfig(**{**SMALL, **SPECIAL, **options, **changes})


def granitemoehybrid(**changes: Any) -> Any:
    options = {
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "intermediate_size": 24,
        "shared_intermediate_size": 20,
        "num_local_experts": 4,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
        "rms_norm_eps": EPS,
    }
    return transformers.GraniteMoeHybridConfig(**{**SMALL, **SPECIAL, **ATTENTION, **SSM, **options, **changes})


def jamba(**changes: Any) -> Any:
    options = {
        "num_hidden_layers": 4,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "mamba_d_state": 12,
        "mamba_dt_rank": 4,
        "intermediate_size": 24,
        "num_experts": 4,
        "rms_norm_eps": 3 * EPS,
    }
    return transformers.JambaConfig(**{**SMALL, **SPECIAL, **ATTENTION, **options, **changes})


def lfm2(**changes: Any) -> Any:
    options = {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "intermediate_size": 48,
        "block_multiple_of": 10,
        "norm_eps": EPS,
    }
    return transformers.Lfm2Config(**{**SMALL, **SPECIAL, **ATTENTION, **options, **changes})


def lfm2_moe(**changes: Any) -> Any:
    options = {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "num_dense_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_eps": EPS,
    }
    return transformers.Lfm2MoeConfig(**{**SMALL, **SPECIAL, **ATTENTION, **options, **changes})


def minimax(**changes: Any) -> Any:
    options = {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "intermediate_size": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "block_size": 16,
        "full_attn_alpha_factor": 1.3,
        "full_attn_beta_factor": 0.6,
        "linear_attn_alpha_factor": 1.4,
        "linear_attn_beta_factor": 0.8,
        "mlp_alpha_factor": 1.2,
        "mlp_beta_factor": 0.7,
        "rms_norm_eps": EPS,
    }
    return transformers.MiniMaxConfig(**{**SMALL, **SPECIAL, **ATTENTION, **options, **changes})


def nemotron_h(**changes: Any) -> Any:
    options = {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe", "linear_attention"],
        "head_dim": 8,
        "mamba_num_heads": 6,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 16,
        "time_step_min": 0.3,
        "intermediate_size": 40,
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 20,
        "routed_scaling_factor": 1.5,
        "layer_norm_epsilon": EPS,
    }
    own = {name: size for name, size in SMALL.items() if name != "num_hidden_layers"}
    return transformers.NemotronHConfig(**{**own, **SPECIAL, **ATTENTION, **options, **changes})


LINEAR = {
    "num_hidden_layers": 3,
    "rms_norm_eps": EPS,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 8,
}


def olmo_hybrid(**changes: Any) -> Any:
    options = {"intermediate_size": 40, "linear_value_head_dim": 12}
    own = {name: size for name, size in LINEAR.items() if name not in ("head_dim", "linear_value_head_dim")}
    return transformers.OlmoHybridConfig(**{**SMALL, **SPECIAL, **ATTENTION, **own, **options, **changes})


def qwen3_5(**changes: Any) -> Any:
    options = {"intermediate_size": 40}
    return transformers.Qwen3_5TextConfig(**{**SMALL, **SPECIAL, **ATTENTION, **LINEAR, **options, **changes})


def qwen3_5_moe(**changes: Any) -> Any:
    options = {
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 20,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    return transformers.Qwen3_5MoeTextConfig(**{**SMALL, **SPECIAL, **ATTENTION, **LINEAR, **options, **changes})


def xlstm(**changes: Any) -> Any:
    options = {
        "num_heads": 4,
        "ffn_round_up_to_multiple_of": 8,
        "gate_soft_cap": 3.0,
        "output_logit_soft_cap": 2.0,
        "eps": EPS,
        "norm_eps": EPS,
        "chunk_size": 16,
    }
    return transformers.xLSTMConfig(**{**SMALL, **SPECIAL, **options, **changes})


def zamba2(**changes: Any) -> Any:
    options = {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "mamba_expand": 4,
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "mamba_ngroups": 2,
        "chunk_size": 16,
        "time_step_min": 0.05,
        "intermediate_size": 40,
        "num_key_value_heads": 4,
        "use_shared_attention_adapter": True,
        "adapter_rank": 3,
        "use_mem_rope": True,
        "rms_norm_eps": 5 * EPS,
    }
    return transformers.Zamba2Config(**{**SMALL, **SPECIAL, **ATTENTION, **options, **changes})


VARIANTS: dict[str, tuple[Callable[..., Any], list[dict[str, Any]]]] = {
    "BambaForCausalLM": (
        bamba,
        [{}, {"tie_word_embeddings": True, "attn_layer_indices": None, "time_step_limit": [0.0, inf]}],
    ),
    "FalconMambaForCausalLM": (
        falcon_mamba,
        [{}, {"tie_word_embeddings": False, "intermediate_size": 48, "time_step_rank": 5}],
    ),
    "GraniteMoeHybridForCausalLM": (
        granitemoehybrid,
        [{}, {"tie_word_embeddings": True, "num_local_experts": 0, "position_embedding_type": "rope"}],
    ),
    "JambaForCausalLM": (
        jamba,
        [{}, {"tie_word_embeddings": True, "num_experts": 1, "mamba_dt_rank": 3, "num_hidden_layers": 2}],
    ),
    "Lfm2ForCausalLM": (
        lfm2,
        [{}, {"tie_word_embeddings": False, "conv_bias": True, "conv_L_cache": 4, "block_auto_adjust_ff_dim": False}],
    ),
    "Lfm2MoeForCausalLM": (
        lfm2_moe,
        [{}, {"use_expert_bias": False, "norm_topk_prob": False, "num_dense_layers": 0, "num_experts_per_tok": 1}],
    ),
    "MiniMaxForCausalLM": (
        minimax,
        [{}, {"tie_word_embeddings": True, "layer_types": None, "head_dim": 12, "sliding_window": 5}],
    ),
    "NemotronHForCausalLM": (
        nemotron_h,
        [{}, {"moe_latent_size": 12, "n_group": 2, "topk_group": 1, "norm_topk_prob": False}],
    ),
    "OlmoHybridForCausalLM": (
        olmo_hybrid,
        [
            {},
            {"linear_allow_neg_eigval": False, "tie_word_embeddings": True}
            | {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
        ],
    ),
    "Qwen3_5ForCausalLM": (qwen3_5, [{}, {"tie_word_embeddings": True, "head_dim": 8, "linear_conv_kernel_dim": 3}]),
    "Qwen3_5MoeForCausalLM": (qwen3_5_moe, [{}]),
    "Zamba2ForCausalLM": (
        zamba2,
        [
            {},
            {"use_shared_attention_adapter": False, "num_mem_blocks": 2, "num_hidden_layers": 4}
            | {"layers_block_type": ["hybrid", "hybrid", "mamba", "hybrid"], "use_mem_rope": False}
            | {"num_attention_heads": 8, "intermediate_size": None},
        ],
    ),
    "xLSTMForCausalLM": (xlstm, [{}, {"qk_dim_factor": 0.75, "v_dim_factor": 1.5, "eps": 1e-2}]),
}
"""For each class, what makes its configuration, and settings under which it is tried."""
