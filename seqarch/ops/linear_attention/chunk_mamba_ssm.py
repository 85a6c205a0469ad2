"""Mamba-2's Triton kernels of the package ``mamba-ssm`` (SSD), for decays per head, or a head and step.

They compute ``h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t``. With one decay per head, dt is 1 and A the decay. With one
per step, dt is that and x is v / dt; the gradient through dt would be a difference of numbers that grow as dt falls, so
that of the decays is taken here, from what outputs met less what values met: summed backwards from step t on,
``do . o - dv . v``, and ``dS . S`` of the last state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqarch.ops.dispatch import vendors
from seqarch.ops.linear_attention.inputs import LinearAttentionInputs
from seqarch.ops.native.custom_op import first_derivatives_only

CHUNK = 256
KEYS = 256
"""The greatest key width that the kernels take."""

LEAST, MOST = 1e-12, 90.0
"""Bounds of a step: it divides; and the kernels subtract sums of steps, which lose what a larger one outweighs. Decays
beyond them are 1 and 0 in float32."""


def unavailable() -> str | None:
    return vendors.unavailable("mamba_ssm")


def unsupported(inputs: LinearAttentionInputs) -> str | None:
    q, k, v, log_decay = inputs.q, inputs.k, inputs.v, inputs.log_decay
    if inputs.offsets is not None:
        return "cu_seqlens is given, and mamba_ssm has no gradient of the states of packed sequences"
    if log_decay is not None and log_decay.ndim == 4:
        return "log_decay is one per key dimension, expected one per head, or per head and step"
    if log_decay is not None and log_decay.ndim == 3 and v.dtype == torch.float16:
        return "log_decay is one per step and v float16, which values divided by small steps outgrow"
    if not 1 <= q.shape[3] <= KEYS:
        return f"K is {q.shape[3]}, expected 1 to {KEYS}"
    return vendors.unsupported(vendors.FLOATS, v=v, q=q, k=k)


def run(inputs: LinearAttentionInputs) -> tuple[Tensor, Tensor]:
    q, k, v, log_decay, state = inputs.q * inputs.scale, inputs.k, inputs.v, inputs.log_decay, inputs.state
    if log_decay is not None and log_decay.ndim == 3:
        outputs = _Stepwise.apply(q, k, v, log_decay, state)
    else:
        rate = state.new_zeros(v.shape[2]) if log_decay is None else log_decay.to(state.dtype).clamp(min=-MOST)
        outputs = _scan(q, k, v, state.new_ones(v.shape[:3]), rate, state)
    others = "choose chunk_triton or chunk_torch"
    first_derivatives_only("linear_attention: backend 'chunk_mamba_ssm'", others, *outputs)
    return outputs


def _scan(q: Tensor, k: Tensor, x: Tensor, steps: Tensor, rate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # pyright: ignore[reportMissingImports]

    first = state.transpose(2, 3).contiguous()
    y, last = mamba_chunk_scan_combined(
        x, steps, rate, k, q, chunk_size=CHUNK, initial_states=first, return_final_states=True
    )
    return y, last.transpose(2, 3).to(state.dtype)


class _Stepwise(torch.autograd.Function):
    """One decay per head and step, with a gradient that the kernels do not have."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        steps = log_decay.detach().to(state.dtype).neg().clamp(LEAST, MOST)
        inputs = [m.detach().requires_grad_() for m in (q, k, v, state)]
        with torch.enable_grad():
            x = (inputs[2] / steps.unsqueeze(-1)).to(v.dtype)
            outputs = _scan(inputs[0], inputs[1], x, steps, -state.new_ones(v.shape[2]), inputs[3])
        ctx.inputs, ctx.outputs, ctx.dtype = inputs, outputs, log_decay.dtype
        o, last = outputs
        return o.detach(), last.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (o, last), (do, dlast), v = ctx.outputs, gradients, ctx.inputs[2]
        dq, dk, dv, dstate = torch.autograd.grad(ctx.outputs, ctx.inputs, gradients)
        wide = last.dtype
        met = (do.to(wide) * o.detach().to(wide)).sum(-1) - (dv.to(wide) * v.detach().to(wide)).sum(-1)
        met[:, -1] += (dlast * last.detach()).sum((2, 3))
        return dq, dk, dv, met.flip(1).cumsum(1).flip(1).to(ctx.dtype), dstate
