"""xLSTM: ``xLSTMForCausalLM``, the mLSTM of xLSTM 7B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqarch.interop import parts
from seqarch.interop.parts import norm
from seqarch.interop.settings import BaseSettings
from seqarch.interop.weights import Rule, WeightMap, concatenate, rule, under
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Fields of ``xLSTMConfig``."""

    model_type = "xlstm"
    only: ClassVar = {"use_bias": False, "weight_mode": "single"}
    options: ClassVar = {
        "model": {"norm_eps": "norm_eps", "logit_cap": "output_logit_soft_cap"},
        "mlstm": {
            "num_heads": "num_heads",
            "gate_cap": "gate_soft_cap",
            "norm_eps": "norm_eps",
            "denominator_eps": "eps",
        },
    }

    vocab_size: int = 50304
    hidden_size: int = 4096
    embedding_dim: int | None = None
    num_hidden_layers: int = 32
    num_blocks: int | None = None
    num_heads: int = 8
    qk_dim_factor: float = 0.5
    v_dim_factor: float = 1.0
    gate_soft_cap: float = 15.0
    eps: float = 1e-6
    ffn_proj_factor: float = 2.667
    ffn_round_up_to_multiple_of: int = 64
    output_logit_soft_cap: float = 30.0
    norm_eps: float = 1e-6

    def inner(self, name: str) -> int:
        """The width of all heads together that the factor ``name`` gives."""
        width = int(self.hidden_size * getattr(self, name))
        if width < self.num_heads or width % self.num_heads:
            raise self.refuse(
                name, f"such that num_heads={self.num_heads} divides its product with hidden_size, {width}"
            )
        return width

    @property
    def hidden(self) -> int:
        """The inner width of the gated MLP."""
        multiple = self.ffn_round_up_to_multiple_of
        return int((self.hidden_size * self.ffn_proj_factor + multiple - 1) // multiple * multiple)


def lm_config(settings: Settings) -> LMConfig:
    if settings.embedding_dim not in (None, settings.hidden_size):
        raise settings.refuse("embedding_dim", f"hidden_size, {settings.hidden_size}")
    cell = {
        **settings.options_of("mlstm"),
        "key_width": settings.inner("qk_dim_factor") // settings.num_heads,
        "value_width": settings.inner("v_dim_factor") // settings.num_heads,
    }
    return parts.lm_config(
        settings,
        ["mlstm/swiglu"] * (settings.num_blocks or settings.num_hidden_layers),
        {"mlstm": cell},
        {"swiglu": {"hidden": settings.hidden}},
        tie_embeddings=False,  # theirs ties them for no configuration
    )


def _cell(settings: Settings) -> list[Rule]:
    keys, values, heads = settings.inner("qk_dim_factor"), settings.inner("v_dim_factor"), settings.num_heads
    gates = ([f"{name}_preact.{kind}" for name in ("igate", "fgate")] for kind in ("weight", "bias"))
    return [
        rule([f"{part}.weight" for part in "qkv"], "qkv_proj.linear.weight", concatenate(keys, keys, values)),
        *(rule(names, f"gates.{names[0].split('.')[-1]}", concatenate(heads, heads)) for names in gates),
        rule("ogate_preact.weight", "gate.weight"),
        rule("multihead_norm.weight", "norm_weight"),
        rule("out_proj.weight", "out_proj.weight"),
    ]


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    up = ("ffn.proj_up_gate.weight", "ffn.proj_up.weight")
    layer = [
        norm("norm_mlstm.weight"),
        *under("mlstm_layer.", "mixers.0.", _cell(settings)),
        norm("norm_ffn.weight", "channel_norm.weight"),
        rule(up, "channel.in_proj.weight", concatenate(settings.hidden, settings.hidden)),
        rule("ffn.proj_down.weight", "channel.out_proj.weight"),
    ]
    last = norm("backbone.out_norm.weight")
    return parts.model(config, [layer] * config.depth, "backbone.embeddings.weight", last, "backbone.blocks")
