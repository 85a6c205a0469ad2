"""What ``config.json`` says of a model made here, for families in the manner of Llama."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from seqarch.interop.decoder import ACTIVATIONS, MIXERS
from seqarch.models import LanguageModel
from seqarch.pretrained.kinds_of_layers import Layers

THEIR_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())} | {
    "gelu_tanh": "gelu_pytorch_tanh"
}
KINDS = {ours: theirs for theirs, ours in MIXERS.items()}


def rotary_settings(config: Any) -> dict[str, Any]:
    """The rotary positions of an attention, by today's name."""
    rope = {"rope_type": "default", "rope_theta": config.rotary_base, "partial_rotary_factor": config.rotary_fraction}
    scaling = {name: value for name, value in (config.rope_scaling or {}).items() if value is not None}
    first = scaling.get("original_max_position_embeddings")
    longest = {"max_position_embeddings": first} if scaling.get("rope_type") == "dynamic" else {}
    return {"rope_parameters": {**rope, **scaling}, **longest}


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
        "hidden_act": THEIR_ACTIVATIONS[dense.activation],
        "intermediate_size": dense.hidden_width,
        "rms_norm_eps": model.config.norm_eps,
        "attention_bias": mixer.output_bias,
        "sliding_window": _window(layers),
    }


def _window(layers: Layers) -> int | None:
    return layers.configs["sliding_window"].window if "sliding_window" in layers.configs else None


def _layer_types(layers: Layers) -> list[str]:
    return [KINDS.get(mixers[0], mixers[0]) for mixers, _ in layers.kinds]


def _llama(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    return {**_decoder(layers, model), "mlp_bias": layers.get("swiglu").bias}


def _windowed(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    windows = {"use_sliding_window": _window(layers) is not None, "layer_types": _layer_types(layers)}
    return {**_decoder(layers, model), **windows}


def _qwen3_moe(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    moe = layers.get("moe")
    dense = [i for i, (_, channel) in enumerate(layers.kinds) if channel != "moe"]
    return {
        **_decoder(layers, model, "swiglu" if dense else "moe"),
        "use_sliding_window": _window(layers) is not None,
        "mlp_only_layers": dense,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.hidden_width,
        "norm_topk_prob": moe.normalise_weights,
    }


def _granite(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    config, attention = model.config, layers.get("attention")
    return {
        **_llama(layers, model),
        "embedding_multiplier": config.embedding_scale,
        "attention_multiplier": attention.head_width**-0.5 if attention.scale is None else attention.scale,
        "residual_multiplier": config.output_factors.get("attention", 1.0),
        "logits_scaling": 1 / config.logit_scale,
    }


def _gemma2(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    attention = next(iter(layers.configs.values()))
    decoder = _decoder(layers, model)
    return {
        **decoder,
        "hidden_activation": decoder["hidden_act"],
        "layer_types": _layer_types(layers),
        "query_pre_attn_scalar": attention.head_width if attention.scale is None else round(attention.scale**-2),
        "attn_logit_softcapping": attention.logit_cap,
        "final_logit_softcapping": model.config.logit_cap,
    }


DECODERS: dict[str, Callable[[Layers, LanguageModel], dict[str, Any]]] = {
    "gemma": _decoder,
    "gemma2": _gemma2,
    "granite": _granite,
    "llama": _llama,
    "mistral": _decoder,
    "olmo2": _decoder,
    "phi3": _decoder,
    "qwen2": _windowed,
    "qwen3": _windowed,
    "qwen3_moe": _qwen3_moe,
}
"""By family, besides what all families say."""
