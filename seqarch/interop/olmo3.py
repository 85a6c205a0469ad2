"""OLMo 3: ``Olmo3ForCausalLM``, OLMo 2 with three layers over a window before each over all tokens."""

from __future__ import annotations

from dataclasses import dataclass

from seqarch.interop import decoder, parts
from seqarch.interop.weights import WeightMap
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.ByKindSettings, decoder.BiasSettings):
    """Fields of ``Olmo3Config``."""

    model_type = "olmo3"

    vocab_size: int = 50304
    rms_norm_eps: float = 1e-5
    rope_theta: float | None = 500000.0
    local_theta: float = 500000.0


def lm_config(settings: Settings) -> LMConfig:
    depth = settings.num_hidden_layers
    kinds = settings.kinds([decoder.SLIDING if (i + 1) % 4 else decoder.FULL for i in range(depth)])
    norms = {"qk_norm": True, "qk_norm_scope": "all", "norm_eps": settings.rms_norm_eps}
    attention = {**norms, **settings.biases()}
    return decoder.lm_config(
        settings,
        settings.attention_of(decoder.FULL, **attention),
        {"swiglu": settings.gated_mlp()},
        kinds=kinds,
        window=settings.sliding_window,
        sliding=settings.attention_of(decoder.SLIDING, **attention),
        norm_placement="post",
    )


def weights(settings: Settings) -> WeightMap:
    return parts.decoder(lm_config(settings))
