"""Which parameters learn, and their groups: with weight decay and without, and those whose rates are scaled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any

from torch import nn

from seqarch.models.mup import scalings


def parameter_groups(model: nn.Module, weight_decay: float, lr: float | None = None) -> list[dict[str, Any]]:
    """Groups for an optimiser: matrices take weight decay; vectors and what its paper exempts do not.

    Exempt are norms, biases, decays (``A_log``, ``dt_bias``), skips (``D``): every parameter with fewer than two
    dimensions, and those that their module names in ``no_weight_decay``.

    Where the model's config has a ``mup_base_width``, there is a group for each factor of the learning rate. A rate is
    divided where the weight decay is multiplied, so that AdamW takes the same share of every matrix.

    Args:
        lr: the learning rate; with it each group has its own, otherwise the optimiser's is all groups'.

    Returns:
        dictionaries with ``params``, ``weight_decay``, ``lr_scale`` (1 without a ``mup_base_width``) and, if it is
        given, ``lr``.
    """
    exempt = set(_exempt_by_name(model))
    scaled = getattr(getattr(model, "config", None), "mup_base_width", None) is not None
    factors = {name: scaling.lr for name, scaling in scalings(model).items()} if scaled else {}  # type: ignore[arg-type]
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and parameter not in exempt
            groups.setdefault((factors.get(name, 1.0), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay / factor if decays else 0.0,
            "lr_scale": factor,
            **({} if lr is None else {"lr": lr * factor}),
        }
        for (factor, decays), parameters in groups.items()
    ]


def _exempt_by_name(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        for name in getattr(module, "no_weight_decay", ()):
            parameter = getattr(module, name)
            if parameter is not None:
                yield parameter


def train_only(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Let nothing learn but the parameters that are named, of those that learn so far; returns their paths.

    Args:
        names: of parameters, or of modules with all inside of them, as ``"head"``, ``"stack.layers.0"`` or
            ``"*.out_proj"``. Of weights that two modules share it is enough to name one.

    Raises:
        ValueError: a name is of no parameter, or none of those that are named learns so far; then nothing is changed.
    """
    everything = dict(model.named_parameters(remove_duplicate=False))
    inside = {path: list(accumulate(path.split("."), "{}.{}".format)) for path in everything}
    for name in names:
        if not any(fnmatchcase(each, name) for parts in inside.values() for each in parts):
            tops = sorted({parts[0] for parts in inside.values()})
            raise ValueError(
                f"{name!r} names no parameter; expected the path of a parameter or a module, which begin with"
                f" {', '.join(tops)}, with * for any part of it"
            )
    named = [path for path, parts in inside.items() if any(fnmatchcase(e, name) for e in parts for name in names)]
    chosen = [path for path in named if everything[path].requires_grad]
    if named and not chosen:
        raise ValueError(f"{', '.join(map(repr, names))} names only weights that do not learn, as {named[0]}")
    learning = {id(everything[path]) for path in chosen}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in learning)
    return chosen
