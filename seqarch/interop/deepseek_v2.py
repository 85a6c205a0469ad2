"""DeepSeek-V2: ``DeepseekV2ForCausalLM``, latent attention and experts, in groups or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqarch.interop import latent
from seqarch.interop.weights import WeightMap
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(latent.LatentSettings):
    """Fields of ``DeepseekV2Config``."""

    model_type = "deepseek_v2"
    only: ClassVar = {**latent.LatentSettings.only, "mlp_bias": False}
    aliases: ClassVar = {"num_experts": "n_routed_experts"}

    vocab_size: int = 102400
    n_shared_experts: int = 2
    n_group: int | None = None
    topk_group: int | None = None
    topk_method: str = "greedy"


def lm_config(settings: Settings) -> LMConfig:
    moe = {}
    if "moe" in settings.channels():
        moe = settings.experts(normalise_weights=False, **_groups(settings))
    return latent.lm_config(settings, moe)


def _groups(settings: Settings) -> dict[str, int | str]:
    methods = {"greedy": "greedy", "group_limited_greedy": "group_limited_greedy"}
    if settings.chosen("topk_method", methods, [settings.topk_method]) == ["greedy"]:
        return {}
    if settings.n_group is None or settings.topk_group is None:
        name = "n_group" if settings.n_group is None else "topk_group"
        raise settings.refuse(name, "a number, as topk_method is 'group_limited_greedy'")
    return {**settings.groups(settings.n_group, settings.topk_group), "group_score": "max"}


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    return latent.weights(config, latent.attention(config.mixers["mla"], pairs=True))
