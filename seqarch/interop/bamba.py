"""Bamba: ``BambaForCausalLM``, Mamba-2 with attention in some layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from seqarch.interop import decoder, mamba2, parts
from seqarch.interop.parts import gated_mlp
from seqarch.interop.settings import BaseSettings, PartialRotarySettings
from seqarch.interop.weights import WeightMap, under
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class SsmSettings(BaseSettings):
    """Fields of a Mamba-2 whose inner width is ``mamba_expand`` times that of the stream."""

    only: ClassVar = {"hidden_act": "silu", "mamba_conv_bias": True, "mamba_proj_bias": False}
    options: ClassVar = {
        "model": {"norm_eps": "rms_norm_eps"},
        "mamba2": {
            "d_state": "mamba_d_state",
            "n_groups": "mamba_n_groups",
            "conv_width": "mamba_d_conv",
            "norm_eps": "rms_norm_eps",
        },
    }

    mamba_n_heads: int = 128
    mamba_d_head: int | str = "auto"
    mamba_n_groups: int = 1
    mamba_d_state: int = 256
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    time_step_limit: list[float] | None = None
    rms_norm_eps: float = 1e-5

    def ssm(self) -> dict[str, Any]:
        """Options of the ``mamba2``."""
        inner = self.mamba_expand * self.hidden_size
        width = inner // self.mamba_n_heads
        if self.mamba_d_head not in ("auto", width) or width * self.mamba_n_heads != inner:
            raise self.refuse("mamba_d_head", f"mamba_expand times hidden_size ({inner}) over mamba_n_heads")
        return {"head_dim": width, "d_inner": inner, **self.options_of("mamba2"), **mamba2.step_size_limits(self)}


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings, decoder.BiasSettings, SsmSettings, PartialRotarySettings):
    """Fields of ``BambaConfig``."""

    model_type = "bamba"
    only: ClassVar = {**SsmSettings.only, **decoder.DecoderSettings.only}
    in_files_only = PartialRotarySettings.in_files_only

    vocab_size: int = 128000
    attn_layer_indices: list[int] | None = None
    num_key_value_heads: int | None = 8
    partial_rotary_factor: float | None = 0.5
    intermediate_size: int = 14336
    mlp_bias: bool = False
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 262144

    @classmethod
    def read(cls, config: Any) -> Self:
        """Theirs turns half of each head's channels, whatever a file has beside ``rope_parameters``."""
        return super().read({**config, "partial_rotary_factor": 0.5} if isinstance(config, Mapping) else config)


def lm_config(settings: Settings) -> LMConfig:
    full = settings.attn_layer_indices or []
    mixers = ["attention" if i in full else "mamba2" for i in range(settings.num_hidden_layers)]
    return parts.lm_config(
        settings,
        [f"{mixer}/swiglu" for mixer in mixers],
        {"attention": settings.attention(**settings.biases()), "mamba2": settings.ssm()},
        {"swiglu": settings.gated_mlp(bias=settings.mlp_bias)},
    )


def weights(settings: Settings) -> WeightMap:
    tables = {
        "mamba2": under("mamba.", "mixers.0.", mamba2.mixer()),
        "swiglu": gated_mlp(settings.intermediate_size, "feed_forward.", bias=settings.mlp_bias),
    }
    norms = {"norm": "input_layernorm", "channel_norm": "pre_ff_layernorm"}
    return parts.decoder(lm_config(settings), tables, norms, last_norm="model.final_layernorm")
