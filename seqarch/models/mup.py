"""Maximal update parametrisation: a rate that is right for a narrow model is right for a wide one.

Yang et al. 2022, "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer"
(arXiv 2203.03466), table 3, for Adam: with r the ratio of a weight's fan-in to that of the model whose width is
``mup_base_width``, its learning rate is divided by r, and where its fan-out does not grow with the width, its initial
standard deviation is divided by the square root of r as well. All else is as without it: the library's own starts have
variances of one over the fan-in. At the base width nothing changes.

Which sizes grow is seen by building the model at the base width, without memory; so it holds for every mixer, one of
your own too, whose weights are linear maps or say in ``fan_in_dims`` which dimension is summed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from seqarch.layers import mixer_class
from seqarch.layers.mixer import Layer
from seqarch.models.pattern import tile_pattern

if TYPE_CHECKING:
    from seqarch.models.config import LMConfig
    from seqarch.models.language_model import LanguageModel

PER_HEAD = ("head_width", "head_dim", "keys", "values", "key_width")
"""Attributes of a mixer's config whose sums are scaled as for heads of one size."""


class Scaling(NamedTuple):
    """Factors of a parameter's initial values and of its learning rate."""

    init: float
    lr: float


def scalings(model: LanguageModel) -> dict[str, Scaling]:
    """By the names of a model's parameters.

    Raises:
        ValueError: the model cannot be built at its ``mup_base_width``, has other heads or other parameters there, or a
            parameter grows in several dimensions of which none is known to be its fan-in.
    """
    base = _base_model(model)
    shapes = {name: parameter.shape for name, parameter in base.named_parameters()}
    fan_in = dict(_fan_in_dims(model))
    found = {}
    for name, parameter in model.named_parameters():
        if name not in shapes or len(shapes[name]) != parameter.ndim:
            raise ValueError(f"mup_base_width: {name} is {list(parameter.shape)}, and no such parameter is in the base")
        ratios = [own / of_base for own, of_base in zip(parameter.shape, shapes[name], strict=True)]
        found[name] = _scaling(name, ratios, fan_in.get(name))
    return found


def _scaling(name: str, ratios: list[float], fan_in: int | None) -> Scaling:
    growing = [dimension for dimension, ratio in enumerate(ratios) if ratio != 1]
    if fan_in is None:
        if len(growing) > 1:
            raise ValueError(
                f"mup_base_width: {name} grows with the width in dimensions {growing}; name the one that is summed over"
                " in the fan_in_dims of its module"
            )
        return Scaling(1.0, 1.0)
    ratio = ratios[fan_in]
    return Scaling(ratio**-0.5 if growing == [fan_in] else 1.0, 1 / ratio)


@torch.no_grad()
def scale_initialisation(model: LanguageModel) -> None:
    """Multiply the initial values of a model with a ``mup_base_width`` by their factors, once it is made."""
    if model.config.mup_base_width is None:
        return
    for name, scaling in scalings(model).items():
        if scaling.init != 1:
            model.get_parameter(name).mul_(scaling.init)


def base_config(config: LMConfig) -> LMConfig:
    """The same model at its ``mup_base_width``: heads are as many times fewer, all other options are the same.

    Raises:
        ValueError: it cannot be built.
    """
    width = config.mup_base_width
    if width is None:
        raise ValueError("mup_base_width is None: the model has no base")
    mixers = {name: dict(options) for name, options in config.mixers.items()}
    for layer in tile_pattern(config.pattern, config.depth):
        for name, own in zip(layer.mixers, layer.options, strict=True):
            if "num_heads" in own:
                raise ValueError(f"mup_base_width: give num_heads of {name} under mixers, not in the pattern")
            heads = config.options_of(name, {}).get("num_heads", _default_heads(name))
            if isinstance(heads, int):
                mixers.setdefault(name, {})["num_heads"] = _fewer(name, heads, config.d_model, width)
    try:
        return replace(config, d_model=width, mixers=mixers, mup_base_width=None)
    except ValueError as error:
        raise ValueError(f"mup_base_width: there is no such model of width {width}: {error}") from error


def _default_heads(name: str) -> int | None:
    return next((each.default for each in fields(mixer_class(name).Config) if each.name == "num_heads"), None)  # type: ignore[return-value]


def _fewer(name: str, heads: int, width: int, base: int) -> int:
    if heads * base % width:
        raise ValueError(
            f"mup_base_width: {heads} heads of {name} at width {width} are {heads * base / width:.3g} at width {base};"
            " expected a whole number, so that heads keep their size: give num_heads in proportion to d_model"
        )
    return heads * base // width


def _base_model(model: LanguageModel) -> LanguageModel:
    config = base_config(model.config)
    try:
        with torch.device("meta"):
            base = type(model)(config)
    except ValueError as error:
        raise ValueError(f"mup_base_width: there is no such model of width {config.d_model}: {error}") from error
    own = dict(_sizes(model))
    for name, size in _sizes(base):
        if own.get(name) != size:
            raise ValueError(
                f"mup_base_width: {name} is {own.get(name)} at width {model.config.d_model} and {size} at width"
                f" {config.d_model}; expected heads of one size: give it, or num_heads, in the mixer's options"
            )
    return base


def _sizes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The sizes of heads by the paths of their layers."""
    for path, module in model.named_modules():
        if isinstance(module, Layer):
            for attribute in PER_HEAD:
                if isinstance(size := getattr(module.config, attribute, None), int):
                    yield f"{path}.{attribute}", size


def _fan_in_dims(model: nn.Module) -> Iterator[tuple[str, int]]:
    """The dimension that is summed over, by the names of parameters that are maps."""
    for path, module in model.named_modules():
        own: Mapping[str, int] = getattr(module, "fan_in_dims", {})
        if isinstance(module, nn.Linear):
            own = {"weight": 1, **own}
        for name, dimension in own.items():
            yield f"{path}.{name}" if path else name, dimension
