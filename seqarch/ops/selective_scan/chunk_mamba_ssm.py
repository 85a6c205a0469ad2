"""The CUDA kernel of the package ``mamba-ssm``: within a thread block, a scan over time in chunks of 2048 tokens.

It takes no state, does not pack, and has no gradient through the last state: a backward pass that asks for one raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqarch.ops.dispatch import vendors
from seqarch.ops.native.custom_op import first_derivatives_only
from seqarch.ops.selective_scan.inputs import SelectiveScanInputs

STATES = 256
"""The most states per channel that the kernel takes."""


def unavailable() -> str | None:
    return vendors.unavailable("mamba_ssm")


def unsupported(inputs: SelectiveScanInputs) -> str | None:
    if inputs.offsets is not None:
        return "cu_seqlens is given, and mamba_ssm's scan has no states of packed sequences"
    if not inputs.scale_input:
        return "scale_input is False, and mamba_ssm's scan multiplies the input by the step size"
    if not 1 <= inputs.A.shape[1] <= STATES:
        return f"N is {inputs.A.shape[1]}, expected 1 to {STATES}"
    reason = vendors.unsupported(vendors.FLOATS, x=inputs.x, dt=inputs.dt, B=inputs.B, C=inputs.C, z=inputs.z)
    if reason is None and (inputs.state.requires_grad or bool(inputs.state.any())):
        reason = "state is given, and mamba_ssm's scan begins with zeros"
    return reason


class _NoGradient(torch.autograd.Function):
    """The last state, whose gradient the package would leave out in silence."""

    @staticmethod
    def forward(ctx: Any, last: Tensor) -> Tensor:
        return last.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise RuntimeError(
            "selective_scan: backend 'chunk_mamba_ssm' has no gradient through the last state; detach the state, or"
            " take another backend"
        )


def run(inputs: SelectiveScanInputs) -> tuple[Tensor, Tensor]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # pyright: ignore[reportMissingImports]

    dtype = inputs.state.dtype
    u, delta, gate = (None if m is None else m.transpose(1, 2) for m in (inputs.x, inputs.dt, inputs.z))  # time last
    B, C = (m.permute(0, 2, 3, 1) for m in (inputs.B, inputs.C))
    A, D, bias = (None if m is None else m.to(dtype) for m in (inputs.A, inputs.D, inputs.dt_bias))
    options = {"z": gate, "delta_bias": bias, "delta_softplus": inputs.dt_softplus, "return_last_state": True}
    y, last = selective_scan_fn(u, delta, A, B, C, D, **options)
    first_derivatives_only("selective_scan: backend 'chunk_mamba_ssm'", "choose chunk_cuda or recurrent_torch", y)
    return y.transpose(1, 2), _NoGradient.apply(last.to(dtype))
