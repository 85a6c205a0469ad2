"""Models of the ``transformers`` library as language models of this one, and back; without importing it."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from seqarch.interop import (
    bamba,
    cohere,
    cohere2,
    deepseek_v2,
    deepseek_v3,
    deepseek_v32,
    falcon_h1,
    falcon_mamba,
    gemma,
    gemma2,
    gemma3_text,
    glm_moe_dsa,
    gpt_oss,
    granite,
    granitemoe,
    granitemoehybrid,
    jamba,
    kimi_linear,
    lfm2,
    lfm2_moe,
    llama,
    mamba,
    mamba2,
    minimax,
    mistral,
    mixtral,
    nemotron_h,
    olmo,
    olmo2,
    olmo3,
    olmo_hybrid,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5_moe_text,
    qwen3_5_text,
    qwen3_moe,
    qwen3_next,
    recurrent_gemma,
    rwkv7,
    smollm3,
    stablelm,
    starcoder2,
    xlstm,
    zamba2,
)
from seqarch.interop.weights import WeightMap
from seqarch.models import LanguageModel, LMConfig
from seqarch.ops.dispatch.checks import show, unknown_name

FAMILIES: dict[str, ModuleType] = {
    "bamba": bamba,
    "cohere": cohere,
    "cohere2": cohere2,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "deepseek_v32": deepseek_v32,
    "falcon_h1": falcon_h1,
    "falcon_mamba": falcon_mamba,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3_text,
    "glm_moe_dsa": glm_moe_dsa,
    "gpt_oss": gpt_oss,
    "granite": granite,
    "granitemoe": granitemoe,
    "granitemoehybrid": granitemoehybrid,
    "jamba": jamba,
    "kimi_linear": kimi_linear,
    "lfm2": lfm2,
    "lfm2_moe": lfm2_moe,
    "llama": llama,
    "mamba": mamba,
    "mamba2": mamba2,
    "minimax": minimax,
    "mistral": mistral,
    "mixtral": mixtral,
    "nemotron_h": nemotron_h,
    "olmo": olmo,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "olmo_hybrid": olmo_hybrid,
    "olmoe": olmoe,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen2_moe": qwen2_moe,
    "qwen3": qwen3,
    "qwen3_5_moe_text": qwen3_5_moe_text,
    "qwen3_5_text": qwen3_5_text,
    "qwen3_moe": qwen3_moe,
    "qwen3_next": qwen3_next,
    "recurrent_gemma": recurrent_gemma,
    "rwkv7": rwkv7,
    "smollm3": smollm3,
    "stablelm": stablelm,
    "starcoder2": starcoder2,
    "xlstm": xlstm,
    "zamba2": zamba2,
}
"""By their ``model_type``; each module has its ``Settings``, ``lm_config(settings)`` and ``weights(settings)``."""


def lm_config(config: Any) -> LMConfig:
    """Our configuration of the model that ``config`` describes.

    Args:
        config: an object with the attributes of their configuration, or the dictionary in ``config.json``.

    Raises:
        ValueError: the family is unknown, or a setting is wrong or has no counterpart here; it is named.
    """
    config = text_settings(config)
    family = _family(config)
    return family.lm_config(family.Settings.read(config))


def weight_map(config: Any) -> WeightMap:
    """The rules between their state dict and ours; arguments and errors as in :func:`lm_config`."""
    config = text_settings(config)
    family = _family(config)
    return family.weights(family.Settings.read(config))


def from_transformers(config: Any, state_dict: Mapping[str, Tensor]) -> LanguageModel:
    """The language model that computes what theirs does.

    Args:
        config: as in :func:`lm_config`.
        state_dict: that of their ``...ForCausalLM``; copies of tied tensors may be absent. The parameters become
            float32, whatever they are here.

    Raises:
        ValueError: as in :func:`lm_config`, or tensors are missing, left over (all are listed) or of another shape.
    """
    weights = weight_map(config).to_seqarch(state_dict)
    model = LanguageModel(lm_config(config))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the state dict to read has tensors of another shape: {error}") from error
    return model


def to_transformers(config: Any, model: LanguageModel) -> dict[str, Tensor]:
    """The state dict that gives their model of this configuration what ``model`` has learnt.

    Raises:
        ValueError: the model is not that of :func:`lm_config`, or has left what theirs can express; the tensors are
            named.
    """
    return weight_map(config).to_transformers(model.state_dict())


def text_settings(config: Any) -> Any:
    """Of a file's settings of text and images, the part on text where it is of a family here; others as they are."""
    whole = config if isinstance(config, Mapping) else {}
    text = whole.get("text_config")
    if not isinstance(text, Mapping) or text.get("model_type") not in list(FAMILIES):
        return config
    if whole.get("model_type") in list(FAMILIES):
        return config
    beside = {name: whole[name] for name in ("tie_word_embeddings",) if name in whole}
    return {**beside, **text}


def _family(config: Any) -> ModuleType:
    name = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)
    if not isinstance(name, str):
        given = "no setting model_type" if name is None else f"model_type {show(name)}, expected a family's name"
        raise ValueError(f"the configuration has {given}")
    if name not in FAMILIES:
        raise unknown_name("model_type", name, FAMILIES)
    return FAMILIES[name]


__all__ = [
    "FAMILIES",
    "WeightMap",
    "from_transformers",
    "lm_config",
    "text_settings",
    "to_transformers",
    "weight_map",
]
