"""MiniMax-01: ``MiniMaxForCausalLM``, lightning attention and attention, with norms that the residual stream keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from seqarch.interop import decoder, parts
from seqarch.interop.parts import norm
from seqarch.interop.weights import Computed, Rule, WeightMap, reorder, rule, under
from seqarch.models import LayerPattern, LMConfig

LIGHTNING = "lightning_attention"
KINDS = {decoder.FULL: decoder.FULL, "linear_attention": LIGHTNING}


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings):
    """Fields of ``MiniMaxConfig``."""

    model_type = "minimax"
    only: ClassVar = {**decoder.DecoderSettings.only, "router_jitter_noise": 0.0}
    aliases: ClassVar = {"num_experts": "num_local_experts"}

    num_key_value_heads: int | None = 8
    sliding_window: int | None = None
    intermediate_size: int = 14336
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    layer_types: list[str] | None = None
    block_size: int = 256
    full_attn_alpha_factor: float = 1.0
    full_attn_beta_factor: float = 1.0
    linear_attn_alpha_factor: float = 1.0
    linear_attn_beta_factor: float = 1.0
    mlp_alpha_factor: float = 1.0
    mlp_beta_factor: float = 1.0
    rms_norm_eps: float = 1e-5
    rope_theta: float | None = 1e6
    max_position_embeddings: int = 131072

    def kinds(self) -> list[str]:
        """Of each layer, our mixer."""
        depth, full = self.num_hidden_layers, "attention" if self.sliding_window is None else "sliding_window"
        entries = [decoder.FULL, "linear_attention"] * depth if self.layer_types is None else self.layer_types
        chosen = self.chosen("layer_types", KINDS, entries[:depth] if self.layer_types is None else entries, depth)
        return [full if kind == decoder.FULL else kind for kind in chosen]

    def decay_factor(self, layer: int) -> float:
        """What the decays of a layer's heads are weakened by."""
        return 1 - layer / (self.num_hidden_layers - 1 + 1e-5) + 1e-5


def lm_config(settings: Settings) -> LMConfig:
    parts.check_top_k(settings, "num_experts_per_tok", normalised=True)
    kinds, activation = settings.kinds(), settings.activation()
    attention = settings.attention()
    if settings.sliding_window is not None:
        attention["window"] = settings.sliding_window
    lightning = {"num_heads": settings.num_attention_heads, "head_dim": settings.head_width, **activation}
    mixers = {kind: lightning if kind == LIGHTNING else attention for kind in sorted(set(kinds))}
    own = [{"decay_factor": settings.decay_factor(i)} if kind == LIGHTNING else {} for i, kind in enumerate(kinds)]
    moe = {
        "num_experts": settings.num_local_experts,
        "top_k": settings.num_experts_per_tok,
        "hidden": settings.intermediate_size,
        **activation,
    }
    kept, added = {"moe": settings.mlp_alpha_factor}, {"moe": settings.mlp_beta_factor}
    for kind in mixers:
        name = "linear" if kind == LIGHTNING else "full"
        kept[kind], added[kind] = (getattr(settings, f"{name}_attn_{each}_factor") for each in ("alpha", "beta"))
    return parts.lm_config(
        settings,
        [LayerPattern((kind,), "moe", (options,)) for kind, options in zip(kinds, own, strict=True)],
        mixers,
        {"moe": moe},
        norm_eps=settings.rms_norm_eps,
        norm_placement="residual",
        residual_factors={name: float(factor) for name, factor in kept.items()},
        output_factors={name: float(factor) for name, factor in added.items()},
    )


def _lightning(settings: Settings) -> list[Rule]:
    """In theirs a head's query, key and value are beside each other."""
    heads, width = settings.num_attention_heads, settings.head_width
    rows = [(3 * head + part) * width + i for part in range(3) for head in range(heads) for i in range(width)]
    return [
        rule("qkv_proj.weight", "qkv_proj.linear.weight", reorder(rows)),
        rule("output_gate.weight", "gate.weight"),
        norm("norm.weight"),
        rule("out_proj.weight", "out_proj.weight"),
    ]


def _decays(settings: Settings, layer: int) -> Iterator[tuple[str, Computed]]:
    """Tensors that theirs keeps of the decays of a layer, over the places in a block."""
    heads, factor = settings.num_attention_heads, settings.decay_factor(layer)

    def slopes(dtype: torch.dtype) -> Tensor:
        base = 1 / (2 ** (8 / heads))
        return (base ** (torch.arange(heads, dtype=dtype, device="cpu") + 1) * factor)[:, None, None]

    def after(distance: Callable[[Tensor], Tensor]) -> Computed:
        places = torch.arange(1, settings.block_size + 1, device="cpu")
        return lambda dtype: torch.exp(-slopes(dtype) * distance(places))

    def between(dtype: torch.dtype) -> Tensor:
        places = torch.arange(settings.block_size, device="cpu")
        apart = (places[:, None] - places[None, :])[None, None]
        return torch.exp(torch.where(apart >= 0, -slopes(dtype) * apart, float("-inf")))

    yield "slope_rate", slopes
    yield "query_decay", after(lambda places: places[:, None])
    yield "key_decay", after(lambda places: settings.block_size - places[:, None])
    yield "diagonal_decay", between


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    names = {"norm": "input_layernorm", "channel_norm": "post_attention_layernorm"}
    table = parts.decoder(config, {LIGHTNING: under("self_attn.", "mixers.0.", _lightning(settings))}, names)
    computed = {
        f"model.layers.{i}.self_attn.{name}": make
        for i, kind in enumerate(settings.kinds())
        if kind == LIGHTNING
        for name, make in _decays(settings, i)
    }
    return WeightMap(table.rules, table.tied, computed)
