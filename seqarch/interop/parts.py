"""Rules that several families share, under the names that most of them use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from seqarch.interop.settings import BaseSettings, pattern_of
from seqarch.interop.weights import (
    Rule,
    WeightMap,
    concatenate,
    pairs_to_halves,
    rule,
    split,
    squeeze,
    transpose,
    under,
)
from seqarch.models import LayerPattern, LMConfig, tile_pattern

Table = list[Rule] | Callable[[Mapping[str, Any]], list[Rule]]
"""Rules of a mixer or channel mixer; or what gives them, of the options that a layer's occurrence of it has."""


def rules_of(table: Table, own: Mapping[str, Any]) -> list[Rule]:
    """The rules for an occurrence with these options of its own."""
    return table(own) if callable(table) else table


def norm(theirs: str, ours: str = "norm.weight") -> Rule:
    """An RMS norm's weights."""
    return rule(theirs, ours)


def short_convolution(theirs: str, ours: str, bias: bool) -> list[Rule]:
    """A depthwise ``nn.Conv1d``, whose weight is ``[D, 1, W]``."""
    rules = [rule(f"{theirs}.weight", f"{ours}.weight", squeeze(1))]
    return [*rules, rule(f"{theirs}.bias", f"{ours}.bias")] if bias else rules


def gated_mlp(hidden: int, theirs: str = "mlp.", ours: str = "channel.", bias: bool = False) -> list[Rule]:
    """``gate_proj``, ``up_proj`` and ``down_proj`` as a ``swiglu``."""
    kinds = ("weight", "bias") if bias else ("weight",)
    join = concatenate(hidden, hidden)
    rules = [rule([f"{theirs}gate_proj.{k}", f"{theirs}up_proj.{k}"], f"{ours}in_proj.{k}", join) for k in kinds]
    return [*rules, *(rule(f"{theirs}down_proj.{kind}", f"{ours}out_proj.{kind}") for kind in kinds)]


def check_top_k(settings: BaseSettings, name: str, normalised: bool) -> None:
    """Refuse a router that chooses one expert and weighs it 1, whose weights no gradient reaches."""
    if normalised and getattr(settings, name) == 1:
        raise settings.refuse(
            name, "at least 2: normalised, the weight of a single expert is 1 and its router learns nothing"
        )


def experts(hidden: int, theirs: str = "mlp.", router: str = "gate") -> list[Rule]:
    """A router and fused experts as a ``moe``."""
    return [
        rule(f"{theirs}{router}.weight", "channel.router.weight"),
        rule(
            f"{theirs}experts.gate_up_proj",
            ("channel.w_gate", "channel.w_in"),
            *(transpose(1, 2), split(hidden, hidden, dim=2)),
        ),
        rule(f"{theirs}experts.down_proj", "channel.w_out", transpose(1, 2)),
    ]


def head_sizes(options: Mapping[str, Any]) -> tuple[int, int, int]:
    """Rows of the projections to queries, keys and values in an ``attention`` with these options."""
    width = options["head_dim"]
    return options["num_heads"] * width, options["num_kv_heads"] * width, options["num_kv_heads"] * width


def attention(options: Mapping[str, Any], joined: str | None = None, pairs: bool = False) -> list[Rule]:
    """``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj`` as an ``attention`` with these options, with ``q_norm`` and
    ``k_norm`` where it has norms.

    Args:
        joined: the name of the one projection that they are in theirs too, if they are.
        pairs: whether neighbouring channels turn together in theirs, where the projections are apart.
    """
    kinds = ["weight", "bias"] if options.get("qkv_bias") else ["weight"]
    turned = [pairs_to_halves(options["head_dim"], 2)] if pairs else []
    if joined is not None:
        rules = [rule(f"{joined}.{kind}", f"qkv_proj.linear.{kind}") for kind in kinds]
    else:
        steps = *turned, concatenate(*head_sizes(options))
        rules = [rule([f"{part}_proj.{kind}" for part in "qkv"], f"qkv_proj.linear.{kind}", *steps) for kind in kinds]
    if options.get("qk_norm"):
        rules += [norm("q_norm.weight", "query_norm.weight"), norm("k_norm.weight", "key_norm.weight")]
    rules.append(rule("o_proj.weight", "out_proj.weight"))
    return [*rules, rule("o_proj.bias", "out_proj.bias")] if options.get("output_bias") else rules


def lm_config(
    settings: BaseSettings,
    layers: Sequence[str | LayerPattern],
    mixers: dict[str, dict[str, Any]],
    channels: dict[str, dict[str, Any]] | None = None,
    **others: Any,
) -> LMConfig:
    """Our configuration of these layers, each a pattern, and of the settings that all families share."""
    return LMConfig(
        pattern=pattern_of(layers),
        depth=len(layers),
        mixers=mixers,
        channels=channels or {},
        **{**settings.options_of("model"), **others},
    )


def model(
    config: LMConfig,
    layers: Sequence[list[Rule]],
    embedding: str,
    last_norm: Rule | Sequence[Rule],
    prefix: str = "model.layers",
) -> WeightMap:
    """A language model of these layers, whose rules name what is inside one of theirs and one of ours."""
    last = [last_norm] if isinstance(last_norm, Rule) else last_norm
    rules = [rule(embedding, "embedding.weight"), *last, rule("lm_head.weight", "head.weight")]
    for i, layer in enumerate(layers):
        rules += under(f"{prefix}.{i}.", f"stack.layers.{i}.", layer)
    return WeightMap(rules, {"lm_head.weight": embedding} if config.tie_embeddings else {})


NORMS: dict[str, dict[str, str]] = {
    "pre": {"norm": "input_layernorm", "channel_norm": "post_attention_layernorm"},
    "post": {"post_norms.0": "post_attention_layernorm", "channel_post_norm": "post_feedforward_layernorm"},
    "both": {
        "norm": "input_layernorm",
        "post_norms.0": "post_attention_layernorm",
        "channel_norm": "pre_feedforward_layernorm",
        "channel_post_norm": "post_feedforward_layernorm",
    },
}
"""Of each placement of a layer's norms, their usual names by ours."""


def norms_of(kind: str, names: Mapping[str, str]) -> list[Rule]:
    """Rules of norms of a kind that ``LMConfig.norm`` may be, whose names in theirs are given by ours."""
    kinds = {"rms": ["weight"], "layer": ["weight", "bias"], "layer_without_bias": ["weight"]}.get(kind, [])
    return [rule(f"{theirs}.{each}", f"{ours}.{each}") for ours, theirs in names.items() for each in kinds]


def decoder(
    config: LMConfig,
    tables: Mapping[str, Table] | None = None,
    norms: Mapping[str, str] | None = None,
    embedding: str = "model.embed_tokens.weight",
    last_norm: str = "model.norm",
) -> WeightMap:
    """A language model whose layers have one mixer and one channel mixer each, in the manner of Llama.

    Args:
        tables: rules of a layer's mixer or channel mixer by our name for it. Those of ``attention``,
            ``sliding_window``, ``swiglu`` and ``moe`` follow from the config where they are not given.
        norms: names of a layer's norms by ours; by default :data:`NORMS` has them.
    """
    rules: dict[str, Table] = {**_usual_tables(config), **(tables or {})}
    layers = [
        [
            *norms_of(config.norm, NORMS[_placement(config, layer)] if norms is None else norms),
            *(each for name, own in _occurrences(config, layer) for each in rules_of(rules[name], own)),
        ]
        for layer in tile_pattern(config.pattern, config.depth)
    ]
    return model(config, layers, embedding, norms_of(config.norm, {"norm": last_norm}))


def _occurrences(config: LMConfig, layer: LayerPattern) -> list[tuple[str, Mapping[str, Any]]]:
    """The mixers of a layer and its channel mixer, by name, with the options that they have there alone."""
    return [*zip(layer.mixers, layer.options, strict=True), (config.channel_of(layer), layer.channel_options)]


def _placement(config: LMConfig, layer: LayerPattern) -> str:
    """Where the norms of a layer are, by its mixer or as everywhere."""
    own = (config.norm_placements[name] for name in layer.mixers if name in config.norm_placements)
    return next(own, config.norm_placement)


def _usual_tables(config: LMConfig) -> dict[str, list[Rule]]:
    """Of the mixers and channel mixers that the config has options of."""
    names = [name for name in ("attention", "sliding_window") if name in config.mixers]
    tables = {name: under("self_attn.", "mixers.0.", attention(config.mixers[name])) for name in names}
    if "swiglu" in config.channels:
        options = config.channels["swiglu"]
        tables["swiglu"] = gated_mlp(options["hidden"], bias=options.get("bias", False))
    if "mlp" in config.channels:
        kinds = ["weight", "bias"] if config.channels["mlp"].get("bias") else ["weight"]
        names = {"c_fc": "in_proj", "c_proj": "out_proj"}
        tables["mlp"] = [rule(f"mlp.{a}.{each}", f"channel.{b}.{each}") for a, b in names.items() for each in kinds]
    if "moe" in config.channels:
        tables["moe"] = experts(config.channels["moe"]["hidden"])
    return tables
