"""The ``config.json`` of a family for a model of ours, checked by reading it back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from seqarch.checkpoints.building import build
from seqarch.interop import lm_config
from seqarch.layers import Layer
from seqarch.models import LanguageModel
from seqarch.pretrained.decoder_settings import DECODERS, THEIR_ACTIVATIONS, head_settings, rotary_settings
from seqarch.pretrained.hybrid_settings import HYBRIDS
from seqarch.pretrained.kinds_of_layers import Layers, kinds_of_layers, short_name
from seqarch.pretrained.options_as_settings import chosen, options_as_settings, options_named

CLASSES = {
    "bamba": "BambaForCausalLM",
    "cohere": "CohereForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM",
    "falcon_mamba": "FalconMambaForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "granite": "GraniteForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "jamba": "JambaForCausalLM",
    "kimi_linear": "KimiLinearForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "lfm2_moe": "Lfm2MoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "mamba": "MambaForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "minimax": "MiniMaxForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",
    "olmo": "OlmoForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "olmo_hybrid": "OlmoHybridForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "recurrent_gemma": "RecurrentGemmaForCausalLM",
    "rwkv7": "RWKV7ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "xlstm": "xLSTMForCausalLM",
    "zamba2": "Zamba2ForCausalLM",
}
"""What ``transformers`` calls the language models of each family."""

OF_TRAINING = {
    *("init", "embedding_std", "mup_base_width", "A_scale", "A_min", "A_max", "dt_min", "dt_max", "dt_floor"),
    *("bias_rate", "recentre_bias", "load_balance_weight", "router_z_weight", "index_loss_weight"),
}
"""Options that say how a model begins or is trained, and not what it computes."""

SIZES = {
    *("num_heads", "num_kv_heads", "num_key_heads", "head_dim", "key_width", "value_width", "hidden"),
    *("d_inner", "dt_rank", "lru_width", "gate_rank"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank", "scale"),
}
"""Options that need not be given; where both sides give them, they must agree."""

NAMES = {"give_index", "take_index"}
"""Options that are names of one's own: the layers that take something, and from which, must agree."""

FACTORS = {"expand", "expand_v", "expansion"}
"""Options that say a size by another; the shapes of the tensors tell whether they agree."""


def their_settings(family: str, model: LanguageModel, dtype: torch.dtype) -> dict[str, Any]:
    """What ``config.json`` says of a model in the form of a family.

    Those that the model was read with, if it was read from that family, and otherwise new ones, without special tokens.

    Raises:
        ValueError: the family has no such model; the error says what differs.
    """
    origin = model.origin
    try:
        if origin is not None and origin.family == family and origin.settings is not None:
            settings = dict(origin.settings)
        else:
            settings = _new_settings(family, model)
        differences = _differences(model, settings)
    except ValueError as error:
        raise ValueError(f"the model is no {family}: {error}{options_named(family, str(error))}") from error
    if differences:
        raise ValueError(f"the model is no {family}: {'; '.join(differences[:5])}")
    settings.pop("torch_dtype", None)
    return {**settings, "architectures": [CLASSES[family]], "dtype": str(dtype).removeprefix("torch.")}


def _differences(model: LanguageModel, settings: dict[str, Any]) -> list[str]:
    """Where the model that the settings describe computes something else than this one."""
    ours = lm_config(settings)
    other = build({field.name: getattr(ours, field.name) for field in fields(ours)}, (), Path("config.json"))
    if kinds_of_layers(other) != kinds_of_layers(model):
        return [f"its layers are {model.config.pattern!r}, expected {other.config.pattern!r} (channel by channel)"]
    plain: dict[str, Any] = {"pattern": "mamba", "depth": 1, "channel": "none", "mixers": {}, "channels": {}}
    plain["norm_placements"] = {}  # by path, perhaps, of what only the pattern names
    found = _differing("", replace(model.config, **plain), replace(other.config, **plain))
    own = {short_name(name): place for name, place in model.config.norm_placements.items()}
    if own != (expected := other.config.norm_placements):
        found.append(f"norm_placements={own!r}, expected {expected!r}")
    modules = dict(other.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, Layer):
            found += _differing(f"{name}: ", module.config, getattr(modules.get(name), "config", None))
    shapes, wanted = ({n: list(t.shape) for n, t in each.state_dict().items()} for each in (model, other))
    names = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
    return [*found, *(f"{name} is {shapes.get(name, 'absent')}, expected {wanted.get(name)}" for name in names)]


def _differing(where: str, own: Any, other: Any) -> list[str]:
    if type(own) is not type(other):
        return [f"{where}{type(own).__name__}, expected {type(other).__name__}"]
    ours, theirs = ({name: _without_ones(chosen(each, name)) for name in asdict(each)} for each in (own, other))
    return [
        f"{where}{option}={value!r}, expected {theirs[option]!r}"
        for option, value in ours.items()
        if not _same(value, theirs[option]) and option not in OF_TRAINING | FACTORS
        if not (option in SIZES and None in (value, theirs[option]))
        if not (option in NAMES and (option.startswith("give") or None not in (value, theirs[option])))
    ]


def _same(value: Any, other: Any) -> bool:
    """Whether they are equal, numbers but for rounding: a factor may have been taken out and put back."""
    numbers = all(isinstance(each, float) for each in (value, other))
    return value == other or (numbers and math.isclose(value, other, rel_tol=1e-12))


def _without_ones(value: Any) -> Any:
    """Factors of 1, which change nothing, as if they were not given."""
    if isinstance(value, dict):
        return {name: factor for name, factor in value.items() if factor != 1}
    return None if isinstance(value, list) and all(factor == 1 for factor in value) else value


def _new_settings(family: str, model: LanguageModel) -> dict[str, Any]:
    """By the tables that the family is read by, and by its own function for what is no option as it stands."""
    layers = Layers(model)
    return {
        "model_type": family,
        "num_hidden_layers": model.config.depth,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **options_as_settings(family, layers, model),
        **MADE_HERE[family](layers, model),
    }


def _mixtral(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    windowed = "sliding_window" in layers.configs
    mixer, dense = layers.get("sliding_window" if windowed else "attention"), layers.get("moe")
    return {
        **head_settings(mixer),
        "hidden_act": THEIR_ACTIVATIONS.get(dense.activation, "silu"),
        "sliding_window": mixer.window if windowed else None,
    }


def _falcon_h1(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    ssm, attention, swiglu = layers.get("mamba2"), layers.get("attention"), layers.get("swiglu")
    before, after = model.config.input_factors, model.config.output_factors
    return {
        **head_settings(attention),
        "attention_in_multiplier": before.get("attention", 1.0),
        "key_multiplier": 1.0 if attention.scale is None else attention.scale * attention.head_width**0.5,
        "attention_out_multiplier": after.get("attention", 1.0),
        "ssm_in_multiplier": before.get("mamba2", 1.0),
        "ssm_multipliers": ssm.in_factors or [1.0] * 5,
        "ssm_out_multiplier": after.get("mamba2", 1.0),
        "mlp_multipliers": [swiglu.gate_factor, after.get("swiglu", 1.0)],
        "lm_head_multiplier": model.config.logit_scale,
        "intermediate_size": swiglu.hidden_width,
        "mamba_d_ssm": ssm.inner_width,
        "mamba_n_heads": ssm.inner_width // ssm.head_dim,
        "mamba_d_head": ssm.head_dim,
        "mamba_n_groups": ssm.n_groups,
        "mamba_d_state": ssm.d_state,
        "mamba_d_conv": ssm.conv_width,
        "mamba_expand": 2,
        "mamba_rms_norm": ssm.output_norm != "none",
        "mamba_norm_before_gate": ssm.output_norm == "gate_last",
        "embedding_multiplier": model.config.embedding_scale,
        "rms_norm_eps": model.config.norm_eps,
    }


def _recurrent_gemma(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    window, recurrent = layers.get("sliding_window"), layers.get("rg_lru")
    names = {"rg_lru": "recurrent", "sliding_window": "attention"}
    return {
        **head_settings(window),
        "attention_window_size": window.window,
        "block_types": [names.get(mixers[0], mixers[0]) for mixers, _ in layers.kinds],
        "lru_width": recurrent.width,
        "conv1d_width": recurrent.conv_width,
        "intermediate_size": 2 * layers.get("swiglu").hidden_width,
        "logits_soft_cap": model.config.logit_cap,
        "rms_norm_eps": model.config.norm_eps,
    }


def _qwen3_5(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    return {
        **rotary_settings(layers.get("attention")),
        "linear_value_head_dim": layers.get("gated_delta_net").values,
    }


def _qwen3_next(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    moe = layers.configs.get("moe")
    shared = {} if moe is None else {"shared_expert_intermediate_size": moe.shared_width}
    return {**_qwen3_5(layers, model), "mlp_only_layers": layers.places("swiglu"), **shared}


def _kimi_linear(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    """What its tables do not say; it has both kinds of attention."""
    layers.get("kda")
    return {"num_key_value_heads": layers.get("mla").heads}


MADE_HERE: dict[str, Callable[[Layers, LanguageModel], dict[str, Any]]] = {
    **DECODERS,
    **HYBRIDS,
    "falcon_h1": _falcon_h1,
    "kimi_linear": _kimi_linear,
    "mixtral": _mixtral,
    "qwen3_5_moe_text": _qwen3_5,
    "qwen3_5_text": _qwen3_5,
    "qwen3_next": _qwen3_next,
    "recurrent_gemma": _recurrent_gemma,
}
"""By family, what its configuration says of a model that was made here, besides the options that are its fields."""
