"""OLMo Hybrid: ``OlmoHybridForCausalLM``, Gated DeltaNet with norms before it, attention with norms after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from seqarch.interop import decoder, parts
from seqarch.interop.parts import norm, short_convolution
from seqarch.interop.weights import Rule, WeightMap, concatenate, rule, under
from seqarch.models import LMConfig

MIXERS = {"linear_attention": "gated_delta_net", "full_attention": "attention"}


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings, decoder.BiasSettings):
    """Fields of ``OlmoHybridConfig``; attention turns its heads where there is a ``rope_theta``."""

    model_type = "olmo_hybrid"
    only: ClassVar = {**decoder.DecoderSettings.only, "hidden_act": "silu"}
    in_objects: ClassVar = {**decoder.DecoderSettings.in_objects, "rope_theta": None}
    options: ClassVar = {
        "gated_delta_net": {
            "num_heads": "linear_num_value_heads",
            "num_key_heads": "linear_num_key_heads",
            "key_width": "linear_key_head_dim",
            "conv_width": "linear_conv_kernel_dim",
            "negative_eigenvalues": "linear_allow_neg_eigval",
        }
    }
    layer_kinds: ClassVar = {"layer_types": MIXERS}

    vocab_size: int = 100352
    hidden_size: int = 3840
    num_attention_heads: int = 30
    layer_types: list[str] | None = None
    linear_num_key_heads: int | None = None
    linear_num_value_heads: int | None = None
    linear_key_head_dim: int | None = None
    linear_value_head_dim: int | None = None
    linear_conv_kernel_dim: int = 4
    linear_allow_neg_eigval: bool = True
    max_position_embeddings: int = 65536

    def delta(self) -> dict[str, Any]:
        """Options of the linear attention."""
        heads = self.linear_num_value_heads or self.num_attention_heads
        key_heads = self.linear_num_key_heads or self.num_attention_heads
        keys = self.linear_key_head_dim or int(0.75 * self.hidden_size / key_heads)
        return {
            **self.options_of("gated_delta_net"),
            "num_heads": heads,
            "num_key_heads": key_heads,
            "key_width": keys,
            "expand_v": (self.linear_value_head_dim or 2 * keys) / keys,
            "norm_eps": 1e-5,  # whatever rms_norm_eps
        }

    def turns(self) -> bool:
        parameters = self.rope_scaling or self.rope_parameters or {}
        return parameters.get("rope_theta", self.rope_theta) is not None


def lm_config(settings: Settings) -> LMConfig:
    norms = {"qk_norm": True, "qk_norm_scope": "all", "norm_eps": settings.rms_norm_eps, **settings.biases()}
    still = {**settings.heads(), "position": "none", **norms}
    return parts.lm_config(
        settings,
        [f"{mixer}/swiglu" for mixer in _mixers(settings)],
        {"attention": settings.attention(**norms) if settings.turns() else still, "gated_delta_net": settings.delta()},
        {"swiglu": settings.gated_mlp()},
        norm_placements={"attention": "post"},
    )


def _mixers(settings: Settings) -> list[str]:
    depth, entries = settings.num_hidden_layers, settings.layer_types
    if entries is None:
        entries = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(depth)]
        entries = entries if depth > 3 else [*entries[:-1], "full_attention"]
    mixers = settings.chosen("layer_types", MIXERS, entries, depth)
    if len(set(mixers)) < len({*MIXERS.values()}):
        raise settings.refuse("layer_types", "both linear_attention and full_attention")
    return mixers


def _delta(options: dict[str, Any]) -> list[Rule]:
    heads, keys = options["num_heads"], options["num_key_heads"] * options["key_width"]
    values = heads * int(options["expand_v"] * options["key_width"])
    return [
        rule([f"{part}_proj.weight" for part in "qkv"], "qkv_proj.linear.weight", concatenate(keys, keys, values)),
        *short_convolution("conv1d", "qkv_proj.conv", bias=False),
        rule(["a_proj.weight", "b_proj.weight"], "ab_proj.weight", concatenate(heads, heads)),
        *(rule(name, name) for name in ("A_log", "dt_bias")),
        rule("g_proj.weight", "gate.weight"),
        norm("o_norm.weight"),
        rule("o_proj.weight", "out_proj.weight"),
    ]


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    delta = under("linear_attn.", "mixers.0.", _delta(config.mixers["gated_delta_net"]))
    return parts.decoder(config, {"gated_delta_net": delta})
