"""Qwen3.5 with experts on text: ``Qwen3_5MoeForCausalLM``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqarch.interop import parts, qwen3_5_text, qwen3_next
from seqarch.interop.parts import experts, gated_mlp
from seqarch.interop.weights import WeightMap, rule
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(qwen3_next.MixerSettings):
    """Fields of ``Qwen3_5MoeTextConfig``."""

    model_type = "qwen3_5_moe_text"
    options: ClassVar = {
        "moe": {
            "num_experts": "num_experts",
            "top_k": "num_experts_per_tok",
            "hidden": "moe_intermediate_size",
            "shared_hidden": "shared_expert_intermediate_size",
        }
    }

    vocab_size: int = 248320
    hidden_size: int = 2048
    num_hidden_layers: int = 40
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    num_experts: int = 256
    num_experts_per_tok: int = 8


def lm_config(settings: Settings) -> LMConfig:
    parts.check_top_k(settings, "num_experts_per_tok", normalised=True)
    moe = {**settings.options_of("moe"), "shared_experts": 1, "shared_gate": True}
    return qwen3_5_text.model_of(settings, {"moe": moe})


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    channel = [
        *experts(settings.moe_intermediate_size),
        *gated_mlp(settings.shared_expert_intermediate_size, "mlp.shared_expert.", "channel.shared."),
        rule("mlp.shared_expert_gate.weight", "channel.shared_gate.weight"),
    ]
    return parts.decoder(config, {**qwen3_5_text.tables(config), "moe": channel})
