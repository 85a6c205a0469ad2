"""The options of softmax attentions: heads, positions, norms, gates."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from seqarch.layers.mixer import choose_heads
from seqarch.layers.modules.heads import HeadsConfig
from seqarch.layers.modules.rope_scaling import RopeScaling, rope_scaling
from seqarch.ops.dispatch import checks

POSITIONS = ("none", "rotary")

SCOPES = {"qk_norm_scope": ("qk_norm", "head", "all"), "output_gate_scope": ("output_gate", "channel", "head")}
"""Options that say how far another one reaches: that one, the usual reach and the other."""


@dataclass(frozen=True, kw_only=True)
class KVHeadsConfig(HeadsConfig):
    """Options of heads and their positions.

    Attributes:
        num_heads: H; by default heads of width 64 (32 where 64 does not divide D), or as many of width ``head_dim`` as
            fit into D.
        num_kv_heads: G, the heads of keys and values, each shared by ``H / G`` query heads; by default H.
        head_dim: K = V; by default ``D / H``.
        position: ``"rotary"`` or ``"none"``.
        rotary_base: base of the rotation's wavelengths; larger turns slower.
        rotary_fraction: share of each head's channels that turn, the first ones; the others know no position.
        rope_scaling: for longer sequences, ``{"rope_type": "llama3", "factor": 8.0, ...}``; types ``"linear"``,
            ``"dynamic"``, ``"yarn"``, ``"longrope"`` and ``"llama3"`` with the options of released models
            (:mod:`seqarch.layers.modules.rope_scaling`).
    """

    size_options: ClassVar[dict[str, str]] = {"num_heads": "heads", "head_dim": "head_width"}

    head_options: ClassVar[dict[str, str]] = {"num_heads": "heads", "num_kv_heads": "kv_heads", "head_dim": "keys"}

    kept_options: ClassVar[tuple[str, ...]] = ("position", "rotary_base", "rotary_fraction", "rope_scaling")

    num_kv_heads: int | None = None
    head_dim: int | None = None
    position: str = "rotary"
    rotary_base: float = 10000.0
    rotary_fraction: float = 1.0
    rope_scaling: dict[str, Any] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"num_kv_heads ({self.kv_heads}) must divide num_heads ({self.heads})")
        if self.position not in POSITIONS:
            raise checks.unknown_name("position", self.position, POSITIONS)
        if self.rotary_fraction > 1:
            raise ValueError(f"rotary_fraction must be at most 1, got {self.rotary_fraction}")
        if self.position == "rotary" and (self.rotary_width % 2 or not self.rotary_width):
            raise ValueError(
                f"rotary positions need an even number of channels, got {self.rotary_width} of {self.head_width}"
            )
        _ = self.scaling  # raises where it does not fit the heads

    @cached_property
    def scaling(self) -> RopeScaling | None:
        return rope_scaling(self.rope_scaling, self.position, self.rotary_base, self.rotary_widths)

    @property
    def heads(self) -> int:
        if self.head_dim is None:
            return choose_heads(self.d_model, self.num_heads)
        heads = self.d_model // self.head_dim if self.num_heads is None else self.num_heads
        if heads < 1:
            raise ValueError(
                f"num_heads must be positive, got {heads} (d_model {self.d_model}, head_dim {self.head_dim})"
            )
        return heads

    @property
    def kv_heads(self) -> int:
        return self.heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        return self.d_model // self.heads if self.head_dim is None else self.head_dim

    @property
    def rotary_width(self) -> int:
        return int(self.rotary_fraction * self.head_width)

    @property
    def rotary_widths(self) -> tuple[int, ...]:
        """How many channels turn, of each kind of heads there is."""
        return (self.rotary_width,)


@dataclass(frozen=True, kw_only=True)
class CachedAttentionConfig(KVHeadsConfig):
    """Options that every attention of one cache has.

    Attributes:
        qkv_bias: a bias in the projections of queries, keys and values (Qwen2).
        qk_norm: an RMS norm with weights over each head of q and k, before the rotation.
        qk_norm_scope: what that norm is over: ``"head"`` each head, ``"all"`` the channels of all heads together
            (OLMo 2).
        norm_eps: added to the mean square in those norms.
        qkv_clip: bounds queries, keys and values, after those norms, to ``-qkv_clip`` to ``qkv_clip`` (MPT, OLMo);
            ``None`` leaves them.
        zero_centred_norms: those norms multiply by ``1 + weight``, with weights of 0 at first (Gemma, Qwen3-Next).
        output_gate: multiplies what the heads read by ``sigmoid(x W_g)``, channel by channel (Qiu et al. 2025).
        output_gate_scope: what has a gate of its own: ``"channel"``, or ``"head"``.
        output_bias: a bias in the output projection.
        conv_width: width of a short convolution over queries, keys and values; 0 for none.
    """

    kept_options: ClassVar[tuple[str, ...]] = (
        *KVHeadsConfig.kept_options,
        *("qkv_bias", "qk_norm", "qk_norm_scope", "norm_eps", "qkv_clip", "zero_centred_norms"),
        *("output_gate", "output_gate_scope", "output_bias", "conv_width"),
    )

    qkv_bias: bool = False
    qk_norm: bool = False
    qk_norm_scope: str = "head"
    norm_eps: float = 1e-6
    qkv_clip: float | None = None
    zero_centred_norms: bool = False
    output_gate: bool = False
    output_gate_scope: str = "channel"
    output_bias: bool = False
    conv_width: int = 0

    def __post_init__(self):
        super().__post_init__()
        for scope, (option, usual, other) in SCOPES.items():
            given = getattr(self, scope)
            if given not in (usual, other):
                raise checks.unknown_name(scope, given, (usual, other))
            if given == other and not getattr(self, option):
                raise ValueError(f"{scope}={other!r} needs {option}=True, got {option}=False")
