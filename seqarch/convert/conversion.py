"""Another stack or language model of a trained one, whose layers have other mixers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from seqarch.convert.copying import copy_mixer
from seqarch.convert.planning import check_alike, make_plan
from seqarch.convert.report import ConversionReport, ConvertedMixer
from seqarch.layers import Mixer
from seqarch.layers.mixer import first_tensor
from seqarch.models import LanguageModel, LayerPattern, Stack, tile_pattern
from seqarch.models.stack_layer import StackLayer
from seqarch.ops.dispatch.checks import show

M = TypeVar("M", LanguageModel, Stack)


def convert(
    model: M, pattern: str, *, keep_layers: Iterable[int] = (), partial: bool = False
) -> tuple[M, ConversionReport]:
    """A model with the mixers of a pattern, and with all that it can take of another one's weights.

    Channel mixers, norms, embeddings and head are copied as they are, and so are layers for which the pattern names
    the mixers that are there. Elsewhere queries, keys, values and what reads the heads go to where the new mixer has
    them (:meth:`seqarch.layers.Mixer.head_maps`; of Mamba-2 C, B, x and the output, as in Wang et al. 2024, "The Mamba
    in the Llama", section 3.1), heads that several share repeated. Its numbers and widths of heads follow from the old
    mixer's where the pattern does not say them, as in ``"gated_delta_net(key_width=32)"``. A bias or a short
    convolution that the old mixer does not have begins without effect; gates, decays and feature maps as in any new
    mixer, drawn from torch's generator.

    Args:
        model: a :class:`seqarch.LanguageModel` or a :class:`seqarch.Stack`, which stays as it is.
        pattern: of mixers alone, tiled over the depth; one layer may have several side by side, which all take from the
            one that was there.
        keep_layers: numbers of further layers that are copied whole.
        partial: have mixers begin anew with what they cannot take, which the report lists, instead of an error.

    Returns:
        The new model, in the dtypes, on the device and in the mode of the old one, and what was copied.

    Raises:
        ValueError: the pattern does not fit the depth, or names more than mixers; a mixer cannot take a projection,
            which is named; mixers are bound to other layers; or the model is not as its config describes it (adapters,
            weights of few bits).
    """
    mixers = [layer.mixers for layer in layers_of(model)]
    plan = make_plan(model.config, mixers, pattern, keep_layers)  # type: ignore[arg-type]
    like = first_tensor(model)
    made = type(model)(plan.config).to(like.device, like.dtype)
    dtypes = {name: tensor.dtype for name, tensor in _tensors(model)}
    for name, tensor in _tensors(made):
        if dtypes.get(name, tensor.dtype) != tensor.dtype:
            tensor.data = tensor.data.to(dtypes[name])
    report = carry_over(model, made, partial=partial)
    if isinstance(made, LanguageModel) and isinstance(model, LanguageModel):
        made.tokenizer = model.tokenizer
    return made.train(model.training), report


def carry_over(source: M, target: M, *, partial: bool = False) -> ConversionReport:
    """Copy into a model all that it can take of another one's weights, as :func:`convert` does.

    Both have the same width, depth, vocabulary and all else but mixers. A layer whose mixers are the same, with the
    same options, is copied whole.

    Raises:
        ValueError: the models differ in more than mixers, or as of :func:`convert`.
    """
    check_alike(source.config, target.config)
    before, after = ((layers_of(model), _patterns(model)) for model in (source, target))
    changed = changed_layers(source, target)
    mixers: list[ConvertedMixer] = []
    for i in changed:
        olds, news = (layers[i].mixers for layers, _ in (before, after))
        names, count = after[1][i].mixers, len(olds)  # type: ignore[arg-type]
        if count not in (1, len(names)):
            raise ValueError(f"convert: layer {i} has {count} mixers side by side, expected {len(names)}, or one")
        for j, (name, new) in enumerate(zip(names, news, strict=True)):  # type: ignore[arg-type]
            at = min(j, count - 1)
            mixers.append(_copied(i, (before[1][i].mixers[at], name), olds[at], new))  # type: ignore[index]
    if not partial:
        _refuse(mixers)
    new = _copy_rest(source, target, changed)
    kept = [i for i in range(len(after[1])) if i not in changed]
    return ConversionReport(tuple(kept), tuple(mixers), tuple(new))


def _copied(layer: int, names: tuple[str, str], source: Mixer, target: Mixer) -> ConvertedMixer:
    try:
        return copy_mixer(layer, names, source, target)
    except ValueError as error:
        raise ValueError(f"convert: layer {layer}: {names[0]}: {error}") from error


def _refuse(mixers: Sequence[ConvertedMixer]) -> None:
    """Raise where a mixer does not take a projection, with all that do not."""
    said: dict[str, list[int]] = {}
    for each in mixers:
        roles = {role: why for role, why in each.refused.items() if len(role) == 1}
        if roles:
            reasons = ", ".join(f"{role} ({why})" for role, why in roles.items())
            said.setdefault(f"{each.target} cannot take {reasons} of {each.source}", []).append(each.layer)
        elif not each.copied:
            none = f"{each.target} and {each.source} have no projection in common"
            said.setdefault(none, []).append(each.layer)
    if said:
        shown = "; ".join(f"layer {', '.join(map(str, layers))}: {what}" for what, layers in said.items())
        raise ValueError(f"convert: {shown}. Choose another mixer or other sizes, or begin these anew by partial=True")


def _copy_rest(source: M, target: M, changed: Sequence[int]) -> list[str]:
    """Copy all but the mixers of some layers; names of what the source does not have.

    Raises:
        ValueError: the source has tensors that its config does not describe.
    """
    prefix = "stack." if isinstance(target, LanguageModel) else ""
    replaced = tuple(f"{prefix}layers.{i}.mixers." for i in changed)
    theirs, own = source.state_dict(), target.state_dict()
    wanted = [name for name in own if not name.startswith(replaced)]
    unknown = [name for name in theirs if name not in own and not name.startswith(replaced)]
    if odd := [name for name in unknown if not name.endswith(".branch_weights")]:
        raise ValueError(
            f"convert: the model has {odd[0]}, which its config does not describe: expected one without adapters, and"
            " without weights of few bits (seqarch.dequantize)"
        )
    fitting = {name: theirs[name] for name in wanted if name in theirs and theirs[name].shape == own[name].shape}
    new = [name for name in wanted if name not in fitting]
    if odd := [name for name in new if not name.endswith(".branch_weights")]:
        raise ValueError(f"convert: the model has no {odd[0]} of shape {list(own[odd[0]].shape)}")
    target.load_state_dict(fitting, strict=False)
    return new


def changed_layers(one: LanguageModel | Stack, other: LanguageModel | Stack) -> list[int]:
    """Numbers of the layers in which two models have different mixers."""
    pairs = zip(layers_of(one), layers_of(other), strict=True)
    return [i for i, layers in enumerate(pairs) if not _have_the_same_mixers(*layers)]


def _have_the_same_mixers(one: StackLayer, other: StackLayer) -> bool:
    alike = [type(a) is type(b) and a.config == b.config for a, b in zip(one.mixers, other.mixers, strict=False)]  # type: ignore[arg-type]
    return len(one.mixers) == len(other.mixers) and all(alike)


def stack_of(model: Any) -> Stack:
    """The stack of a model."""
    if isinstance(model, LanguageModel):
        return model.stack
    if not isinstance(model, Stack):
        raise ValueError(f"convert: got {show(model)}, expected a LanguageModel or a Stack")
    return model


def layers_of(model: LanguageModel | Stack) -> list[StackLayer]:
    """The layers of a stack, or of a language model's."""
    return [layer for layer in stack_of(model).layers if isinstance(layer, StackLayer)]


def _patterns(model: Any) -> list[LayerPattern]:
    return tile_pattern(model.config.pattern, model.config.depth)


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())
