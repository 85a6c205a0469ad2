"""The projections of one mixer copied into another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqarch.convert.report import ConvertedMixer
from seqarch.layers import Mixer
from seqarch.layers.modules.head_maps import HeadMap
from seqarch.layers.modules.short_conv import ShortConvolution

ROLES = ("q", "k", "v", "o")
"""What attention is made of."""


class HeadShape(NamedTuple):
    """The heads of a mixer, in the words of ``Config.head_options``.

    Attributes:
        heads: H, that the output is made of.
        kv_heads: G, of the keys.
        keys, values: their widths.
        inner: values of all heads together.
    """

    heads: int
    kv_heads: int
    keys: int
    values: int
    inner: int


def maps_by_role(mixer: Mixer) -> dict[str, list[HeadMap]]:
    """The maps of a mixer's heads; a role may be in several places."""
    found: dict[str, list[HeadMap]] = {}
    for each in mixer.head_maps():
        found.setdefault(each.role, []).append(each)
    return found


def head_shape(mixer: Mixer) -> HeadShape | None:
    """The heads of a mixer that has queries, keys, values and what reads them; else ``None``."""
    maps = maps_by_role(mixer)
    if not set(ROLES) <= maps.keys() or any(maps[role][0].width is None for role in ROLES):
        return None
    k, v, o = (maps[role][0] for role in "kvo")
    return HeadShape(o.heads, k.heads, k.width or 0, v.width or 0, o.size)


@torch.no_grad()
def copy_mixer(layer: int, names: tuple[str, str], source: Mixer, target: Mixer) -> ConvertedMixer:
    """Copy what both mixers have of queries, keys, values, what reads them, and of parts that mean the same in both.

    Heads that several share in the source are repeated where each has its own in the target. What the target adds to
    a projection, a bias or a short convolution, begins without effect.

    Args:
        layer, names: for the report: the layer's number, and the names of the two mixers.

    Raises:
        ValueError: the numbers of a linear map cannot be read, as of one in few bits; it names the map.
    """
    theirs, own = maps_by_role(source), maps_by_role(target)
    copied, refused, touched = {}, {}, 0
    for role, (given, *_) in theirs.items():
        if role not in own:
            if role in ROLES:
                refused[role] = f"{names[1]} has none"
            continue
        reasons = [_misfit(given, wanted) for wanted in own[role]]
        if reason := next((each for each in reasons if each), ""):
            refused[role] = reason
            continue
        for wanted in own[role]:
            copied[role] = wanted.size // given.size
            touched += _copy(given, source, wanted, target)
    _without_convolution(source, target)
    kept, missing = _copy_parts(source, target)
    touched += sum(_size(_part(target, name)) for name in kept)
    total = sum(parameter.numel() for parameter in target.parameters())
    return ConvertedMixer(layer, *names, copied, tuple(kept), refused | missing, (touched, total))


def _misfit(given: HeadMap, wanted: HeadMap) -> str:
    """Why heads do not fit, or nothing."""
    same_width = wanted.width in (given.width, None)
    repeats = 1 if given.role == "o" else max(1, wanted.size // given.size)
    if same_width and given.size * repeats == wanted.size:
        return ""
    return f"{_shown(wanted)}, expected {_shown(given)}"


def _shown(part: HeadMap) -> str:
    return f"{part.heads} channels" if part.width is None else f"{part.heads} heads of {part.width}"


def _copy(given: HeadMap, source: Mixer, wanted: HeadMap, target: Mixer) -> int:
    """Copy a map's weights and bias; how many numbers that were."""
    repeats, width = wanted.size // given.size, given.width or 1
    weight, bias = wanted.weight(target), wanted.bias(target)
    weight.copy_(_repeated(given.weight(source), repeats, width))
    if bias is None:
        return weight.numel()
    theirs = given.bias(source)
    if theirs is None:
        bias.zero_()
    else:
        bias.copy_(theirs if given.role == "o" else _repeated(theirs, repeats, width))
    return weight.numel() + bias.numel()


def _repeated(rows: Tensor, repeats: int, width: int) -> Tensor:
    """Each head of ``[H K, ...]`` so many times in a row."""
    return rows.unflatten(0, (-1, width)).repeat_interleave(repeats, dim=0).flatten(0, 1)


def _without_convolution(source: Mixer, target: Mixer) -> None:
    if type(target.short_conv) is ShortConvolution and source.short_conv is None:
        target.short_conv.make_identity()


def _copy_parts(source: Mixer, target: Mixer) -> tuple[list[str], dict[str, str]]:
    """Copy the parts that mean the same in both; those that were, and why others were not."""
    kept, missing = [], {}
    for name in source.kept_parts:
        given, wanted = _tensors(_part(source, name)), _tensors(_part(target, name))
        if not given:
            continue
        if name not in target.kept_parts or not wanted:
            missing[name] = f"{type(target).__name__} has none"
        elif _shapes(given) != _shapes(wanted):
            missing[name] = f"tensors of {_shapes(wanted)}, expected {_shapes(given)}"
        else:
            kept.append(name)
            for key, tensor in wanted.items():
                tensor.copy_(given[key])
    missing |= _lost_biases(source, target)
    return kept, missing


def _lost_biases(source: Mixer, target: Mixer) -> dict[str, str]:
    """Biases of the source's projections for which the target has no place."""
    theirs, own = maps_by_role(source), maps_by_role(target)
    lost = [role for role, (given, *_) in theirs.items() if role in own
            and given.bias(source) is not None and any(each.bias(target) is None for each in own[role])]  # fmt: skip
    return {f"the bias of {role}": "there is no place for one" for role in lost}


def _part(mixer: Mixer, name: str) -> Any:
    found: Any = mixer
    for each in name.split("."):
        found = getattr(found, each, None)
    return found


def _tensors(part: Any) -> dict[str, Tensor]:
    if isinstance(part, nn.Module):
        return part.state_dict(keep_vars=True)
    return {} if part is None else {"": part}


def _shapes(tensors: dict[str, Tensor]) -> Sequence[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors.values()]


def _size(part: Any) -> int:
    return sum(math.prod(tensor.shape) for tensor in _tensors(part).values())
