"""Which parameters take weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from seqarch.layers.initialisation import is_exempt_from_decay


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimiser: matrices take weight decay; vectors and what its paper exempts do not.

    Exempt are norms, biases, decays (``A_log``, ``dt_bias``), skips (``D``): every parameter with fewer than two
    dimensions, and those marked by :func:`seqarch.layers.initialisation.exempt_from_decay`.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    exempt = [parameter.ndim < 2 or is_exempt_from_decay(parameter) for parameter in parameters]
    decayed = [parameter for parameter, free in zip(parameters, exempt, strict=True) if not free]
    rest = [parameter for parameter, free in zip(parameters, exempt, strict=True) if free]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
