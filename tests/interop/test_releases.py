"""The settings of released checkpoints, as their ``config.json`` has them, but for sizes: they are theirs here too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from seqarch.interop import from_transformers, lm_config
from seqarch.testing import assert_close
from tests.support.families import randomised
from tests.support.hybrid_releases import RELEASES as HYBRID_RELEASES

BOUND = 1e-5
TOKENS = torch.randint(3, 53, (2, 37), generator=torch.Generator().manual_seed(1))

SIZES = {
    **{"vocab_size": 53, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 24},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
}
GROUPED = {"num_key_value_heads": 2}
PLAIN = {"attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
LLAMA = {**PLAIN, "hidden_act": "silu", "mlp_bias": False, "pretraining_tp": 1, "tie_word_embeddings": False}
LLAMA3 = {
    **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    **{"original_max_position_embeddings": 8192, "rope_type": "llama3"},
}
GRANITE = {**LLAMA, "rms_norm_eps": 1e-5, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}
PHI3 = {
    **{**PLAIN, "hidden_act": "silu", "embd_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": False},
    **{"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
}
LONGROPE = {"long_factor": [1.08, 1.1, 1.3, 64.5], "short_factor": [1.0, 1.02, 1.03, 1.1], "type": "longrope"}
GEMMA = {**PLAIN, "head_dim": 16, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 8192}
QWEN = {**PLAIN, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_sliding_window": False}
MOE = {"decoder_sparse_step": 1, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
OLMO = {**PLAIN, "hidden_act": "silu", "rope_scaling": None, "tie_word_embeddings": False, "pad_token_id": 1}
THREE_TO_ONE = ["sliding_attention"] * 3 + ["full_attention"]

DEEP_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096}
DEEPSEEK = {
    **{"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "num_key_value_heads": 4},
    **{"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "moe_layer_freq": 1},
    **{"max_position_embeddings": 163840, "rope_theta": 10000, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    **{"n_routed_experts": 16, "num_experts_per_tok": 6, "moe_intermediate_size": 12, "pretraining_tp": 1},
}

RELEASES: dict[str, dict[str, Any]] = {
    "Llama-2-7b": {"model_type": "llama", **LLAMA, "max_position_embeddings": 4096, "rope_scaling": None},
    "longchat-7b": {"model_type": "llama", **LLAMA, "rope_scaling": {"type": "linear", "factor": 8.0}},
    "Llama-3.1-8B": {
        **{"model_type": "llama", **LLAMA, **GROUPED, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5},
        **{"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    },
    "Llama-3.2-1B": {
        **{"model_type": "llama", **LLAMA, **GROUPED, "max_position_embeddings": 131072, "head_dim": 16},
        **{"rope_scaling": {**LLAMA3, "factor": 32.0}, "rope_theta": 500000.0, "tie_word_embeddings": True},
    },
    "Mistral-7B-v0.1": {
        **{"model_type": "mistral", **LLAMA, **GROUPED, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
        **{"max_position_embeddings": 32768, "sliding_window": 4096},
    },
    "Mistral-Nemo": {
        **{"model_type": "mistral", **LLAMA, **GROUPED, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "head_dim": 12},
        **{"max_position_embeddings": 131072, "sliding_window": None},
    },
    "Mixtral-8x7B": {
        **{"model_type": "mixtral", **LLAMA, **GROUPED, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
        **{"max_position_embeddings": 32768, "sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2},
        **{"output_router_logits": False, "router_aux_loss_coef": 0.02},
    },
    "Qwen2.5-7B": {
        **{"model_type": "qwen2", **QWEN, **GROUPED, "max_position_embeddings": 131072, "max_window_layers": 28},
        **{"sliding_window": 131072, "tie_word_embeddings": False, "use_mrope": False},
    },
    "Qwen2.5-7B-Instruct, for 131072 tokens": {
        **{"model_type": "qwen2", **QWEN, **GROUPED, "max_position_embeddings": 32768, "max_window_layers": 28},
        **{"sliding_window": 131072, "tie_word_embeddings": False},
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "Qwen1.5-MoE-A2.7B": {
        **{"model_type": "qwen2_moe", **QWEN, **MOE, "num_key_value_heads": 4, "max_window_layers": 21},
        **{"shared_expert_intermediate_size": 40, "norm_topk_prob": False, "sliding_window": 32768},
        **{"max_position_embeddings": 8192, "output_router_logits": False, "tie_word_embeddings": False},
    },
    "Qwen3-8B": {
        **{"model_type": "qwen3", **QWEN, **GROUPED, "head_dim": 16, "max_position_embeddings": 40960},
        **{"max_window_layers": 36, "rope_scaling": None, "sliding_window": None, "tie_word_embeddings": False},
    },
    "Qwen3-30B-A3B": {
        **{"model_type": "qwen3_moe", **QWEN, **MOE, **GROUPED, "head_dim": 16, "max_position_embeddings": 40960},
        **{"max_window_layers": 48, "mlp_only_layers": [], "norm_topk_prob": True, "output_router_logits": False},
        **{"rope_scaling": None, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False},
    },
    "granite-3.3-8b": {
        **{"model_type": "granite", **GRANITE, **GROUPED, "attention_multiplier": 0.0078125, "logits_scaling": 16.0},
        **{"max_position_embeddings": 131072, "rope_scaling": None, "rope_theta": 1e7, "tie_word_embeddings": True},
    },
    "granite-3.1-1b-a400m": {
        **{"model_type": "granitemoe", **GRANITE, **GROUPED, "attention_multiplier": 0.015625, "logits_scaling": 6.0},
        **{"num_local_experts": 6, "num_experts_per_tok": 3, "output_router_logits": False, "rope_theta": 1.5e6},
        **{"max_position_embeddings": 131072, "rope_scaling": None, "tie_word_embeddings": True},
    },
    "Phi-3-mini-4k": {
        **{"model_type": "phi3", **PHI3, "max_position_embeddings": 4096, "num_key_value_heads": 4},
        **{"rope_scaling": None, "sliding_window": 2047},
    },
    "Phi-3-mini-128k": {
        **{"model_type": "phi3", **PHI3, "max_position_embeddings": 131072, "num_key_value_heads": 4},
        **{"rope_scaling": LONGROPE, "sliding_window": 262144},
    },
    "Phi-4-mini": {
        **{"model_type": "phi3", **PHI3, **GROUPED, "max_position_embeddings": 131072, "sliding_window": 262144},
        **{
            "partial_rotary_factor": 0.75,
            "rope_scaling": {**LONGROPE, "long_factor": [1.0, 1.2, 32.0], "short_factor": [1.0] * 3},
        },
        **{"tie_word_embeddings": True},
    },
    "OLMo-1.7-7B": {"model_type": "olmo", **OLMO, "clip_qkv": 8.0, "max_position_embeddings": 4096},
    "OLMo-2-1124-7B": {"model_type": "olmo2", **OLMO, "rms_norm_eps": 1e-6, "rope_theta": 500000},
    "Olmo-3-7B": {
        **{"model_type": "olmo3", **OLMO, "rms_norm_eps": 1e-6, "rope_theta": 500000, "sliding_window": 4096},
        **{"layer_types": THREE_TO_ONE, "max_position_embeddings": 65536},
        "rope_scaling": {
            **{"attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0},
            **{"original_max_position_embeddings": 8192, "rope_type": "yarn"},
        },
    },
    "OLMoE-1B-7B": {
        **{"model_type": "olmoe", **OLMO, "clip_qkv": None, "rms_norm_eps": 1e-5, "norm_topk_prob": False},
        **{"num_experts": 6, "num_experts_per_tok": 3, "output_router_logits": False, "router_aux_loss_coef": 0.01},
    },
    "gemma-2b": {
        **{"model_type": "gemma", **GEMMA, "hidden_act": "gelu", "hidden_activation": None, "num_key_value_heads": 1},
        **{"rope_scaling": None},
    },
    "gemma-2-9b": {
        **{
            "model_type": "gemma2",
            **GEMMA,
            **GROUPED,
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
        },
        **{"final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256},
        **{"hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096, "sliding_window_size": 4096},
    },
    "gemma-3-1b": {
        **{"model_type": "gemma3_text", **GEMMA, "num_key_value_heads": 1, "attn_logit_softcapping": None},
        **{"cache_implementation": "hybrid", "final_logit_softcapping": None, "query_pre_attn_scalar": 256},
        **{"hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 10000, "rope_theta": 1000000},
        **{"rope_scaling": None, "sliding_window": 5, "sliding_window_pattern": 3, "max_position_embeddings": 32768},
    },
    "SmolLM3-3B": {
        **{"model_type": "smollm3", **LLAMA, **GROUPED, "layer_types": ["full_attention"] * 4},
        **{"max_position_embeddings": 65536, "max_window_layers": 28, "no_rope_layer_interval": 4},
        **{"no_rope_layers": [1, 1, 1, 0], "pretraining_tp": 2, "rope_scaling": None, "rope_theta": 5000000.0},
        **{"sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": True},
    },
    "starcoder2-3b, without its dropout": {
        **{"model_type": "starcoder2", **PLAIN, **GROUPED, "hidden_act": "gelu_pytorch_tanh", "mlp_type": "default"},
        **{"embedding_dropout": 0.0, "residual_dropout": 0.0, "norm_type": "layer_norm", "norm_epsilon": 1e-5},
        **{"max_position_embeddings": 16384, "rope_theta": 999999.4420358813, "sliding_window": 4096, "use_bias": True},
    },
    "stablelm-2-1_6b": {
        **{"model_type": "stablelm", **PLAIN, "hidden_act": "silu", "hidden_dropout": 0.0, "layer_norm_eps": 1e-5},
        **{"max_position_embeddings": 4096, "partial_rotary_factor": 0.25, "qk_layernorm": False, "rope_theta": 10000},
        **{"num_key_value_heads": 2, "use_parallel_residual": False, "use_qkv_bias": True, "num_attention_heads": 2},
    },
    "gpt-oss-20b": {
        **{"model_type": "gpt_oss", **GROUPED, "attention_bias": True, "attention_dropout": 0.0, "hidden_act": "silu"},
        **{"experts_per_token": 4, "num_experts_per_tok": 4, "num_local_experts": 8, "head_dim": 16},
        **{"initial_context_length": 4096, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5},
        **{"layer_types": ["sliding_attention", "full_attention"] * 2, "output_router_logits": False},
        **{"rope_scaling": {**DEEP_YARN, "factor": 32.0, "truncate": False, "rope_type": "yarn"}, "rope_theta": 150000},
        **{"router_aux_loss_coef": 0.9, "sliding_window": 9, "swiglu_limit": 7.0, "tie_word_embeddings": False},
    },
    "DeepSeek-V2-Lite": {
        **{"model_type": "deepseek_v2", **DEEPSEEK, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        **{"n_shared_experts": 2, "norm_topk_prob": False, "q_lora_rank": None, "routed_scaling_factor": 1.0},
        **{"rope_scaling": {**DEEP_YARN, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707, "type": "yarn"}},
        **{"scoring_func": "softmax", "topk_method": "greedy", "aux_loss_alpha": 0.001, "seq_aux": True},
    },
    "DeepSeek-V3": {
        **{"model_type": "deepseek_v3", **DEEPSEEK, "first_k_dense_replace": 3, "n_group": 4, "topk_group": 2},
        **{"n_shared_experts": 1, "norm_topk_prob": True, "q_lora_rank": 24, "routed_scaling_factor": 2.5},
        **{"rope_scaling": {**DEEP_YARN, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn"}},
        **{"scoring_func": "sigmoid", "topk_method": "noaux_tc", "ep_size": 1, "num_nextn_predict_layers": 1},
    },
    "DeepSeek-V3.2-Exp": {
        **{"model_type": "deepseek_v32", **DEEPSEEK, "first_k_dense_replace": 3, "n_group": 4, "topk_group": 2},
        **{"n_shared_experts": 1, "norm_topk_prob": True, "q_lora_rank": 24, "routed_scaling_factor": 2.5},
        **{"index_head_dim": 8, "index_n_heads": 12, "index_topk": 5},
        **{"rope_scaling": {**DEEP_YARN, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn"}},
        **{"scoring_func": "sigmoid", "topk_method": "noaux_tc", "ep_size": 1, "num_nextn_predict_layers": 1},
    },
    "GLM-5.2": {
        **{"model_type": "glm_moe_dsa", **DEEPSEEK, "first_k_dense_replace": 3, "n_group": 1, "topk_group": 1},
        **{"n_shared_experts": 1, "norm_topk_prob": True, "q_lora_rank": 24, "routed_scaling_factor": 2.5},
        **{"index_head_dim": 8, "index_n_heads": 12, "index_topk": 5, "indexer_rope_interleave": True},
        **{"indexer_types": ["full", "full", "shared", "shared"], "moe_router_dtype": "float32"},
        **{"rope_parameters": {"rope_theta": 8000000, "rope_type": "default"}, "rope_interleave": True},
        **{"scoring_func": "sigmoid", "topk_method": "noaux_tc", "ep_size": 1, "num_nextn_predict_layers": 1},
    },
    "c4ai-command-r-v01": {
        **{"model_type": "cohere", **PLAIN, "hidden_act": "silu", "layer_norm_eps": 1e-5, "logit_scale": 0.0625},
        **{"max_position_embeddings": 8192, "model_max_length": 131072, "rope_theta": 8000000.0, "use_qk_norm": False},
    },
    "c4ai-command-r7b-12-2024": {
        **{"model_type": "cohere2", **PLAIN, **GROUPED, "hidden_act": "silu", "layer_norm_eps": 1e-5, "head_dim": 8},
        **{"layer_switch": 4, "logit_scale": 0.25, "order_of_interleaved_layers": "local_attn_first"},
        **{"position_embedding_type": "rope_gptj", "rope_scaling": None, "rope_theta": 50000, "rotary_pct": 1.0},
        **{"sliding_window": 4096, "sliding_window_pattern": 4, "use_embedding_sharing": True},
        **{"use_gated_activation": True, "use_parallel_block": True, "max_position_embeddings": 8192},
    },
}


@pytest.mark.filterwarnings("ignore:.*rope_scaling. is deprecated")
@pytest.mark.parametrize("release", [*RELEASES, *HYBRID_RELEASES])
@torch.no_grad()
def test_settings_of_a_release_are_theirs(release: str):
    settings = {**SIZES, **(RELEASES | HYBRID_RELEASES)[release]}
    config = transformers.AutoConfig.for_model(**copy.deepcopy(settings))
    theirs = randomised(lambda: transformers.AutoModelForCausalLM.from_config(config)).eval()
    ours = from_transformers(settings, theirs.state_dict()).eval()
    assert_close(ours(TOKENS)[0], theirs(TOKENS, use_cache=False).logits, BOUND, "logits")


FACTORS = {"long_factor": [1.0, 2.0, 4.0, 8.0], "short_factor": [1.0, 1.5, 2.0, 3.0]}
SCALED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"type": "linear", "factor": 4.0}, {}),
    "dynamic": ({"type": "dynamic", "factor": 4.0}, {}),
    "dynamic, beyond": ({"type": "dynamic", "factor": 4.0, "length": 37}, {"max_position_embeddings": 16}),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 16, "truncate": False},
        {},
    ),
    "yarn, of a factor that follows": (
        {"type": "yarn", "factor": None, "mscale": 0.7, "mscale_all_dim": 0.4},
        {"original_max_position_embeddings": 8},
    ),
    "longrope": ({"type": "longrope", **FACTORS, "original_max_position_embeddings": 37}, {}),
    "longrope, beyond": ({"type": "longrope", **FACTORS, "original_max_position_embeddings": 16, "length": 37}, {}),
    "llama3": ({**LLAMA3, "original_max_position_embeddings": 16}, {}),
}


@pytest.mark.filterwarnings("ignore:.*rope_scaling. is deprecated")
@pytest.mark.parametrize("model_type", ["llama", "stablelm"])
@pytest.mark.parametrize("scaled", SCALED)
@torch.no_grad()
def test_scaled_rotary_positions_are_theirs(model_type: str, scaled: str):
    """Of whole heads and of a part of them; of a sequence longer than the first length where ``length`` says so."""
    scaling, others = SCALED[scaled]
    half = {"partial_rotary_factor": 0.5, "num_attention_heads": 2, "num_key_value_heads": 2}
    file = {**SIZES, "model_type": model_type, "max_position_embeddings": 64, **others, "rope_theta": 300.0}
    file |= half if model_type == "stablelm" else {}
    given = {**file, "rope_scaling": {name: value for name, value in scaling.items() if name != "length"}}
    config = transformers.AutoConfig.for_model(**copy.deepcopy(given))
    theirs = randomised(lambda: transformers.AutoModelForCausalLM.from_config(config)).eval()
    ours = from_transformers({**file, "rope_scaling": scaling}, theirs.state_dict()).eval()
    expected = theirs(TOKENS, use_cache=False).logits
    assert_close(ours(TOKENS)[0], expected, BOUND, "logits")
    plain = from_transformers(file, theirs.state_dict()).eval()(TOKENS)[0]
    assert scaled == "dynamic" or (plain - expected).abs().max() > 1e-2


def test_the_first_release_of_phi_3_calls_its_scaling_otherwise():
    settings = {**SIZES, **RELEASES["Phi-3-mini-128k"]}
    assert lm_config({**settings, "rope_scaling": {**LONGROPE, "type": "su"}}) == lm_config(settings)


def test_dropout_of_a_release_is_refused_and_says_how_to_go_on():
    with pytest.raises(
        ValueError, match=r"residual_dropout=0\.1 \(only 0\.0\).* is not applied here: .* in config\.json"
    ):
        lm_config({"model_type": "starcoder2", "residual_dropout": 0.1})
