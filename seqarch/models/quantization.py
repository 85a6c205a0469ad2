"""A model with weights of 8 or 4 bits, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import nn

from seqarch.layers.channel.moe import MixtureOfExperts
from seqarch.layers.modules.linear import PLAIN, Linear, is_plain_linear
from seqarch.layers.modules.quantized import (
    GROUPS,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedMatrices,
    QuantizedWeight,
    WeightFormat,
)
from seqarch.models.calibration import calibrated, check_moments, in_order, moments
from seqarch.models.stack import Stack
from seqarch.ops.dispatch.checks import show, unknown_name
from seqarch.ops.dispatch.eager import is_untouched

M = TypeVar("M", bound=nn.Module)


def quantize(
    model: M,
    name: str,
    *,
    group_size: int | None = None,
    keep: str | Sequence[str] = (),
    calibration: torch.Tensor | None = None,
) -> M:
    """Round the weights of linear maps, embeddings, heads and experts to 8 or 4 bits, in place; returns the model.

    What makes decays and step sizes stays as it is (``unquantized`` of each mixer), and so do norms, convolutions,
    routers and all that is no matrix of a linear map. One token on a CPU in float32 reads the codes alone; all other
    calls, gradients of inputs among them, widen the weights first. Nothing is changed where an error is raised.

    Each weight is rounded to the nearest code. With ``calibration`` linear maps are rounded by GPTQ
    (:mod:`seqarch.models.calibration`), so that what they put out for such inputs changes less: layer after layer,
    each on what the rounded layers before it put out. The model reads all of ``calibration`` once for each layer.
    Embeddings, heads that share their weights and experts are rounded to the nearest all the same.

    Args:
        name: ``"int8"`` or ``"int4"``.
        group_size: how many weights share a scale, 32 or 64; by default 64 of ``"int8"`` and 32 of ``"int4"``.
        keep: names of modules to leave as they are, with all inside of them, as ``"head"``, ``"stack.layers.0"`` or
            ``"*.out_proj"``.
        calibration: what the model is called with, a sequence a row, as tokens ``[B, T]``: text of the kind that it is
            for, some tens of thousands of tokens.

    Raises:
        ValueError: there is no such format or group size, ``keep`` names nothing, groups do not divide a map's inputs,
            a map is quantised, adapted or hooked, its weights are no finite numbers, or there is nothing to quantise;
            or ``calibration`` has no rows, or the model does not call a map on it.
    """
    form = WeightFormat(name, GROUPS.get(name, 32) if group_size is None else group_size)
    everything = dict(_targets(model))
    targets = _without_kept(everything, (keep,) if isinstance(keep, str) else tuple(keep))
    for path in everything.keys() - targets.keys():
        if shared := [other for other, weight in targets.items() if weight is everything[path]]:
            raise ValueError(
                f"{path} and {shared[0]} are one weight, and keep names {path} alone: keep both, or neither"
            )
    if not targets:
        raise ValueError(f"{type(model).__name__} has no linear map, embedding or experts left to quantise")
    for path, tensor in targets.items():
        _check(model, path, tensor, form)
    if calibration is None:
        replace(model, dict.fromkeys(targets, form))
    else:
        _calibrate(model, targets, form, calibration)
    return model


def _calibrate(model: nn.Module, targets: Mapping[str, torch.Tensor], form: WeightFormat, inputs: torch.Tensor) -> None:
    """Quantise one layer after the other; where an error is raised, those done are put back."""
    if not isinstance(inputs, torch.Tensor) or inputs.ndim < 2 or not inputs.numel():
        raise ValueError(f"calibration is {show(inputs)}, expected what the model is called with, a sequence a row")
    former = {path: _at(model, path) for path in targets}
    shared = [(stack, stack.shared) for stack in model.modules() if isinstance(stack, Stack)]
    owners = Counter(map(id, targets.values()))
    maps = [p for p, weight in targets.items() if isinstance(former[p], nn.Linear) and owners[id(weight)] == 1]
    try:
        replace(model, {path: form for path in targets if path not in maps})
        for names in in_order(maps):
            found = moments(model, names, inputs)
            check_moments(names, found)
            encoded = {path: calibrated(targets[path], found[path], form) for path in names}
            replace(model, dict.fromkeys(names, form), encoded)
    except BaseException:
        for path, each in former.items():
            _put(model, path, each)
        for stack, pairs in shared:
            stack.shared = pairs
        raise


def _at(model: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(model.get_submodule(owner), name)


def _put(model: nn.Module, path: str, former: Any) -> None:
    owner, _, name = path.rpartition(".")
    place = model.get_submodule(owner)
    if isinstance(former, nn.Parameter):
        place._modules.pop(name, None)
    setattr(place, name, former)


Encoded = tuple[torch.Tensor, torch.Tensor]
"""Codes and scales."""


def replace(
    model: nn.Module, formats: Mapping[str, WeightFormat], encoded: Mapping[str, Encoded] = MappingProxyType({})
) -> None:
    """Put quantised modules in place of those of these names; tensors that two share they share after it.

    Weights are rounded to the nearest but for those whose codes and scales are ``encoded``.
    """
    done: dict[int, QuantizedWeight] = {}
    places: dict[int, nn.Module | None] = {}
    targets = dict(_targets(model))
    for path, form in formats.items():
        if path not in targets:
            raise ValueError(f"{show(path)} is no linear map, embedding or experts' matrix of the model")
        _check_width(path, targets[path], form)
    for path, form in formats.items():
        weight = targets[path]
        owner, _, name = path.rpartition(".")
        place = model.get_submodule(owner)
        former: Any = getattr(place, name)
        twin = done.get(id(weight))
        twin = twin if twin is not None and twin.form == form else None
        if isinstance(former, nn.Parameter):
            same = None if twin is None else QuantizedMatrices(twin.codes, twin.scales, form, weight.dtype)
            made: QuantizedWeight = QuantizedMatrices.of(weight, form) if same is None else same
            done[id(weight)] = made
            del place._parameters[name]
        else:
            if path in encoded:
                codes, scales = encoded[path]
            else:
                codes, scales = form.encode(weight) if twin is None else (twin.codes, twin.scales)
            kind = QuantizedEmbedding if isinstance(former, nn.Embedding) else QuantizedLinear
            others: tuple[Any, ...] = () if kind is QuantizedEmbedding else (former.bias,)
            made = done[id(weight)] = kind(codes, scales, form, weight.dtype, *others)
            places[id(former)] = made
        setattr(place, name, made.train(place.training))
    _share_on(model, places)


@torch.no_grad()
def dequantize(model: M) -> M:
    """Put plain modules with the rounded weights in the place of quantised ones, under their former names; in place.

    Raises:
        ValueError: the model has no quantised weights.
    """
    modules = dict(quantized(model))
    if not modules:
        raise ValueError(f"{type(model).__name__} has no quantised weights")
    done: dict[int, nn.Parameter] = {}
    places: dict[int, nn.Module | None] = {}
    for path, module in modules.items():
        owner, _, name = path.rpartition(".")
        place = model.get_submodule(owner)
        if id(module.codes) not in done:
            numbers = module.matrices() if isinstance(module, QuantizedMatrices) else module.dequantized()
            done[id(module.codes)] = nn.Parameter(numbers.contiguous())
        weight = done[id(module.codes)]
        if isinstance(module, QuantizedMatrices):
            del place._modules[name]
            setattr(place, name, weight)
            places[id(module)] = None
            continue
        if isinstance(module, QuantizedEmbedding):
            plain: Any = nn.Embedding(module.shape[0], module.shape[1], device="meta")
        else:
            plain = Linear(module.shape[1], module.shape[0], bias=False, device="meta")
            plain.bias = module.bias  # type: ignore[attr-defined]
        plain.weight = weight
        places[id(module)] = plain
        setattr(place, name, plain.train(place.training))
    _share_on(model, places)
    return model


def _share_on(model: nn.Module, places: Mapping[int, nn.Module | None]) -> None:
    """Let layers that share tensors share on, by the ids of modules what took their places, or that nothing did."""
    for stack in model.modules():
        if isinstance(stack, Stack):
            now = ((places.get(id(one), one), places.get(id(first), first)) for one, first in stack.shared)
            pairs = [(one, first) for one, first in now if one is not None and first is not None]
            known = {id(one) for one, _ in pairs}
            stack.shared = [*pairs, *(pair for pair in _shared_experts(pairs) if id(pair[0]) not in known)]


def _shared_experts(pairs: Sequence[tuple[nn.Module, nn.Module]]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The quantised matrices of mixtures that share theirs."""
    for one, first in pairs:
        for name in one.projections if isinstance(one, MixtureOfExperts) else ():
            matrices = [each._modules.get(name) for each in (one, first)]
            if all(isinstance(each, QuantizedMatrices) for each in matrices):
                yield tuple(matrices)  # type: ignore[misc]


def quantized(model: nn.Module) -> Iterator[tuple[str, QuantizedWeight]]:
    """The quantised weights of a model by name."""
    return ((path, each) for path, each in model.named_modules() if isinstance(each, QuantizedWeight))


def formats_of(model: nn.Module) -> dict[str, WeightFormat]:
    """The format of each quantised weight by its name."""
    return {path: each.form for path, each in quantized(model)}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, and of the codes and scales of quantised weights; shared ones count once."""
    tensors = [*model.parameters(), *(each for _, q in quantized(model) for each in (q.codes, q.scales))]
    return sum(each.numel() * each.element_size() for each in {id(each): each for each in tensors}.values())


def _targets(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What may be quantised: names of linear maps, embeddings and experts' matrices, with their weights."""
    apart: set[int] = set()
    for path, module in model.named_modules():
        for name in getattr(type(module), "unquantized", ()):
            own = getattr(module, name, None)
            apart.update(map(id, own.modules()) if isinstance(own, nn.Module) else ())
        if id(module) in apart:
            continue
        before = f"{path}." if path else ""
        if isinstance(module, nn.Linear | nn.Embedding) and path:
            yield path, module.weight
        elif isinstance(module, MixtureOfExperts):
            own = {name: module._parameters.get(name) for name in module.projections}
            yield from ((f"{before}{name}", weight) for name, weight in own.items() if weight is not None)


def _without_kept(targets: Mapping[str, torch.Tensor], keep: Sequence[str]) -> dict[str, torch.Tensor]:
    kept: set[str] = set()
    for entry in keep:
        found = {
            p for p in targets if isinstance(entry, str) and (fnmatchcase(p, entry) or f"{p}.".startswith(f"{entry}."))
        }
        if not found:
            raise unknown_name("module to keep", entry, targets)
        kept |= found
    return {path: weight for path, weight in targets.items() if path not in kept}


def _check(model: nn.Module, path: str, weight: torch.Tensor, form: WeightFormat) -> None:
    module = _at(model, path)
    if isinstance(module, nn.Linear):
        plain = is_plain_linear(module)
    else:
        plain = type(weight) in PLAIN and (isinstance(module, nn.Parameter) or is_untouched(module))
    if not plain:
        raise ValueError(f"{path} has hooks, a parametrisation or weights of another kind: merge it first, or keep it")
    if not weight.is_floating_point() or (not weight.is_meta and not bool(weight.isfinite().all())):
        raise ValueError(f"{path} has weights that are no finite numbers: they cannot be quantised")
    _check_width(path, weight, form)


def _check_width(path: str, weight: torch.Tensor, form: WeightFormat) -> None:
    depth = weight.shape[-2] if weight.ndim == 3 else weight.shape[-1]
    if depth % form.group_size or depth == 0:
        raise ValueError(
            f"{path} has {depth} inputs, which groups of {form.group_size} do not divide: expected another group_size"
            f" (32 or 64), or keep={path!r}"
        )
