"""RWKV-7 as flash-linear-attention has it: ``RWKV7ForCausalLM``, time mixing and channel mixing one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqarch.interop import parts
from seqarch.interop.settings import BaseSettings
from seqarch.interop.weights import Rule, WeightMap, concatenate, reshape, rule, under
from seqarch.layers.channel.mlp import round_up
from seqarch.models import LayerPattern, LMConfig
from seqarch.ops.dispatch.checks import fits

ACTIVATIONS = {"sqrelu": "squared_relu", "relu": "relu", "silu": "silu", "swish": "silu", "gelu": "gelu_tanh"}
"""Ours by their names there."""

REMOVAL_EPS = {True: 1e-6, False: 1e-12}
"""By whether norms are fused."""

NORMS = {True: "layer", False: "layer_without_bias"}


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Fields of ``RWKV7Config``; ``fuse_norm`` adds another number to the squared length of removal keys."""

    model_type = "rwkv7"
    only: ClassVar = {"attn": None}
    options: ClassVar = {
        "model": {"norm_eps": "norm_eps"},
        "rwkv7": {
            "head_dim": "head_dim",
            "decay_rank": "decay_low_rank_dim",
            "rate_rank": "a_low_rank_dim",
            "gate_rank": "gate_low_rank_dim",
            "value_rank": "v_low_rank_dim",
            "norm_eps": "norm_eps",
        },
        "rwkv_channel_mix": {"hidden": "intermediate_size"},
    }

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    hidden_ratio: float | None = 4.0
    intermediate_size: int | None = None
    head_dim: int | None = 64
    num_heads: int | None = None
    value_dim: int | list[int] | None = None
    decay_low_rank_dim: int = 64
    gate_low_rank_dim: int = 128
    a_low_rank_dim: int = 64
    v_low_rank_dim: int = 16
    hidden_act: str = "sqrelu"
    norm_first: bool = True
    norm_bias: bool = True
    norm_eps: float = 1e-5
    fuse_norm: bool = True

    def head_width(self) -> int:
        """K: as many heads as fit are the whole width."""
        width = self.head_dim or self.hidden_size // (self.num_heads or self.hidden_size + 1)
        if not width or self.hidden_size % width:
            raise self.refuse(
                "head_dim", f"it, or num_heads where it is None, to divide hidden_size, {self.hidden_size}"
            )
        return width


def lm_config(settings: Settings) -> LMConfig:
    depth, size = settings.num_hidden_layers, settings.hidden_size
    values = [settings.value_dim] * depth if fits(settings.value_dim, (int,)) else settings.value_dim
    if values not in (None, [size] * depth):
        raise settings.refuse("value_dim", f"hidden_size, {size}, in each of {depth} layers (num_hidden_layers)")
    (activation,) = settings.chosen("hidden_act", ACTIVATIONS, [settings.hidden_act])
    ratio = 4.0 if settings.hidden_ratio is None else settings.hidden_ratio
    hidden = round_up(int(size * ratio)) if settings.intermediate_size is None else settings.intermediate_size
    width = settings.head_width()
    time = {**settings.options_of("rwkv7"), "head_dim": width, "num_heads": size // width}
    time["removal_eps"] = REMOVAL_EPS[settings.fuse_norm]
    layers = []
    for i in range(depth):
        residual = {"value_residual": "take" if i else "give"}
        layers += [LayerPattern(("rwkv7",), "none", (residual,)), LayerPattern(("rwkv_channel_mix",), "none")]
    norm = NORMS[settings.norm_bias]
    return parts.lm_config(
        settings,
        layers,
        {"rwkv7": time, "rwkv_channel_mix": {"hidden": hidden, "activation": activation}},
        norm=norm,
        embedding_norm=norm if settings.norm_first else "none",
    )


def _low_rank(theirs: str, ours: str, bias: bool = True) -> list[Rule]:
    kinds = ["0.weight", "2.weight", *(["2.bias"] if bias else [])]
    return [rule(f"{theirs}.lora.{kind}", f"{ours}.{kind}") for kind in kinds]


def _time_mixing(size: int, first: bool) -> list[Rule]:
    names = {
        **{"r_proj.weight": "receptance.weight", "k_proj.weight": "key.weight", "v_proj.weight": "value.weight"},
        **{"o_proj.weight": "out_proj.weight", "k_k": "removal", "k_a": "replacement", "r_k": "bonus"},
        **{"g_norm.weight": "norm.weight", "g_norm.bias": "norm.bias"},
    }
    rows = [reshape((1, 1, size), (1, size)), concatenate(*[1] * 6)]
    return [
        rule([f"x_{kind}" for kind in "rwkvag"], "shares", *rows),
        *(rule(theirs, ours) for theirs, ours in names.items()),
        *_low_rank("w_lora", "decay"),
        *_low_rank("a_lora", "rate"),
        *_low_rank("g_lora", "gate", bias=False),
        *([] if first else _low_rank("v_lora", "value_gate")),
    ]


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    names = {"x_k": "share", "key.weight": "in_proj.weight", "value.weight": "out_proj.weight"}
    channel_mixing = [rule(theirs, ours) for theirs, ours in names.items()]
    rules = [
        rule("model.embeddings.weight", "embedding.weight"),
        *parts.norms_of(config.embedding_norm, {"embedding_norm": "model.layers.0.pre_norm"}),
        *parts.norms_of(config.norm, {"norm": "model.norm"}),
        rule("lm_head.weight", "head.weight"),
    ]
    for i in range(settings.num_hidden_layers):
        time, channel = f"stack.layers.{2 * i}.", f"stack.layers.{2 * i + 1}."
        names = {f"{time}norm": "attn_norm", f"{channel}norm": "ffn_norm"}
        block = [
            *parts.norms_of(config.norm, names),
            *under("attn.", f"{time}mixers.0.", _time_mixing(settings.hidden_size, i == 0)),
            *under("ffn.", f"{channel}mixers.0.", channel_mixing),
        ]
        rules += under(f"model.layers.{i}.", "", block)
    return WeightMap(rules, {"lm_head.weight": "model.embeddings.weight"} if config.tie_embeddings else {})
