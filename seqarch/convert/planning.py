"""The configuration of a converted stack: a pattern in which some layers have other mixers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from seqarch.convert.copying import HeadShape, head_shape
from seqarch.layers import Mixer, mixer_class
from seqarch.models import LayerPattern, LMConfig, StackConfig, tile_pattern
from seqarch.models.pattern import write_pattern
from seqarch.ops.dispatch.checks import fits, show

BY_NAME = ("input_factors", "output_factors", "residual_factors", "norm_placements")
"""Options of a stack by the names of mixers, which a mixer takes over from the one that it replaces."""


MAY_DIFFER = ("pattern", "mixers", *BY_NAME, "init", "embedding_std", "mup_base_width")
"""Options in which two models may differ of which one takes the weights of the other."""


@dataclass(frozen=True)
class Plan:
    """What a conversion makes.

    Attributes:
        config: of the converted stack or language model.
        sources: of each layer, the number of the mixer that each of its mixers takes from; ``None`` of a layer that is
            kept whole.
    """

    config: Any
    sources: tuple[tuple[int, ...] | None, ...]


def make_plan(config: StackConfig, mixers: Sequence[Sequence[Mixer]], pattern: str, keep_layers: Iterable[int]) -> Plan:
    """The plan of a conversion.

    Args:
        mixers: of each layer of the stack that is converted.

    Raises:
        ValueError: the pattern does not fit the depth or says more than mixers, a layer's number is out of range, or
            mixers to be replaced are bound to other layers.
    """
    own, wanted = tile_pattern(config.pattern, config.depth), tile_pattern(pattern, config.depth)
    keep = _checked(keep_layers, config.depth)
    layers: list[LayerPattern] = []
    sources: list[tuple[int, ...] | None] = []
    taken: dict[str, dict[str, Any]] = {name: {} for name in BY_NAME}
    for i, (before, after) in enumerate(zip(own, wanted, strict=True)):
        _check_layer(i, after)
        if i in keep or _is_same(before, after):
            layers.append(before)
            sources.append(None)
            continue
        found = _sources(i, before, after, mixers[i])
        shapes = [head_shape(mixers[i][source]) for source in found]
        names = zip(after.mixers, after.options, found, shapes, strict=True)
        given = tuple(_options(config, mixers[i][j], name, said, shape) for name, said, j, shape in names)
        layers.append(LayerPattern(after.mixers, before.channel, given, _channel_options(before)))
        sources.append(found)
        for name, source in zip(after.mixers, found, strict=True):
            _take_over(i, config, before.mixers[source], name, taken)
    kept = {name for layer, found in zip(own, sources, strict=True) if found is None for name in layer.mixers}
    return Plan(replace(config, pattern=write_pattern(layers), **_by_name(config, taken, kept)), tuple(sources))


def _checked(keep_layers: Iterable[int], depth: int) -> set[int]:
    keep = set(keep_layers)
    for each in keep:
        if not fits(each, (int,)) or not 0 <= each < depth:
            raise ValueError(f"convert: keep_layers has {show(each)}, expected numbers of layers, 0 to {depth - 1}")
    return keep


def _check_layer(number: int, wanted: LayerPattern) -> None:
    if wanted.channel is not None:
        raise ValueError(
            f"convert: layer {number}: the pattern says /{wanted.channel}, and channel mixers stay as they are:"
            " expected mixers alone"
        )
    if any(wanted.sharing):
        raise ValueError(f"convert: layer {number}: {wanted} is shared, and converted mixers are each layer's own")


def _is_same(before: LayerPattern, after: LayerPattern) -> bool:
    """Whether a pattern names the mixers that are there, and no options of theirs."""
    return before.mixers == after.mixers and not any(after.options)


def _channel_options(layer: LayerPattern) -> dict[str, Any]:
    return {**layer.channel_options, **layer.channel_sharing}


def _sources(number: int, before: LayerPattern, after: LayerPattern, mixers: Sequence[Mixer]) -> tuple[int, ...]:
    """The mixer that each of a layer's new mixers takes from: the only one, or the one in its place."""
    for name, sharing, mixer in zip(before.mixers, before.sharing, mixers, strict=True):
        bound = [*(["shares its numbers"] if sharing else []), *(["takes tensors"] if mixer.takes else []),
                 *(["gives tensors"] if mixer.gives else [])]  # fmt: skip
        if bound:
            raise ValueError(
                f"convert: layer {number}: {name} {' and '.join(bound)} (of other layers, or to them): keep the layer,"
                " or convert a model whose layers stand for themselves"
            )
    if len(before.mixers) == 1:
        return (0,) * len(after.mixers)
    if len(before.mixers) != len(after.mixers):
        raise ValueError(
            f"convert: layer {number} has {len(before.mixers)} mixers side by side and {after} {len(after.mixers)}:"
            " expected as many, or one there"
        )
    return tuple(range(len(after.mixers)))


def _options(
    config: StackConfig, source: Mixer, name: str, said: Mapping[str, Any], shape: HeadShape | None
) -> dict[str, Any]:
    """The options of a new mixer: those that fit it to the heads of the old one, but for what is said of it."""
    target = mixer_class(name).Config
    known, theirs = {field.name: field for field in fields(target)}, {field.name for field in fields(source.config)}
    kept = {option: getattr(source.config, option) for option in target.kept_options if option in theirs}
    sizes = {} if shape is None else {option: getattr(shape, word) for option, word in target.head_options.items()}
    found = {option: value for option, value in {**kept, **sizes}.items() if value != known[option].default}
    by_name = config.mixers.get(name, {})
    return {**{option: value for option, value in found.items() if option not in by_name}, **said}


def _take_over(number: int, config: StackConfig, before: str, after: str, taken: Mapping[str, dict[str, Any]]) -> None:
    """Give a new mixer the constants and the norm placement of the old one."""
    for option, values in taken.items():
        value = _constant(config, option, before)
        if values.setdefault(after, value) != value:
            raise ValueError(
                f"convert: layer {number}: {option} is {value!r} for {before} and {values[after]!r} for another mixer"
                f" in whose place {after} stands: expected the same"
            )


def _constant(config: StackConfig, option: str, name: str) -> Any:
    """What an option by the names of mixers is for one of them."""
    usual = config.norm_placement if option == "norm_placements" else 1.0
    return getattr(config, option).get(name, usual)


def _by_name(config: StackConfig, taken: Mapping[str, Mapping[str, Any]], kept: set[str]) -> dict[str, dict[str, Any]]:
    """The options by the names of mixers, with those that new mixers take over; layers that stay keep theirs."""
    found: dict[str, dict[str, Any]] = {}
    for option, values in taken.items():
        new = {name: value for name, value in values.items() if value != _constant(config, option, name)}
        if odd := sorted(kept & new.keys()):
            raise ValueError(
                f"convert: {option} is {_constant(config, option, odd[0])!r} for {odd[0]} in layers that stay, and"
                f" would be {new[odd[0]]!r} in those that are new: expected the same"
            )
        found[option] = {**getattr(config, option), **new}
    return found


def check_alike(config: StackConfig, other: StackConfig) -> None:
    """Raise where models differ in more than mixers, a teacher by its config and what is made of it.

    Raises:
        ValueError: naming the first option.
    """
    if type(config) is not type(other):
        kinds = f"{type(config).__name__} and {type(other).__name__}"
        raise ValueError(f"convert: configs are {kinds}, expected two of one kind")
    for field in fields(config):
        theirs, own = getattr(config, field.name), getattr(other, field.name)
        if field.name not in MAY_DIFFER and theirs != own:
            raise ValueError(f"convert: {field.name} is {theirs!r} in the teacher and {own!r} here, expected the same")


def fitted(wanted: LMConfig, config: LMConfig, mixers: Sequence[Sequence[Mixer]]) -> LMConfig:
    """A configuration whose mixers have the sizes that fit them to those of another model, as far as it says none.

    Args:
        config, mixers: of the model that is to be converted.

    Raises:
        ValueError: as of :func:`check_alike` and :func:`make_plan`.
    """
    check_alike(config, wanted)
    named = {name: {**config.mixers.get(name, {}), **own} for name, own in wanted.mixers.items()}
    plan = make_plan(replace(config, mixers={**config.mixers, **named}), mixers, wanted.pattern, ())
    for name in BY_NAME:
        given, found = getattr(wanted, name), getattr(plan.config, name)
        if given not in ({}, found):
            raise ValueError(f"convert: {name} is {given!r}, and follows from the model that is converted: {found!r}")
    used = {name for layer in tile_pattern(plan.config.pattern, plan.config.depth) for name in layer.mixers}
    options = {name: own for name, own in plan.config.mixers.items() if name in used}
    return replace(wanted, mixers=options, **{name: getattr(plan.config, name) for name in ("pattern", *BY_NAME)})
