"""LFM2: ``Lfm2ForCausalLM``, gated short convolutions with attention in some layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from seqarch.interop import parts
from seqarch.interop.parts import head_sizes, norm, short_convolution
from seqarch.interop.settings import RotarySettings
from seqarch.interop.weights import Rule, WeightMap, concatenate, rule, under
from seqarch.models import LMConfig

MIXERS = {"conv": "gated_short_conv", "full_attention": "attention", "attention": "attention"}
NORMS = {"norm": "operator_norm", "channel_norm": "ffn_norm"}


@dataclass(frozen=True, kw_only=True)
class ConvolutionSettings(RotarySettings):
    """Fields that LFM2 has with and without experts."""

    in_files_only = (*RotarySettings.in_files_only, "tie_embedding", "block_ff_dim")
    aliases: ClassVar = {"tie_embedding": "tie_word_embeddings"}
    options: ClassVar = {
        "model": {"norm_eps": "norm_eps"},
        "gated_short_conv": {"conv_width": "conv_L_cache", "bias": "conv_bias"},
        "swiglu": {"hidden": "intermediate_size"},
    }
    layer_kinds: ClassVar = {"layer_types": MIXERS}

    vocab_size: int = 65536
    hidden_size: int = 2560
    num_hidden_layers: int = 32
    layer_types: list[str] | None = None
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None
    conv_L_cache: int = 3  # noqa: N815 their name
    conv_bias: bool = False
    intermediate_size: int = 12288
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    rope_theta: float | None = 1e6
    max_position_embeddings: int = 128_000

    def mixers(self) -> dict[str, dict[str, Any]]:
        """Options of the mixers."""
        if not 2 <= self.conv_L_cache <= 8:
            raise self.refuse("conv_L_cache", "2 to 8")
        width = self.head_dim or self.hidden_size // self.num_attention_heads
        rotary = self.rotary(width)  # first, as it refuses a width of 0
        attention = {
            "num_heads": self.num_attention_heads,
            "num_kv_heads": self.num_key_value_heads,
            "head_dim": width,
            "qk_norm": True,
            "norm_eps": self.norm_eps,
            **rotary,
        }
        return {"gated_short_conv": self.options_of("gated_short_conv"), "attention": attention}


@dataclass(frozen=True, kw_only=True)
class Settings(ConvolutionSettings):
    """Fields of ``Lfm2Config``."""

    model_type = "lfm2"
    aliases: ClassVar = {**ConvolutionSettings.aliases, "block_ff_dim": "intermediate_size"}
    in_files_only = (*ConvolutionSettings.in_files_only, "full_attn_idxs")

    full_attn_idxs: list[int] | None = None
    block_auto_adjust_ff_dim: bool = True
    block_ffn_dim_multiplier: float | None = 1.0
    block_multiple_of: int = 256

    @property
    def hidden(self) -> int:
        """The inner width of the gated MLP."""
        if not self.block_auto_adjust_ff_dim:
            return self.intermediate_size
        width, factor, multiple = (
            int(2 * self.intermediate_size / 3),
            self.block_ffn_dim_multiplier,
            self.block_multiple_of,
        )
        return width if factor is None else -(-int(factor * width) // multiple) * multiple


def lm_config(settings: Settings) -> LMConfig:
    depth, full = settings.num_hidden_layers, settings.full_attn_idxs
    kinds = ["full_attention" if full is None or i in full else "conv" for i in range(depth)]
    entries = kinds if settings.layer_types is None else settings.layer_types
    return parts.lm_config(
        settings,
        [f"{mixer}/swiglu" for mixer in settings.chosen("layer_types", MIXERS, entries, depth)],
        settings.mixers(),
        {"swiglu": {"hidden": settings.hidden}},
    )


def tables(config: LMConfig, bias: bool) -> dict[str, list[Rule]]:
    """Rules of the mixers and of the gated MLP."""
    attention = [
        rule(
            [f"{part}_proj.weight" for part in "qkv"],
            "qkv_proj.linear.weight",
            concatenate(*head_sizes(config.mixers["attention"])),
        ),
        norm("q_layernorm.weight", "query_norm.weight"),
        norm("k_layernorm.weight", "key_norm.weight"),
        rule("out_proj.weight", "out_proj.weight"),
    ]
    kinds = ("weight", "bias") if bias else ("weight",)
    convolution = [
        *(rule(f"{name}.{kind}", f"{name}.{kind}") for name in ("in_proj", "out_proj") for kind in kinds),
        *short_convolution("conv", "conv", bias),
    ]
    hidden = config.channels["swiglu"]["hidden"]
    up = [f"feed_forward.{name}.weight" for name in ("w1", "w3")]
    return {
        "attention": under("self_attn.", "mixers.0.", attention),
        "gated_short_conv": under("conv.", "mixers.0.", convolution),
        "swiglu": [
            rule(up, "channel.in_proj.weight", concatenate(hidden, hidden)),
            rule("feed_forward.w2.weight", "channel.out_proj.weight"),
        ],
    }


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    rules = tables(config, settings.conv_bias)
    return parts.decoder(config, rules, NORMS, last_norm="model.embedding_norm")
