"""The projections of a model's mixers and channel mixers, by the names by which adapters are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from seqarch.layers import Mixer
from seqarch.models.language_model import LanguageModel
from seqarch.models.pattern import tile_pattern


class Projection(NamedTuple):
    """A matrix that multiplies features, or several of one shape as those of experts; or the part of it that makes or
    reads the heads of one role.

    Attributes:
        layer: the name of the mixer or channel mixer.
        path: from the language model.
        own: from the mixer or channel mixer.
        is_module: whether it is an ``nn.Linear``, and not a tensor of another module.
        role: of heads, ``"q"``, ``"k"``, ``"v"`` or ``"o"``; ``None`` of a whole matrix.
        start, size: of heads, the first row and how many there are; of ``"o"`` columns.
    """

    layer: str
    path: str
    own: str
    is_module: bool
    role: str | None = None
    start: int = 0
    size: int = 0

    @property
    def names(self) -> set[str]:
        """By which it may be asked for: its role or, of a whole matrix, its path in its layer and each part of that."""
        return {self.own, *self.own.split(".")} if self.role is None else {self.role}

    @property
    def tensor(self) -> str:
        """The path of the tensor."""
        return f"{self.path}.weight" if self.is_module else self.path


def choose(model: LanguageModel, names: Sequence[str], with_roles: bool = False) -> list[Projection]:
    """The projections that names ask for; all whole ones without names.

    Args:
        names: of mixers and channel mixers (``"mamba2"``, ``"moe"``), for those alone, and of projections
            (``"out_proj"``, ``"qkv_proj"``), for only these.
        with_roles: whether ``"q"``, ``"k"``, ``"v"`` and ``"o"`` are names, too: of the rows, or columns, that a mixer
            says to be these (:meth:`seqarch.layers.Mixer.head_maps`). A matrix that is asked for whole is that alone.

    Raises:
        ValueError: a name matches nothing in the model; what would is listed.
    """
    whole = list(_whole(model))
    heads = list(_heads(model)) if with_roles else []
    layers, parts = {each.layer for each in whole}, {name for each in (*whole, *heads) for name in each.names}
    for name in names:
        if name not in layers | parts:
            kinds = sorted({each.own.split(".")[0] for each in whole})
            roles = sorted({each.role for each in heads if each.role is not None})
            raise ValueError(
                f"{name!r} matches nothing in the model; expected one of its layers, {', '.join(sorted(layers))}, or of"
                f" their projections, {', '.join(kinds + roles)}"
            )
    wanted_layers, wanted_parts = layers & set(names) or layers, parts & set(names)
    chosen = [each for each in whole if each.layer in wanted_layers and (not wanted_parts or each.names & wanted_parts)]
    taken = {each.path for each in chosen}
    chosen += [
        each for each in heads if each.layer in wanted_layers and each.names & wanted_parts and each.path not in taken
    ]
    if not chosen:
        asked = ", ".join(sorted(wanted_parts))
        raise ValueError(f"no layer {' or '.join(sorted(wanted_layers))} has a projection {asked}")
    return chosen


def _layers(model: LanguageModel) -> Iterator[tuple[str, nn.Module, str]]:
    """Mixers and channel mixers: the name, the module and its path."""
    patterns = tile_pattern(model.config.pattern, model.config.depth)
    for i, (layer, pattern) in enumerate(zip(model.stack.layers, patterns, strict=True)):
        for j, name in enumerate(pattern.mixers):
            yield name, layer.mixers[j], f"stack.layers.{i}.mixers.{j}"  # type: ignore[index, union-attr, misc]
        if layer.channel is not None:
            name = pattern.channel or model.config.channel
            yield name, layer.channel, f"stack.layers.{i}.channel"  # type: ignore[misc]


def _whole(model: LanguageModel) -> Iterator[Projection]:
    """Linear maps that learn, and the matrices that a module names in ``projections``."""
    for layer, module, path in _layers(model):
        fixed = getattr(module, "without_gradient", ())
        for own, inner in module.named_modules():
            if isinstance(inner, nn.Linear) and own not in fixed:
                yield Projection(layer, f"{path}.{own}", own, True)
            for tensor in getattr(inner, "projections", ()):
                if getattr(inner, tensor) is not None:
                    name = f"{own}.{tensor}" if own else tensor
                    yield Projection(layer, f"{path}.{name}", name, False)


def _heads(model: LanguageModel) -> Iterator[Projection]:
    """The parts of linear maps that are heads."""
    for layer, module, path in _layers(model):
        for each in module.head_maps() if isinstance(module, Mixer) else ():
            if isinstance(module.get_submodule(each.path), nn.Linear):
                yield Projection(layer, f"{path}.{each.path}", each.path, True, each.role, each.start, each.size)
