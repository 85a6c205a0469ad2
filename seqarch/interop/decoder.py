"""What decoders in the manner of Llama share: layers of attention, over all tokens or a window, and a gated MLP or a
mixture of experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from seqarch.interop import parts
from seqarch.interop.settings import BaseSettings, RotarySettings
from seqarch.models import LayerPattern, LMConfig
from seqarch.ops.dispatch.checks import unknown_name

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "squared_relu",
    "silu": "silu",
    "swish": "silu",
}
"""Ours by their names in ``transformers``."""

FULL, SLIDING = "full_attention", "sliding_attention"
MIXERS = {FULL: "attention", SLIDING: "sliding_window"}
"""Ours by the kinds of layers in ``layer_types``."""


@dataclass(frozen=True, kw_only=True)
class DecoderSettings(RotarySettings):
    """The fields that all of these families have."""

    only: ClassVar[Mapping[str, Any]] = {"attention_dropout": 0.0}
    options: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "model": {"norm_eps": "rms_norm_eps"},
        "swiglu": {"hidden": "intermediate_size"},
        "mlp": {"hidden": "intermediate_size"},
    }

    vocab_size: int = 32000
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 11008
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def heads(self) -> dict[str, Any]:
        """Options of an attention's heads, but for their positions."""
        return {
            "num_heads": self.num_attention_heads,
            "num_kv_heads": self.num_key_value_heads or self.num_attention_heads,
            "head_dim": self.head_width,
        }

    def attention(self, **others: Any) -> dict[str, Any]:
        """Options of an attention: heads, their positions, and ``others``."""
        return {**self.rotary(self.head_width), **self.heads(), **others}  # rotary first: it refuses a width of 0

    def activation(self) -> dict[str, str]:
        """The option of a channel mixer; none for SiLU, their default.

        Raises:
            ValueError: it has no counterpart here.
        """
        given = self.hidden_act
        if given not in ACTIVATIONS:
            raise ValueError(f"{self.model_type}: {unknown_name(self.called('hidden_act'), given, ACTIVATIONS)}")
        return {} if ACTIVATIONS[given] == "silu" else {"activation": ACTIVATIONS[given]}

    def gated_mlp(self, **others: Any) -> dict[str, Any]:
        """Options of a ``swiglu``."""
        return {"hidden": self.intermediate_size, **self.activation(), **others}

    def plain_mlp(self, **others: Any) -> dict[str, Any]:
        """Options of an ``mlp``."""
        return {"hidden": self.intermediate_size, "activation": "silu", **self.activation(), **others}


@dataclass(frozen=True, kw_only=True)
class BiasSettings(BaseSettings):
    """Biases of an attention's projections."""

    attention_bias: bool = False

    def biases(self) -> dict[str, bool]:
        return {"qkv_bias": self.attention_bias, "output_bias": self.attention_bias}


@dataclass(frozen=True, kw_only=True)
class LayerTypeSettings(BaseSettings):
    """Layers of which each is named, as one over a window or over all tokens; with a rule for files without names.

    Attributes:
        layer_types: for each layer ``"full_attention"`` or ``"sliding_attention"``.
    """

    options: ClassVar[Mapping[str, Mapping[str, str]]] = {"sliding_window": {"window": "sliding_window"}}
    layer_kinds: ClassVar[Mapping[str, Mapping[str, str]]] = {"layer_types": MIXERS}

    sliding_window: int | None = 4096
    layer_types: list[str] | None = None

    def kinds(self, default: Sequence[str]) -> list[str]:
        """The kind of each layer, ``default`` where no field names them."""
        entries = list(default) if self.layer_types is None else self.layer_types
        kinds = self.chosen("layer_types", {name: name for name in MIXERS}, entries, self.num_hidden_layers)
        if SLIDING in kinds and self.sliding_window is None:
            raise self.refuse("sliding_window", "an integer, as layer_types has sliding_attention")
        return kinds


@dataclass(frozen=True, kw_only=True)
class SomeWindowsSettings(LayerTypeSettings):
    """Layers from ``max_window_layers`` on that are over a window, if at all (Qwen2, Qwen3)."""

    in_files_only: ClassVar[tuple[str, ...]] = ("use_sliding_window", "max_window_layers")
    in_objects: ClassVar[Mapping[str, Any]] = {"use_sliding_window": None}

    use_sliding_window: bool | None = False
    max_window_layers: int = 28

    def window_kinds(self) -> list[str]:
        """The kind of each layer."""
        first = self.max_window_layers if self.use_sliding_window else self.num_hidden_layers
        kinds = self.kinds([FULL if i < first else SLIDING for i in range(self.num_hidden_layers)])
        if SLIDING in kinds and self.use_sliding_window is False:
            raise self.refuse("use_sliding_window", "True, as layer_types has sliding_attention")
        return kinds


@dataclass(frozen=True, kw_only=True)
class ByKindSettings(DecoderSettings, LayerTypeSettings):
    """Rotary positions of each kind of layer by itself; a file's ``rope_scaling`` and ``rope_theta`` are of full ones.

    Attributes:
        local_theta: the base of sliding layers, where nothing is said of them.
    """

    unread: ClassVar[tuple[str, ...]] = ("original_max_position_embeddings", "local_theta")

    local_theta: float = 10000.0

    def attention_of(self, kind: str, **others: Any) -> dict[str, Any]:
        """Options of the attention of layers of a kind: heads, their positions, and ``others``."""
        found = dict((self.rope_parameters or {}).get(kind) or {})
        name, theta = f"rope_parameters: {kind}", self.local_theta
        if kind == FULL:
            found, theta = found | (self.rope_scaling or {}), self.rope_theta
            name = "rope_scaling" if self.rope_scaling else name
        return {**self.rotation(self.head_width, name, found, theta), **self.heads(), **others}


@dataclass(frozen=True, kw_only=True)
class SparseSettings(BaseSettings):
    """Experts in some layers and a gated MLP in the others (Qwen's families)."""

    options: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "moe": {
            "num_experts": "num_experts",
            "top_k": "num_experts_per_tok",
            "hidden": "moe_intermediate_size",
            "normalise_weights": "norm_topk_prob",
        }
    }

    mlp_only_layers: list[int] | None = None
    decoder_sparse_step: int = 1
    moe_intermediate_size: int = 768
    num_experts: int = 128
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False

    def channels(self) -> list[str]:
        """The channel mixer of each layer."""
        dense, step = self.mlp_only_layers or [], self.decoder_sparse_step
        sparse = [i not in dense and (i + 1) % step == 0 for i in range(self.num_hidden_layers)]
        return ["moe" if each else "swiglu" for each in sparse]

    def experts(self, **others: Any) -> dict[str, Any]:
        """Options of a ``moe``.

        Raises:
            ValueError: its router could not learn.
        """
        parts.check_top_k(self, "num_experts_per_tok", self.norm_topk_prob and "moe" in self.channels())
        return {**self.options_of("moe"), **others}


@dataclass(frozen=True, kw_only=True)
class MultiplierSettings(BaseSettings):
    """Constants that Granite multiplies by."""

    options: ClassVar[Mapping[str, Mapping[str, str]]] = {"model": {"embedding_scale": "embedding_multiplier"}}

    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0

    def score_scale(self) -> dict[str, float]:
        return {"scale": float(self.attention_multiplier)}

    def multipliers(self, *names: str) -> dict[str, Any]:
        """Options of a model whose mixers and channel mixers have these names."""
        factor = self.residual_multiplier
        return {
            "embedding_scale": float(self.embedding_multiplier),
            "output_factors": {} if factor == 1 else dict.fromkeys(names, float(factor)),
            "logit_scale": 1 / self.logits_scaling,
        }


def lm_config(
    settings: DecoderSettings,
    attention: Mapping[str, Any],
    channels: Mapping[str, Mapping[str, Any]],
    *,
    kinds: Sequence[str] | None = None,
    window: int | None = None,
    sliding: Mapping[str, Any] | None = None,
    each_channel: Sequence[str] | None = None,
    each_attention: Sequence[Mapping[str, Any]] | None = None,
    **others: Any,
) -> LMConfig:
    """Our configuration of layers of one attention and one channel mixer each.

    Args:
        attention: options of every layer's attention.
        channels: options by channel mixer.
        kinds: of each layer, one of :data:`MIXERS`; by default all are over the window, where there is one.
        window: tokens that a token of sliding layers sees.
        sliding: options of the attention of sliding layers, where they have others.
        each_channel: the channel mixer of each layer, where there are several.
        each_attention: options of each layer's attention alone.
        others: further options of the model.
    """
    depth = settings.num_hidden_layers
    kinds = [FULL if window is None else SLIDING] * depth if kinds is None else kinds
    each_channel = [next(iter(channels))] * depth if each_channel is None else each_channel
    own = [{}] * depth if each_attention is None else each_attention
    layers = [
        LayerPattern((MIXERS[kind],), channel, (dict(options),))
        for kind, channel, options in zip(kinds, each_channel, own, strict=True)
    ]
    options = {FULL: dict(attention), SLIDING: {**(sliding or attention), "window": window}}
    return parts.lm_config(
        settings,
        layers,
        {MIXERS[kind]: options[kind] for kind in MIXERS if kind in kinds},
        {name: dict(channels[name]) for name in channels if name in each_channel},
        **others,
    )
