"""RecurrentGemma: ``RecurrentGemmaForCausalLM``, the RG-LRU and attention over a window (Griffin)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from seqarch.interop import parts
from seqarch.interop.parts import attention, gated_mlp, model, norm, short_convolution
from seqarch.interop.settings import PartialRotarySettings
from seqarch.interop.weights import WeightMap, rule, under
from seqarch.models import LMConfig

MIXERS = {"recurrent": "rg_lru", "attention": "sliding_window"}


@dataclass(frozen=True, kw_only=True)
class Settings(PartialRotarySettings):
    """Fields of ``RecurrentGemmaConfig``."""

    model_type = "recurrent_gemma"
    only: ClassVar = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attention_dropout": 0.0}
    rope_types = ("default",)
    aliases: ClassVar = {"sliding_window": "attention_window_size"}

    vocab_size: int = 256000
    hidden_size: int = 2560
    num_hidden_layers: int = 26
    block_types: list[str] = field(default_factory=lambda: ["recurrent", "recurrent", "attention"])
    num_attention_heads: int = 10
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_window_size: int = 2048
    partial_rotary_factor: float | None = 0.5
    lru_width: int | None = None
    conv1d_width: int = 4
    intermediate_size: int = 3 * 2560
    logits_soft_cap: float = 30.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True


def lm_config(settings: Settings) -> LMConfig:
    width, heads = settings.hidden_size, settings.num_attention_heads
    head_dim = settings.head_dim or width // heads
    window = {
        "num_heads": heads,
        "num_kv_heads": settings.num_key_value_heads or heads,
        "head_dim": head_dim,
        "window": settings.attention_window_size,
        "output_bias": True,
        **settings.rotary(head_dim),
    }
    recurrent = {
        "lru_width": settings.lru_width or width,
        "num_heads": heads,
        "conv_width": settings.conv1d_width,
    }
    mlp = {"hidden": settings.intermediate_size // 2, "activation": "gelu_tanh", "bias": True}
    return parts.lm_config(
        settings,
        _mixers(settings),
        {"sliding_window": window, "rg_lru": recurrent},
        {"swiglu": mlp},
        norm_eps=settings.rms_norm_eps,
        zero_centred_norms=True,
        embedding_scale=_rounded(width**0.5),
        logit_cap=settings.logits_soft_cap,
    )


def _rounded(scale: float) -> float:
    """As the buffer of bfloat16 in which their model keeps it."""
    return float(torch.tensor(scale, dtype=torch.bfloat16, device="cpu"))


def _mixers(settings: Settings) -> list[str]:
    mixers = settings.chosen("block_types", MIXERS, settings.block_types)
    return [mixers[i % len(mixers)] for i in range(settings.num_hidden_layers)]


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
    norms = [norm("temporal_pre_norm.weight"), norm("channel_pre_norm.weight", "channel_norm.weight")]
    layers = [[*norms, *under("temporal_block.", "mixers.0.", mixers[name]), *mlp] for name in _mixers(settings)]
    return model(config, layers, "model.embed_tokens.weight", norm("model.final_norm.weight"))
