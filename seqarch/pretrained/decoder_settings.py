"""What ``config.json`` says of a model made here, for families in the manner of Llama."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from seqarch.interop.decoder import ACTIVATIONS, MIXERS
from seqarch.models import LanguageModel
from seqarch.pretrained.kinds_of_layers import Layers

THEIR_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())} | {
    "gelu_tanh": "gelu_pytorch_tanh"
}


def rotary_settings(config: Any) -> dict[str, Any]:
    """The rotary positions of an attention, by today's name."""
    fraction = getattr(config, "rotary_fraction", 1.0)
    rope = {"rope_type": "default", "rope_theta": config.rotary_base, "partial_rotary_factor": fraction}
    scaling = {name: value for name, value in (config.rope_scaling or {}).items() if value is not None}
    first = scaling.get("original_max_position_embeddings")
    beside = {"max_position_embeddings": first} if scaling.get("rope_type") == "dynamic" else {}
    if scaling.get("rope_type") == "longrope":
        longest = round(scaling.get("factor", 1.0) * first)
        beside = {"original_max_position_embeddings": first, "max_position_embeddings": longest}
    return {"rope_parameters": {**rope, **scaling}, **beside}


def head_settings(config: Any) -> dict[str, Any]:
    """Heads and rotary positions of an attention."""
    return {
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        **rotary_settings(config),
    }


def _decoder(layers: Layers, model: LanguageModel, channel: str = "swiglu") -> dict[str, Any]:
    """What all of these families say."""
    mixer = layers.get("attention" if "attention" in layers.configs else "sliding_window")
    dense = layers.get(channel)
    return {
        **head_settings(mixer),
        "hidden_act": THEIR_ACTIVATIONS.get(dense.activation, "silu"),
        "intermediate_size": dense.hidden_width,
        "rms_norm_eps": model.config.norm_eps,
        "attention_bias": mixer.output_bias,
        "sliding_window": _window(layers),
    }


def _window(layers: Layers) -> int | None:
    return layers.configs["sliding_window"].window if "sliding_window" in layers.configs else None


def _llama(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    return {**_decoder(layers, model), "mlp_bias": layers.get("swiglu").bias}


def _windowed(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    return {**_decoder(layers, model), "use_sliding_window": _window(layers) is not None}


def _by_kind(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    """Rotary positions of each kind of layer, of the other where there are none of a kind."""
    others = _decoder(layers, model)
    any_kind = layers.configs.get("attention", layers.configs.get("sliding_window"))
    turning = {theirs: rotary_settings(layers.configs.get(ours, any_kind)) for theirs, ours in MIXERS.items()}
    return {**others, "rope_parameters": {kind: each["rope_parameters"] for kind, each in turning.items()}}


def _sparse(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    moe, dense = layers.get("moe"), layers.places("swiglu")
    return {
        **_decoder(layers, model, "swiglu" if dense else "moe"),
        "use_sliding_window": _window(layers) is not None,
        "mlp_only_layers": dense,
        "moe_intermediate_size": moe.hidden_width,
    }


def _experts(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    return _decoder(layers, model, "moe")


def _gpt_oss(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    """Theirs asks for a window even where no layer has one."""
    return {name: value for name, value in _experts(layers, model).items() if (name, value) != ("sliding_window", None)}


def _granitemoe(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    return {**_experts(layers, model), **multipliers(layers, model)}


def _granite(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    return {**_llama(layers, model), **multipliers(layers, model)}


def multipliers(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    """Granite's constants, but for that of the embedding."""
    config, attention = model.config, layers.configs.get("attention")
    scale = 1.0 if attention is None else attention.head_width**-0.5 if attention.scale is None else attention.scale
    return {
        "attention_multiplier": scale,
        "residual_multiplier": next(iter(config.output_factors.values()), 1.0),
        "logits_scaling": 1 / config.logit_scale,
    }


def _cohere(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    return {**_decoder(layers, model), "layer_norm_eps": model.config.norm_eps}


def _cohere2(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    """Layers over all tokens know no positions."""
    turning = layers.configs.get("sliding_window", layers.configs.get("attention"))
    return {**_cohere(layers, model), **rotary_settings(turning)}


def _smollm3(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    turning = [config for config in layers.each if getattr(config, "position", "none") != "none"]
    return {
        **_llama(layers, model),
        **_windowed(layers, model),
        **(rotary_settings(turning[0]) if turning else {}),
        "no_rope_layers": [int(config in turning) for config in layers.each],
    }


def _stablelm(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    return {
        **_decoder(layers, model),
        "layer_norm_eps": model.config.norm_eps,
        "use_parallel_residual": model.config.parallel != "none",
    }


def _starcoder2(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    others = _decoder(layers, model, "mlp")
    return {**others, "norm_epsilon": model.config.norm_eps, "use_bias": layers.get("mlp").bias}


def _latent(layers: Layers, model: LanguageModel, name: str = "mla") -> dict[str, Any]:
    """What DeepSeek's families say; the dense width is that of the experts where no layer is dense."""
    mixer, dense = layers.get(name), layers.places("swiglu")
    channel = layers.get("swiglu" if dense else "moe")
    return {
        **rotary_settings(mixer),
        "num_key_value_heads": mixer.heads,
        "first_k_dense_replace": len(dense),
        "intermediate_size": channel.hidden_width,
        "hidden_act": THEIR_ACTIVATIONS.get(channel.activation, "silu"),
    }


def _deepseek_v2(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    moe = layers.configs.get("moe")
    if moe is None or moe.num_groups == 1:
        return {**_latent(layers, model), "topk_method": "greedy"}
    groups = {"n_group": moe.num_groups, "topk_group": moe.chosen_groups, "topk_method": "group_limited_greedy"}
    return {**_latent(layers, model), **groups}


def _glm_moe_dsa(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    """Layers without an indexer take what the last one before them chose."""
    found, last = _latent(layers, model, "sparse_mla"), None
    kinds = []
    for config in layers.each:
        taken = getattr(config, "take_index", None)
        last = getattr(config, "give_index", None) if taken is None else last
        if taken != last and taken is not None:
            raise ValueError(f"a layer has take_index={taken!r}, expected the choice of the last indexer before it")
        kinds.append("full" if taken is None else "shared")
    return {**found, "indexer_types": kinds}


def _gemma2(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    decoder = _decoder(layers, model)
    attention = layers.get("attention" if "attention" in layers.configs else "sliding_window")
    return {
        **decoder,
        "hidden_activation": decoder["hidden_act"],
        "query_pre_attn_scalar": attention.head_width if attention.scale is None else round(attention.scale**-2),
        "attn_logit_softcapping": attention.logit_cap,
    }


def _gemma3(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    return {**_gemma2(layers, model), **_by_kind(layers, model)}


DECODERS: dict[str, Callable[[Layers, LanguageModel], dict[str, Any]]] = {
    "cohere": _cohere,
    "cohere2": _cohere2,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _latent,
    "deepseek_v32": partial(_latent, name="sparse_mla"),
    "gemma": _decoder,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "glm_moe_dsa": _glm_moe_dsa,
    "gpt_oss": _gpt_oss,
    "granite": _granite,
    "granitemoe": _granitemoe,
    "llama": _llama,
    "mistral": _decoder,
    "olmo": _decoder,
    "olmo2": _decoder,
    "olmo3": _by_kind,
    "olmoe": _experts,
    "phi3": _decoder,
    "qwen2": _windowed,
    "qwen2_moe": _sparse,
    "qwen3": _windowed,
    "qwen3_moe": _sparse,
    "smollm3": _smollm3,
    "stablelm": _stablelm,
    "starcoder2": _starcoder2,
}
"""By family, besides the options that are its fields."""
