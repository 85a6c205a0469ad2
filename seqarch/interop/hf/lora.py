"""Which linear maps and matrices of a model the low-rank adapters of ``peft`` change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from seqarch.models import LanguageModel, tile_pattern


class Projection(NamedTuple):
    """A linear map of a mixer or channel mixer.

    Attributes:
        layer: the name of the mixer or channel mixer.
        path: from the language model.
        own: from the mixer or channel mixer.
        is_module: whether it is an ``nn.Linear``, and not a tensor of another module.
    """

    layer: str
    path: str
    own: str
    is_module: bool


def lora_targets(model: nn.Module, *names: str) -> dict[str, list[str]]:
    """The projections of a model's mixers and channel mixers, as options of ``peft.LoraConfig``.

    ``LoraConfig(r=8, **lora_targets(model))`` adapts all of them: ``target_modules`` are the linear maps,
    ``target_parameters`` the stacked or shared matrices that are none: of experts, of gates in blocks, of what
    compresses blocks of keys. Embedding, head, norms, convolutions, routers and indexers without a loss stay as they
    are.

    Args:
        model: a :class:`seqarch.LanguageModel`, or what has one inside.
        names: of mixers and channel mixers (``"mamba2"``, ``"moe"``), to adapt those alone, and of projections
            (``"out_proj"``, ``"qkv_proj"``), to adapt only these.

    Raises:
        ValueError: there is no such model, it has adapters already, or a name matches nothing in it; what would is
            listed.
    """
    found = [(path, inner) for path, inner in model.named_modules() if isinstance(inner, LanguageModel)]
    if not found:
        raise ValueError(f"lora_targets: {type(model).__name__} has no LanguageModel inside")
    path, inner = found[0]
    if adapted(inner):
        raise ValueError("lora_targets: the model has adapters already; ask before get_peft_model is called")
    there = list(_projections(inner))
    layers, parts = {each.layer for each in there}, {part for each in there for part in _parts(each.own)}
    for name in names:
        if name not in layers | parts:
            kinds = sorted({_plain(each.own) for each in there})
            raise ValueError(
                f"lora_targets: {name!r} matches nothing in the model; expected one of its layers,"
                f" {', '.join(sorted(layers))}, or of their projections, {', '.join(kinds)}"
            )
    wanted_layers, wanted_parts = layers & set(names) or layers, parts & set(names) or parts
    chosen = [each for each in there if each.layer in wanted_layers and _parts(each.own) & wanted_parts]
    if not chosen:
        asked = ", ".join(sorted(wanted_parts))
        raise ValueError(f"lora_targets: no layer {' or '.join(sorted(wanted_layers))} has a projection {asked}")
    full = [(f"{path}.{each.path}" if path else each.path, each.is_module) for each in chosen]
    return {
        "target_modules": [name for name, is_module in full if is_module],
        "target_parameters": [name for name, is_module in full if not is_module],
    }


def _projections(model: LanguageModel) -> Iterator[Projection]:
    patterns = tile_pattern(model.config.pattern, model.config.depth)
    for i, (layer, pattern) in enumerate(zip(model.stack.layers, patterns, strict=True)):
        for j, name in enumerate(pattern.mixers):
            yield from _of(name, layer.mixers[j], f"stack.layers.{i}.mixers.{j}")  # type: ignore[index, union-attr]
        if layer.channel is not None:
            yield from _of(pattern.channel or model.config.channel, layer.channel, f"stack.layers.{i}.channel")  # type: ignore[arg-type]


def _of(layer: str, module: nn.Module, path: str) -> Iterator[Projection]:
    """Linear maps that learn, and the matrices that a module names in ``projections``."""
    fixed = getattr(module, "without_gradient", ())
    for own, inner in module.named_modules():
        if isinstance(inner, nn.Linear) and own not in fixed:
            yield Projection(layer, f"{path}.{own}", own, True)
        for tensor in getattr(inner, "projections", ()):
            if getattr(inner, tensor) is not None:
                name = f"{own}.{tensor}" if own else tensor
                yield Projection(layer, f"{path}.{name}", name, False)


def _parts(own: str) -> set[str]:
    """The names by which a projection may be asked for: its whole path in its layer, and each part of it."""
    return {own, *own.split(".")}


def _plain(own: str) -> str:
    """The first name on the path: of a projection or of what it is part of."""
    return own.split(".")[0]


def merge(model: Any) -> Any:
    """The model inside a ``peft`` model, with all adapters merged into its weights.

    ``merge_and_unload`` of peft 0.21 leaves adapters alone that lie inside a module whose own tensors have some, as
    those of shared experts beside experts: it is called until none is left.

    Raises:
        ValueError: the model is none of ``peft``'s.
    """
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(f"merge: {type(model).__name__} has no adapters, expected what peft.get_peft_model returned")
    inner, before = model.merge_and_unload(), -1
    while (left := sum(".lora_" in name for name, _ in inner.named_parameters())) not in (0, before):
        inner, before = model.merge_and_unload(), left
    if left:
        raise ValueError(f"merge: {left} tensors of adapters are left that peft does not merge")
    return inner


def adapted(model: nn.Module) -> bool:
    """Whether a model has low-rank adapters inside."""
    return any(".lora_" in name for name, _ in model.named_parameters())
