"""Zamba 2: ``Zamba2ForCausalLM``, Mamba-2 and in some layers a block of attention before it, shared in turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from seqarch.interop import decoder, mamba2, parts
from seqarch.interop.parts import norm
from seqarch.interop.weights import Rule, WeightMap, concatenate, rule, under
from seqarch.models import LayerPattern, LMConfig
from seqarch.models.pattern import MOST

HYBRID = "zamba2"
KINDS = {"linear_attention": "mamba2", "mamba": "mamba2", "hybrid": HYBRID}
BLOCK = "shared_transformer."


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings):
    """Fields of ``Zamba2Config``; heads are as wide as twice the stream over their number, and how many layers there
    are follows from their kinds.
    """

    model_type = "zamba2"
    # without tied embeddings theirs does not tie its blocks either, and has adapters that nothing reads
    only: ClassVar = {
        **decoder.DecoderSettings.only,
        "add_bias_linear": False,
        "tie_word_embeddings": True,
        "use_long_context": False,
    }
    aliases: ClassVar = {"layer_types": "layers_block_type"}
    options: ClassVar = {
        "mamba2": {
            "d_state": "mamba_d_state",
            "n_groups": "mamba_ngroups",
            "conv_width": "mamba_d_conv",
            "dt_limit_min": "time_step_min",
        }
    }
    layer_kinds: ClassVar = {"layers_block_type": KINDS}
    unread: ClassVar = ("head_dim", "original_max_position_embeddings")
    in_files_only = (*decoder.DecoderSettings.in_files_only, "num_hidden_layers")
    may_be_zero = ("time_step_min",)

    hidden_size: int = 2560
    num_hidden_layers: int = 1
    layers_block_type: list[str] | None = None
    hybrid_layer_ids: list[int] | None = None
    mamba_d_state: int = 64
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_ngroups: int = 1
    time_step_min: float = 0.001
    n_mamba_heads: int = 8
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    num_mem_blocks: int = 1
    use_shared_attention_adapter: bool = False
    adapter_rank: int = 128
    use_mem_rope: bool = False
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = True

    @property
    def head_width(self) -> int:
        return 2 * self.hidden_size // self.num_attention_heads

    def kinds(self) -> list[str]:
        """Our mixer of each layer."""
        each = ["linear_attention"]
        usual = each + (5 * each + ["hybrid"]) * 7 + 4 * each + ["hybrid"] + 3 * each + ["hybrid"] + 2 * each
        entries = usual if self.layers_block_type is None else self.layers_block_type
        if len(entries) > MOST:
            raise self.refuse("layers_block_type", f"at most {MOST} layers")
        kinds = self.chosen("layers_block_type", KINDS, entries)
        places = [i for i, kind in enumerate(kinds) if kind == HYBRID]
        if self.hybrid_layer_ids not in (None, places):
            raise self.refuse("hybrid_layer_ids", f"{places}, the hybrid layers of layers_block_type")
        return kinds

    def hybrids(self) -> Iterator[tuple[int, int, int]]:
        """Of each hybrid layer: its number among them, its place, and that of the first with the same block."""
        places = [i for i, kind in enumerate(self.kinds()) if kind == HYBRID]
        return ((number, i, places[number % self.num_mem_blocks]) for number, i in enumerate(places))


def lm_config(settings: Settings) -> LMConfig:
    inner = settings.mamba_expand * settings.hidden_size
    ssm = {
        **settings.options_of("mamba2"),
        "head_dim": inner // settings.n_mamba_heads,
        "d_inner": inner,
        "norm_eps": 1e-5,  # whatever rms_norm_eps
    }
    heads = settings.attention() if settings.use_mem_rope else {**settings.heads(), "position": "none"}
    block = {
        "with_input": True,
        "attention": {**heads, "scale": (settings.head_width / 2) ** -0.5},
        "mamba2": ssm,
        "hidden": _hidden(settings),
        "activation": {"activation": "silu", **settings.activation()}["activation"],
        "norm_eps": settings.rms_norm_eps,
    }
    adapted = [*(["attention.qkv_proj"] if settings.use_shared_attention_adapter else []), "channel.in_proj"]
    layers: list[str | LayerPattern] = [f"{kind}/none" for kind in settings.kinds()]
    for _, place, first in settings.hybrids():
        own = {"share": f"block_{first}", "adapter_rank": settings.adapter_rank, "adapted": adapted}
        layers[place] = LayerPattern((HYBRID,), "none", (own,))
    mixers = {name: options for name, options in (("mamba2", ssm), (HYBRID, block)) if name in settings.kinds()}
    return parts.lm_config(
        settings,
        layers,
        mixers,
        norm_eps=settings.rms_norm_eps,
        norm_placements={HYBRID: "none"} if HYBRID in mixers else {},
    )


def _hidden(settings: Settings) -> int:
    return settings.intermediate_size or 4 * settings.hidden_size


def _block(settings: Settings, options: dict[str, Any]) -> list[Rule]:
    """What is shared, of theirs and within a mixer of ours."""
    inner = "inner." if settings.use_shared_attention_adapter else ""
    heads = [f"self_attn.{part}_proj.weight" for part in "qkv"]
    return [
        norm("input_layernorm.weight", "attention_norm.weight"),
        rule(heads, f"attention.qkv_proj.linear.{inner}weight", concatenate(*parts.head_sizes(options))),
        rule("self_attn.o_proj.weight", "attention.out_proj.weight"),
        norm("pre_ff_layernorm.weight", "channel_norm.weight"),
        rule("feed_forward.gate_up_proj.weight", "channel.in_proj.inner.weight"),
        rule("feed_forward.down_proj.weight", "channel.out_proj.weight"),
    ]


def _adapters(settings: Settings, number: int) -> list[Rule]:
    """Those of a hybrid layer, which theirs keeps in the block under the layer's number."""
    rules = []
    names = {"feed_forward.gate_up_proj_adapter_list": ("channel.in_proj", 0)}
    if settings.use_shared_attention_adapter:
        for i, part in enumerate("qkv"):
            names[f"self_attn.linear_{part}_adapter_list"] = ("attention.qkv_proj.linear", i)
    for theirs, (ours, i) in names.items():
        rules += [
            rule(f"{theirs}.{number}.{at}.weight", f"{ours}.{way}.{i}.weight") for at, way in ((0, "down"), (1, "up"))
        ]
    return rules


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    rules = [
        rule("model.embed_tokens.weight", "embedding.weight"),
        norm("model.final_layernorm.weight"),
        rule("lm_head.weight", "head.weight"),
    ]
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_embeddings else {}
    own = [norm("input_layernorm.weight"), *under("mamba.", "mixers.0.", mamba2.mixer())]
    hybrid = [
        rule("linear.weight", "mixers.0.after.weight"),
        norm("mamba_decoder.input_layernorm.weight", "mixers.0.mamba2_norm.weight"),
        *under("mamba_decoder.mamba.", "mixers.0.mamba2.", mamba2.mixer()),
    ]
    for i, kind in enumerate(settings.kinds()):
        rules += under(f"model.layers.{i}.", f"stack.layers.{i}.", own if kind == "mamba2" else hybrid)
    blocks: dict[int, list[Rule]] = {}
    later = []
    for number, place, first in settings.hybrids():
        adapters = _adapters(settings, number)
        rules += under(f"model.layers.{first}.{BLOCK}", f"stack.layers.{place}.mixers.0.", adapters)
        if place == first:
            shared = _block(settings, config.mixers[HYBRID]["attention"])
            rules += under(f"model.layers.{first}.{BLOCK}", f"stack.layers.{first}.mixers.0.", shared)
            blocks[first] = [*shared]
        else:
            later.append((place, first))
        blocks[first] += adapters
    for place, first in later:
        names = (name for each in blocks[first] for name in each.theirs)
        tied |= {f"model.layers.{place}.{BLOCK}{name}": f"model.layers.{first}.{BLOCK}{name}" for name in names}
    return WeightMap(rules, tied)
