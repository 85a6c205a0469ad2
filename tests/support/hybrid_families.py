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
        "time_step_limit": [0.01, 0.5],
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
}
"""For each class, what makes its configuration, and settings under which it is tried."""
