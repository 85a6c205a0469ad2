"""SmolLM3: ``SmolLM3ForCausalLM``, Llama of whose layers some know no positions."""

from __future__ import annotations

from dataclasses import dataclass

from seqarch.interop import decoder, parts
from seqarch.interop.weights import WeightMap
from seqarch.models import LMConfig
from seqarch.ops.dispatch.checks import fits


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings, decoder.LayerTypeSettings, decoder.BiasSettings):
    """Fields of ``SmolLM3Config``."""

    model_type = "smollm3"
    in_files_only = (*decoder.DecoderSettings.in_files_only, "no_rope_layer_interval")

    vocab_size: int = 128256
    hidden_size: int = 2048
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    rope_theta: float | None = 2e6
    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    sliding_window: int | None = None
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: int = 4
    mlp_bias: bool = False
    tie_word_embeddings: bool = True


def lm_config(settings: Settings) -> LMConfig:
    turning, windows = _turning(settings), settings.use_sliding_window and settings.sliding_window is not None
    kinds = settings.kinds([decoder.SLIDING if windows and not turns else decoder.FULL for turns in turning])
    if decoder.SLIDING in kinds and not windows:
        raise settings.refuse("use_sliding_window", "True, as layer_types has sliding_attention")
    attention = settings.attention(**settings.biases())
    still = {"position": "none", **({"rope_scaling": None} if "rope_scaling" in attention else {})}
    return decoder.lm_config(
        settings,
        attention,
        {"swiglu": settings.gated_mlp(bias=settings.mlp_bias)},
        kinds=kinds,
        window=settings.sliding_window,
        each_attention=[{} if turns else still for turns in turning],
    )


def _turning(settings: Settings) -> list[bool]:
    """Whether each layer has rotary positions, which the field's ones say, in spite of its name."""
    depth, every, entries = settings.num_hidden_layers, settings.no_rope_layer_interval, settings.no_rope_layers
    if entries is None:
        return [(i + 1) % every != 0 for i in range(depth)]
    if len(entries) != depth or not all(fits(each, (int,)) and each in (0, 1) for each in entries):
        raise settings.refuse("no_rope_layers", f"{depth} entries of 0 or 1, one per layer (num_hidden_layers)")
    return [each == 1 for each in entries]


def weights(settings: Settings) -> WeightMap:
    return parts.decoder(lm_config(settings))
