"""torch's ``grouped_mm``: all experts' products in one kernel, which torch has for bfloat16 on Hopper and newer GPUs.

Elsewhere ``grouped_mm`` is a loop over the experts that waits for the device (torch's pull requests 161407 and 162059),
which is what ``grouped_torch`` does already. Rows of no expert are 0 and go with the first expert's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch.ops.experts import groups
from seqarch.ops.experts.inputs import ExpertsInputs

LEAST_CAPABILITY = (9, 0)
ALIGNED = 8
"""bfloat16 numbers in 16 bytes: what lengths of rows must be multiples of."""


def unavailable() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return _slow(torch.cuda.get_device_capability())


def _slow(capability: tuple[int, int]) -> str | None:
    if capability >= LEAST_CAPABILITY:
        return None
    return f"torch's grouped product is a loop over the experts on compute capability {capability}, expected 9.0"


def unsupported(inputs: ExpertsInputs) -> str | None:
    x, w_in = inputs.x, inputs.w_in
    if x.device.type != "cuda":
        return f"x is on {x.device}, where torch's grouped product is a loop over the experts, expected cuda"
    if reason := _slow(torch.cuda.get_device_capability(x.device)):
        return reason
    if (dtype := groups.product_dtype(x)) != torch.bfloat16:
        return f"torch's grouped product is a loop over the experts in {dtype}, expected torch.bfloat16"
    for name, width in (("D", w_in.shape[1]), ("F", w_in.shape[2])):
        if width % ALIGNED:
            return f"{name} is {width}, expected a multiple of {ALIGNED}"
    return None


def product(rows: Tensor, weight: Tensor, starts: Tensor) -> Tensor:
    ends = starts.to(rows.device, torch.int32)
    some = torch.arange(len(rows), device=rows.device) >= ends[0]
    return F.grouped_mm(torch.where(some[:, None], rows, 0), weight, offs=ends[1:])


def run(inputs: ExpertsInputs) -> Tensor:
    return groups.run(product, inputs)
