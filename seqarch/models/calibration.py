"""Codes that keep what a map puts out for given inputs, instead of each weight by itself.

GPTQ (Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022): of a map ``y = W x`` with inputs of second moments ``H = mean(x x^T)``, columns of W are rounded
one after the other, and what rounding column k changes in y is made up for, as far as can be, by the columns after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import groupby

import torch
from torch import Tensor, nn

from seqarch.layers.modules.quantized import WeightFormat

DAMPING = 0.01
"""What is added to the diagonal of H, as a share of its mean: the paper's."""

COLUMNS = 128
"""After so many columns what they changed is added to the others, by one product."""

ROWS = 8
"""Sequences that the model reads at a time."""


def moments(model: nn.Module, names: Iterable[str], inputs: Tensor) -> dict[str, Tensor]:
    """``mean(x x^T) [K, K]`` in float64 of the inputs of these maps, while the model reads ``inputs``, whose rows are
    sequences. A map that is not called has none, and one that is not called with finite numbers has no finite ones."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach().flatten(0, -2).float()
            product = (x.mT @ x).double()
            sums[name] = sums[name] + product if name in sums else product
            counts[name] = counts.get(name, 0) + len(x)

        return hook

    with ExitStack() as hooks, evaluating(model), torch.no_grad():
        for name in names:
            handle = model.get_submodule(name).register_forward_pre_hook(note(name))
            hooks.callback(handle.remove)
        for some in inputs.split(ROWS):
            model(some)
    return {name: total / max(1, counts[name]) for name, total in sums.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block all modules are in evaluation."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def calibrated(weight: Tensor, moment: Tensor, form: WeightFormat) -> tuple[Tensor, Tensor]:
    """Codes and scales, as those of :meth:`WeightFormat.encode`, of ``weight [N, K]`` for inputs of ``moment [K, K]``.

    Scales of a group are those of its weights once the columns before it are rounded. O(N K^2 + K^3), in float64.
    """
    wide, size, depth = weight.detach().double().clone(), form.group_size, weight.shape[1]
    factor = _factor(moment)
    codes, scales = torch.empty(weight.shape, dtype=torch.int8), []
    for first in range(0, depth, COLUMNS):
        last = min(depth, first + COLUMNS)
        errors = wide.new_empty(len(wide), last - first)
        for k in range(first, last):
            if k % size == 0:
                scales.append(form.scales_of(wide[:, k : k + size]))
            rounded = form.rounded(wide[:, k], scales[-1])
            codes[:, k] = rounded
            error = (wide[:, k] - rounded * scales[-1].double()) / factor[k, k]
            wide[:, k + 1 : last] -= error[:, None] * factor[k, k + 1 : last]
            errors[:, k - first] = error
        wide[:, last:] -= errors @ factor[first:last, last:]
    return form.packed(codes), torch.stack(scales, -1).view(torch.int16)


def _factor(moment: Tensor) -> Tensor:
    """The upper U with ``U^T U`` the inverse of the damped moments: row k says how later columns make up for k."""
    moment = moment.clone()
    diagonal = moment.diagonal()
    mean = diagonal.mean()
    diagonal += torch.where(diagonal == 0, mean, 0.0) + DAMPING * mean + (mean == 0).to(mean.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    return torch.linalg.cholesky(inverse, upper=True)


def in_order(names: Iterable[str]) -> list[list[str]]:
    """The names of maps, by layers: one is calibrated on what the rounded ones before it put out."""

    def layer(name: str) -> str:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
        return ".".join(parts[: number + 1])

    return [list(group) for _, group in groupby(names, layer)]


def check_moments(names: Iterable[str], found: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless each map has finite moments."""
    for name in names:
        if name not in found:
            raise ValueError(f"{name} is not called on the calibration inputs, so that nothing calibrates it: keep it")
        if not bool(found[name].isfinite().all()):
            raise ValueError(f"{name} has inputs that are no finite numbers on the calibration inputs")
