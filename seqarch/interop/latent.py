"""What DeepSeek's families share: latent attention, and a mixture of experts in all but the first layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from seqarch.interop import decoder, parts
from seqarch.interop.parts import experts, gated_mlp
from seqarch.interop.weights import Rule, WeightMap, reorder, rule, under
from seqarch.models import LayerPattern, LMConfig


@dataclass(frozen=True, kw_only=True)
class LatentSettings(decoder.DecoderSettings):
    """The fields that these families have.

    Class attributes:
        mixer: our name of their attention.
    """

    mixer: ClassVar[str] = "mla"

    only: ClassVar[Mapping[str, Any]] = {"attention_dropout": 0.0, "attention_bias": False}
    unread: ClassVar[tuple[str, ...]] = ("head_dim", "num_key_value_heads")
    may_be_zero: ClassVar[tuple[str, ...]] = ("first_k_dense_replace",)
    options: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "mla": {
            "num_heads": "num_attention_heads",
            "qk_nope_head_dim": "qk_nope_head_dim",
            "v_head_dim": "v_head_dim",
            "qk_rope_head_dim": "qk_rope_head_dim",
            "kv_lora_rank": "kv_lora_rank",
            "q_lora_rank": "q_lora_rank",
        },
        "moe": {
            "num_experts": "n_routed_experts",
            "top_k": "num_experts_per_tok",
            "hidden": "moe_intermediate_size",
            "weight_scale": "routed_scaling_factor",
            "shared_experts": "n_shared_experts",
        },
    }

    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    first_k_dense_replace: int = 0
    n_routed_experts: int = 64
    n_shared_experts: int = 1
    moe_intermediate_size: int = 1407
    routed_scaling_factor: float = 1.0
    num_experts_per_tok: int = 8

    def latent(self) -> dict[str, Any]:
        """Options of the attention."""
        if self.qk_rope_head_dim % 2:
            raise self.refuse("qk_rope_head_dim", "an even number of channels that turn")
        rotary = self.rotary(self.qk_rope_head_dim)
        rotary.pop("rotary_fraction")
        return {**self.options_of(self.mixer), "norm_eps": 1e-6, **rotary}  # whatever rms_norm_eps

    def channels(self) -> list[str]:
        """The channel mixer of each layer."""
        return ["swiglu" if i < self.first_k_dense_replace else "moe" for i in range(self.num_hidden_layers)]

    def own_options(self) -> list[dict[str, Any]]:
        """Of each layer the options of its attention alone."""
        return [{}] * self.num_hidden_layers

    def experts(self, **others: Any) -> dict[str, Any]:
        """Options of a ``moe``."""
        return {**self.options_of("moe"), **self.activation(), **others}

    def groups(self, n_group: int, topk_group: int) -> dict[str, int]:
        """Options of a router of groups.

        Raises:
            ValueError: groups are not of one size, or those of a token have too few experts.
        """
        size, rest = divmod(self.n_routed_experts, n_group)
        if rest or topk_group > n_group or self.num_experts_per_tok > topk_group * size:
            raise self.refuse(
                "topk_group",
                f"at most n_group ({n_group}), which divides n_routed_experts ({self.n_routed_experts}), and groups"
                f" enough for num_experts_per_tok ({self.num_experts_per_tok})",
            )
        return {"num_groups": n_group, "top_groups": topk_group}


def lm_config(settings: LatentSettings, moe: dict[str, Any]) -> LMConfig:
    """Our configuration, with these options of a ``moe``."""
    channels = {"swiglu": settings.gated_mlp(), "moe": moe}
    each = settings.channels()
    return parts.lm_config(
        settings,
        [
            LayerPattern((settings.mixer,), channel, (own,))
            for channel, own in zip(each, settings.own_options(), strict=True)
        ],
        {settings.mixer: settings.latent()},
        {name: channels[name] for name in channels if name in each},
    )


def attention(options: Mapping[str, Any], pairs: bool) -> list[Rule]:
    """``q_proj`` or ``q_a_proj`` and ``q_b_proj``, ``kv_a_proj_with_mqa``, ``kv_b_proj`` and ``o_proj`` as an ``mla``.

    Args:
        pairs: whether neighbouring channels turn together in theirs.
    """
    own, turning, heads = options["qk_nope_head_dim"], options["qk_rope_head_dim"], options["num_heads"]
    apart = [*range(0, turning, 2), *range(1, turning, 2)] if pairs else list(range(turning))
    head = [*range(own), *(own + i for i in apart)]
    queries = [reorder([h * len(head) + i for h in range(heads) for i in head])] if pairs else []
    rank = options["kv_lora_rank"]
    keys = [reorder([*range(rank), *(rank + i for i in apart)])] if pairs else []
    rules = [
        rule("kv_a_proj_with_mqa.weight", "compress.weight", *keys),
        rule("kv_a_layernorm.weight", "norm.weight"),
        rule("kv_b_proj.weight", "expand.weight"),
        rule("o_proj.weight", "out_proj.weight"),
    ]
    if options["q_lora_rank"] is None:
        return [rule("q_proj.weight", "query.weight", *queries), *rules]
    low = [rule("q_a_proj.weight", "query.0.weight"), rule("q_a_layernorm.weight", "query.1.weight")]
    return [*low, rule("q_b_proj.weight", "query.2.weight", *queries), *rules]


def weights(config: LMConfig, mixer: parts.Table) -> WeightMap:
    """The rules of such a model, with those of its one kind of attention."""
    tables: dict[str, parts.Table] = {
        name: lambda own: under("self_attn.", "mixers.0.", parts.rules_of(mixer, own)) for name in config.mixers
    }
    if "moe" in config.channels:
        moe = config.channels["moe"]
        bias = (
            [rule("mlp.gate.e_score_correction_bias", "channel.router.expert_bias")] if moe.get("expert_bias") else []
        )
        shared = gated_mlp(moe["hidden"] * moe["shared_experts"], "mlp.shared_experts.", "channel.shared.")
        tables["moe"] = [*experts(moe["hidden"]), *bias, *shared]
    return parts.decoder(config, tables)
