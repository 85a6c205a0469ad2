"""Parameter groups: with weight decay, and without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimiser: matrices take weight decay; vectors and what its paper exempts do not.

    Exempt are norms, biases, decays (``A_log``, ``dt_bias``), skips (``D``): every parameter with fewer than two
    dimensions, and those that their module names in ``no_weight_decay``.
    """
    exempt = set(_exempt_by_name(model))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in parameters if parameter.ndim >= 2 and parameter not in exempt]
    rest = [parameter for parameter in parameters if parameter.ndim < 2 or parameter in exempt]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def _exempt_by_name(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        for name in getattr(module, "no_weight_decay", ()):
            parameter = getattr(module, name)
            if parameter is not None:
                yield parameter
