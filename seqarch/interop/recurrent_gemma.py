"""RecurrentGemma: ``RecurrentGemmaForCausalLM``, the RG-LRU and attention over a window (Griffin)."""

from __future__ import annotations

import torch

from seqarch.interop import parts
from seqarch.interop.parts import attention, gated_mlp, model, norm, short_convolution
from seqarch.interop.settings import Settings
from seqarch.interop.weights import WeightMap, rule, under
from seqarch.models import LMConfig

MIXERS = {"recurrent": "rg_lru", "attention": "sliding_window"}


def lm_config(settings: Settings) -> LMConfig:
    settings.only(hidden_activation="gelu_pytorch_tanh", attention_bias=False)
    width, heads = settings.get("hidden_size"), settings.get("num_attention_heads")
    window = {
        "num_heads": heads,
        "num_kv_heads": settings.get("num_key_value_heads", default=heads),
        "head_dim": width // heads,
        "window": settings.get("attention_window_size"),
        "output_bias": True,
        **settings.rotary(fraction=0.5),
    }
    recurrent = {
        "lru_width": settings.get("lru_width", default=width),
        "num_heads": heads,
        "conv_width": settings.get("conv1d_width"),
    }
    mlp = {"hidden": settings.get("intermediate_size") // 2, "activation": "gelu_tanh", "bias": True}
    return parts.lm_config(
        settings,
        _mixers(settings),
        {"sliding_window": window, "rg_lru": recurrent},
        {"swiglu": mlp},
        tied=True,
        embedding_scale=_rounded(width**0.5),
        logit_cap=settings.get("logits_soft_cap"),
    )


def _rounded(scale: float) -> float:
    """As the buffer of bfloat16 in which their model keeps it."""
    return float(torch.tensor(scale, dtype=torch.bfloat16, device="cpu"))


def _mixers(settings: Settings) -> list[str]:
    mixers = settings.chosen("block_types", MIXERS)
    return [mixers[i % len(mixers)] for i in range(settings.get("num_hidden_layers"))]


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    linears = {"linear_x": "in_proj", "linear_y": "gate", "linear_out": "out_proj"}
    gates = {"input_gate": "write_gate", "recurrent_gate": "decay_gate"}
    recurrent = [
        *(rule(f"{a}.{kind}", f"{b}.{kind}") for a, b in linears.items() for kind in ("weight", "bias")),
        *(rule(f"rg_lru.{a}_{kind}", f"{b}.{kind}") for a, b in gates.items() for kind in ("weight", "bias")),
        *short_convolution("conv_1d", "conv", bias=True),
        rule("rg_lru.recurrent_param", "Lambda"),
    ]
    mixers = {"rg_lru": recurrent, "sliding_window": attention(config.mixers["sliding_window"])}
    mlp = gated_mlp(config.channels["swiglu"]["hidden"], "mlp_block.", bias=True)
    norms = [
        norm("temporal_pre_norm.weight", zero_centred=True),
        norm("channel_pre_norm.weight", "channel_norm.weight", zero_centred=True),
    ]
    layers = [[*norms, *under("temporal_block.", "mixers.0.", mixers[name]), *mlp] for name in _mixers(settings)]
    return model(config, layers, "model.embed_tokens.weight", norm("model.final_norm.weight", zero_centred=True))
