"""Models of the ``transformers`` library as language models of this one, and back; without importing it."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from seqarch.interop import falcon_h1, kimi_linear, mamba, mamba2, mixtral, qwen3_next, recurrent_gemma
from seqarch.interop.settings import Settings
from seqarch.interop.weights import WeightMap
from seqarch.models import LanguageModel, LMConfig
from seqarch.ops.dispatch.checks import unknown_name

FAMILIES: dict[str, ModuleType] = {
    "falcon_h1": falcon_h1,
    "kimi_linear": kimi_linear,
    "mamba": mamba,
    "mamba2": mamba2,
    "mixtral": mixtral,
    "qwen3_next": qwen3_next,
    "recurrent_gemma": recurrent_gemma,
}
"""By their ``model_type``; each module has ``lm_config(settings)`` and ``weights(settings)``."""


def lm_config(config: Any) -> LMConfig:
    """Our configuration of the model that ``config`` describes.

    Args:
        config: an object with the attributes of their configuration, or the dictionary in ``config.json``.

    Raises:
        ValueError: the family is unknown, a setting is missing, or one has no counterpart here; it is named.
    """
    settings = Settings(config)
    return _family(settings).lm_config(settings)


def weight_map(config: Any) -> WeightMap:
    """The rules between their state dict and ours; arguments and errors as in :func:`lm_config`."""
    settings = Settings(config)
    return _family(settings).weights(settings)


def from_transformers(config: Any, state_dict: Mapping[str, Tensor]) -> LanguageModel:
    """The language model that computes what theirs does.

    Args:
        config: as in :func:`lm_config`.
        state_dict: that of their ``...ForCausalLM``; copies of tied tensors may be absent. The parameters become
            float32, whatever they are here.

    Raises:
        ValueError: as in :func:`lm_config`, or tensors are missing, left over (all are listed) or of another shape.
    """
    weights = weight_map(config).to_seqarch(state_dict)
    model = LanguageModel(lm_config(config))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the state dict to read has tensors of another shape: {error}") from error
    return model


def to_transformers(config: Any, model: LanguageModel) -> dict[str, Tensor]:
    """The state dict that gives their model of this configuration what ``model`` has learnt.

    Raises:
        ValueError: the model is not that of :func:`lm_config`, or has left what theirs can express; the tensors are
            named.
    """
    return weight_map(config).to_transformers(model.state_dict())


def _family(settings: Settings) -> ModuleType:
    if settings.model_type not in FAMILIES:
        raise unknown_name("model_type", settings.model_type, FAMILIES)
    return FAMILIES[settings.model_type]


__all__ = ["FAMILIES", "WeightMap", "from_transformers", "lm_config", "to_transformers", "weight_map"]
