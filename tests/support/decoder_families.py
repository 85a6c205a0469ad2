"""Tiny models of families in the manner of Llama."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import transformers

from tests.support.family_sizes import ATTENTION, SMALL, SPECIAL


def decoders(name: str, **own: Any) -> Callable[..., Any]:
    """What makes configurations in the manner of Llama, of the class ``name``."""

    def make(**changes: Any) -> Any:
        options = {"intermediate_size": 24, **own}
        return getattr(transformers, name)(**{**SMALL, **SPECIAL, **ATTENTION, **options, **copy.deepcopy(changes)})

    return make


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 300.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.0, 2.0, 4.0, 8.0]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
BY_KIND = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    "full_attention": {**YARN, "rope_theta": 900.0},
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
LATENT = {
    **{"num_key_value_heads": 4, "kv_lora_rank": 12, "q_lora_rank": 14, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6},
    **{"v_head_dim": 10, "n_routed_experts": 12, "n_shared_experts": 2, "num_experts_per_tok": 3},
    **{"moe_intermediate_size": 12, "routed_scaling_factor": 1.5},
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12}

VARIANTS: dict[str, tuple[Callable[..., Any], list[dict[str, Any]]]] = {
    "CohereForCausalLM": (
        decoders("CohereConfig", logit_scale=0.7),
        [{}, {"attention_bias": True, "tie_word_embeddings": False, "rope_parameters": {**YARN, "rope_theta": 300.0}}],
    ),
    "Cohere2ForCausalLM": (
        decoders(
            "Cohere2Config", logit_scale=0.7, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
        ),
        [{}, {"tie_word_embeddings": False, "rope_parameters": {**YARN, "rope_theta": 300.0}}],
    ),
    "DeepseekV2ForCausalLM": (
        decoders("DeepseekV2Config", **LATENT),
        [
            {"first_k_dense_replace": 1, "n_group": 3, "topk_group": 2, "topk_method": "group_limited_greedy"},
            {
                "q_lora_rank": None,
                "rope_parameters": {**YARN, "rope_theta": 300.0, "mscale": 0.7, "mscale_all_dim": 0.7},
            },
        ],
    ),
    "DeepseekV3ForCausalLM": (
        decoders("DeepseekV3Config", first_k_dense_replace=1, n_group=3, topk_group=2, **LATENT),
        [
            {"rope_parameters": {**YARN, "rope_theta": 300.0, "mscale": 0.7, "mscale_all_dim": 0.9}},
            {"q_lora_rank": None, "norm_topk_prob": False, "rope_interleave": False, "first_k_dense_replace": 0},
        ],
    ),
    "DeepseekV32ForCausalLM": (
        decoders(
            "DeepseekV32Config",
            **{**LATENT, "first_k_dense_replace": 1, "n_group": 3, "topk_group": 2},
            **{"index_topk": 7, "index_n_heads": 12, "index_head_dim": 8},
        ),
        [
            {"rope_parameters": {**YARN, "rope_theta": 300.0, "mscale": 0.7, "mscale_all_dim": 0.9}},
            {"mlp_layer_types": ["sparse", "dense"], "norm_topk_prob": False, "index_topk": 64},
        ],
    ),
    "Gemma2ForCausalLM": (
        decoders("Gemma2Config", head_dim=12, sliding_window=5, query_pre_attn_scalar=9),
        [{"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, {"attention_bias": True}],
    ),
    "Gemma3ForCausalLM": (
        decoders(
            "Gemma3TextConfig", head_dim=12, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
        ),
        [{}, {"rope_parameters": BY_KIND, "attention_bias": True, "tie_word_embeddings": False}],
    ),
    "GemmaForCausalLM": (decoders("GemmaConfig", head_dim=12), [{}, {"tie_word_embeddings": False}]),
    "GlmMoeDsaForCausalLM": (
        decoders(
            "GlmMoeDsaConfig",
            **{**LATENT, "num_hidden_layers": 3, "first_k_dense_replace": 1, "n_group": 3, "topk_group": 2},
            **{"index_topk": 7, "index_n_heads": 12, "index_head_dim": 8, "indexer_types": ["full", "shared", "full"]},
        ),
        [
            {"indexer_types": ["full", "shared", "shared"]},
            {"indexer_types": None, "index_topk_freq": 2, "index_skip_topk_offset": 1, "norm_topk_prob": False},
        ],
    ),
    "GptOssForCausalLM": (
        decoders("GptOssConfig", head_dim=12, sliding_window=5, num_local_experts=6, num_experts_per_tok=3),
        [
            {"swiglu_limit": 0.8},
            {"attention_bias": False, "tie_word_embeddings": True, "layer_types": ["full_attention"] * 2},
        ],
    ),
    "GraniteForCausalLM": (
        decoders("GraniteConfig", attention_multiplier=0.3, logits_scaling=3.0, embedding_multiplier=2.0),
        [{"residual_multiplier": 0.4}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}],
    ),
    "GraniteMoeForCausalLM": (
        decoders("GraniteMoeConfig", attention_multiplier=0.3, logits_scaling=3.0, num_local_experts=6),
        [{"residual_multiplier": 0.4}, {"attention_bias": True, "tie_word_embeddings": True}],
    ),
    "LlamaForCausalLM": (
        decoders("LlamaConfig"),
        [{"rope_parameters": LLAMA3}, {"attention_bias": True, "mlp_bias": True, "head_dim": 12}],
    ),
    "MistralForCausalLM": (
        decoders("MistralConfig", sliding_window=5),
        [{}, {"sliding_window": None, "head_dim": 12, "rope_parameters": YARN}],
    ),
    "Olmo2ForCausalLM": (decoders("Olmo2Config"), [{}, {"attention_bias": True, "num_key_value_heads": 4}]),
    "Olmo3ForCausalLM": (
        decoders("Olmo3Config", sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
        [{"rope_parameters": BY_KIND}, {"attention_bias": True}],
    ),
    "OlmoForCausalLM": (decoders("OlmoConfig"), [{"clip_qkv": 0.4}, {"tie_word_embeddings": True}]),
    "OlmoeForCausalLM": (
        decoders("OlmoeConfig", num_experts=6, num_experts_per_tok=3),
        [{"clip_qkv": 0.7}, {"norm_topk_prob": True, "num_key_value_heads": 4, "attention_bias": True}],
    ),
    "Phi3ForCausalLM": (
        decoders("Phi3Config", max_position_embeddings=256, original_max_position_embeddings=64),
        [{"rope_parameters": LONGROPE}, {"sliding_window": 5, "partial_rotary_factor": 0.75}],
    ),
    "Qwen2ForCausalLM": (decoders("Qwen2Config"), [{}, WINDOWS]),
    "Qwen2MoeForCausalLM": (
        decoders("Qwen2MoeConfig", shared_expert_intermediate_size=20, **EXPERTS),
        [{}, {**WINDOWS, "mlp_only_layers": [1], "norm_topk_prob": True, "qkv_bias": False}],
    ),
    "Qwen3ForCausalLM": (decoders("Qwen3Config", head_dim=12), [{}, {**WINDOWS, "attention_bias": True}]),
    "Qwen3MoeForCausalLM": (
        decoders("Qwen3MoeConfig", head_dim=12, **EXPERTS),
        [{"norm_topk_prob": True}, {**WINDOWS, "mlp_only_layers": [1], "attention_bias": True}],
    ),
    "SmolLM3ForCausalLM": (
        decoders("SmolLM3Config", no_rope_layers=[1, 0]),
        [{}, {"use_sliding_window": True, "sliding_window": 5, "rope_parameters": {**YARN, "rope_theta": 300.0}}],
    ),
    "StableLmForCausalLM": (
        decoders("StableLmConfig"),
        [{}, {"use_qkv_bias": True, "partial_rotary_factor": 0.5, "use_parallel_residual": True}],
    ),
    "Starcoder2ForCausalLM": (decoders("Starcoder2Config"), [{}, {"use_bias": False, "sliding_window": 5}]),
}
"""As those of :mod:`tests.support.families`."""
