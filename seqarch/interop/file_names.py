"""What the tensors of a family are called in files, where that is not their name in the state dict of ``transformers``.

Published files of a mixture of experts hold one tensor per expert, and some the parts of a tensor by themselves.
``transformers`` joins them as it loads a folder, and takes them apart again as it saves one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class FileRule:
    """Tensors that lie in files by another name, or in pieces.

    Attributes:
        name: of the tensor in the state dict, a regular expression for all of it.
        pieces: their names in files, as replacements of that expression. The tensor is the pieces one after another
            along the first dimension. Where the names have ``{}``, the number of an expert from 0, it has one more
            dimension before that, of the experts.
        written: whether files are written so too, or are only read.
    """

    name: str
    pieces: tuple[str, ...]
    written: bool = True

    def names(self, name: str) -> tuple[str, ...] | None:
        """The names in files of the pieces of a tensor; ``None`` where the rule is not about it."""
        found = re.fullmatch(self.name, name)
        return None if found is None else tuple(found.expand(piece) for piece in self.pieces)


def _experts(prefix: str, gate: str, up: str, down: str, module: str = "mlp") -> tuple[FileRule, ...]:
    """Rules of the fused experts of a ``module``, whose files have one tensor per expert below ``prefix``."""
    each = rf"\1.{prefix}.experts.{{}}"
    return (
        FileRule(rf"(.*)\.{module}\.experts\.gate_up_proj", (f"{each}.{gate}.weight", f"{each}.{up}.weight")),
        FileRule(rf"(.*)\.{module}\.experts\.down_proj", (f"{each}.{down}.weight",)),
    )


_EARLIER_EMBEDDING = (FileRule(r"backbone\.embeddings\.weight", ("backbone.embedding.weight",), written=False),)

_MIXTRAL = _experts("block_sparse_moe", "w1", "w3", "w2")

_QWEN_MOE = _experts("mlp", "gate_proj", "up_proj", "down_proj")

_GRANITE_MOE = (
    FileRule(r"(.*)\.experts\.gate_up_proj", (r"\1.input_linear.weight",)),
    FileRule(r"(.*)\.experts\.down_proj", (r"\1.output_linear.weight",)),
    FileRule(r"(.*)\.router\.weight", (r"\1.router.layer.weight",)),
)

_BESIDE_IMAGES = (FileRule(r"model\.(.*)", (r"model.language_model.\1",), written=False),)

FILE_RULES: dict[str, tuple[FileRule, ...]] = {
    "deepseek_v2": _QWEN_MOE,
    "deepseek_v3": _QWEN_MOE,
    "deepseek_v32": _QWEN_MOE,
    "glm_moe_dsa": _QWEN_MOE,
    "granitemoe": _GRANITE_MOE,
    "granitemoehybrid": _GRANITE_MOE,
    "jamba": _experts("feed_forward", "gate_proj", "up_proj", "down_proj", "feed_forward"),
    "kimi_linear": (
        *_MIXTRAL,
        FileRule(r"(.*)\.mlp\.(gate|shared_experts)\.(.*)", (r"\1.block_sparse_moe.\2.\3",)),
        FileRule(r"(.*)\.mlp\.((?:gate|up|down)_proj\.weight)", (r"\1.block_sparse_moe.\2",), written=False),
        FileRule(r"(.*)\.self_attn\.forget_gate\.(.*)", (r"\1.self_attn.\2",)),
        FileRule(
            r"(.*)\.self_attn\.conv1d\.weight",
            tuple(rf"\1.self_attn.{part}_conv1d.weight" for part in "qkv"),
        ),
    ),
    "lfm2_moe": _experts("feed_forward", "w1", "w3", "w2", "feed_forward"),
    "mamba": _EARLIER_EMBEDDING,
    "mamba2": _EARLIER_EMBEDDING,
    "minimax": (
        *_MIXTRAL,
        FileRule(r"(.*)\.mlp\.gate\.weight", (r"\1.block_sparse_moe.gate.weight",)),
    ),
    "mixtral": (
        *_MIXTRAL,
        FileRule(r"(.*)\.mlp\.gate\.weight", (r"\1.block_sparse_moe.gate.weight",)),
    ),
    "nemotron_h": (
        FileRule(r"model\.(.*)\.experts\.(up|down)_proj", (r"backbone.\1.experts.{}.\2_proj.weight",)),
        FileRule(r"model\.(.*)", (r"backbone.\1",)),
    ),
    "olmo_hybrid": (
        FileRule(r"(.*)\.input_layernorm\.weight", (r"\1.attention_layer_norm.weight",), written=False),
        FileRule(r"(.*)\.post_attention_layernorm\.weight", (r"\1.feedforward_layer_norm.weight",), written=False),
        FileRule(
            r"(.*)\.linear_attn\.conv1d\.weight",
            tuple(rf"\1.linear_attn.{part}_conv1d.weight" for part in "qkv"),
        ),
    ),
    "olmoe": _QWEN_MOE,
    "qwen2_moe": _QWEN_MOE,
    "qwen3_5_moe_text": (*_QWEN_MOE, *_BESIDE_IMAGES),
    "qwen3_5_text": _BESIDE_IMAGES,
    "qwen3_moe": _QWEN_MOE,
    "qwen3_next": _QWEN_MOE,
}
"""By family. Of several rules for a tensor the first whose pieces are there is read; files may also hold the tensor
itself, as the state dict does."""

_OF_FURTHER_TOKENS = r"model\.layers\.61\..*"

_OF_IMAGES = r"(mtp|model\.visual)\..*"

UNUSED = {
    "": r".*rotary_emb\.inv_freq",
    "deepseek_v3": _OF_FURTHER_TOKENS,
    "deepseek_v32": _OF_FURTHER_TOKENS,
    "glm_moe_dsa": r"model\.layers\.78\..*",
    "nemotron_h": r"mtp\..*",
    "qwen3_5_moe_text": _OF_IMAGES,
    "qwen3_5_text": _OF_IMAGES,
    "qwen3_next": r"mtp\..*",
}
"""Tensors of files that no model of the family has in ``transformers`` either; ``""`` is for all families."""


def is_unused(family: str, name: str) -> bool:
    """Whether files of the family may hold a tensor of this name that its models do without."""
    return any(re.fullmatch(UNUSED[key], name) is not None for key in ("", family) if key in UNUSED)


class Pieces(NamedTuple):
    """The names in files of what a tensor of the state dict is made of.

    Attributes:
        entries: the names of the pieces, one after another along the first dimension; of each expert, where
        stacked: they are stacked along a new one before that.
    """

    entries: list[tuple[str, ...]]
    stacked: bool


def pieces_there(family: str, name: str, there: Collection[str]) -> Pieces | None:
    """How a tensor of the state dict lies in files with tensors of the names ``there``; ``None`` where it does not."""
    if name in there:
        return Pieces([(name,)], stacked=False)
    for rule in FILE_RULES.get(family, ()):
        names = rule.names(name)
        if names is None:
            continue
        if "{}" not in names[0]:
            if all(piece in there for piece in names):
                return Pieces([names], stacked=False)
        elif entries := list(_experts_there(names, there)):
            return Pieces(entries, stacked=True)
    return None


def written_names(family: str, name: str) -> tuple[str, ...]:
    """The names under which a tensor of the state dict is written, with ``{}`` for the number of an expert."""
    found = (rule.names(name) for rule in FILE_RULES.get(family, ()) if rule.written)
    return next((names for names in found if names is not None), (name,))


def _experts_there(pieces: tuple[str, ...], there: Collection[str]) -> Iterator[tuple[str, ...]]:
    number = 0
    while all(names.format(number) in there for names in pieces):
        yield tuple(names.format(number) for names in pieces)
        number += 1
