r"""Routed experts: each token goes through its own k of E small MLPs.

.. math::
    y = \sum_{j=1}^{k} \mathrm{weight}_j\,
        \big(\mathrm{act}(x W^{\mathrm{gate}}_{e_j}) \cdot (x W^{\mathrm{in}}_{e_j})\big) W^{\mathrm{out}}_{e_j}

or ``act(x W_in) W_out`` without a gate. Shazeer et al. 2017, "Outrageously Large Neural Networks", eq. 1, with every
token kept, as in Gale et al. 2022, "MegaBlocks", section 4; the gated form: Shazeer 2020, "GLU Variants", section 2.

The index -1 names no expert: such a choice, one dropped by the caller, costs and adds nothing. Work is ``O(k D F)`` per
token, whatever E. An expert without tokens costs nothing and gets a zero gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.dispatch import checks
from seqarch.ops.dispatch.op import Op
from seqarch.ops.experts import chunk_torch, grouped_mm, grouped_torch, grouped_triton, parallel_torch
from seqarch.ops.experts.activations import ACTIVATIONS
from seqarch.ops.experts.inputs import ExpertsInputs

NAME = "experts"


OP = Op(
    NAME,
    order=(grouped_mm, grouped_triton, chunk_torch, grouped_torch, parallel_torch),
    reference=parallel_torch,
    autocast=True,
)


@OP.public
def experts(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    *,
    w_gate: Tensor | None = None,
    activation: str = "silu",
    backend: str = "auto",
) -> Tensor:
    """The weighted sum of each token's k experts.

    Args:
        x: ``[B, T, D]`` or ``[N, D]``.
        w_in, w_gate: ``[E, D, F]``; without ``w_gate`` the experts are plain MLPs.
        w_out: ``[E, F, D]``.
        expert_index: ``[B, T, k]`` or ``[N, k]`` int64, from 0 to E - 1, or -1 for no expert; an expert named
            twice counts twice.
        expert_weight: of the same shape, floating point.
        activation: ``"silu"``, ``"gelu"`` (exact), ``"gelu_tanh"``, ``"relu"`` or ``"squared_relu"``.
        backend: a name, or ``"auto"``.

    Returns:
        y in x's shape and dtype; gradients flow to x, the three weights and ``expert_weight``.

    Raises:
        ValueError: shapes disagree, an index is out of range, or no activation or backend has that name.
        TypeError: ``expert_index`` is not int64, or another input not floating point.
        BackendError: the named backend cannot serve the call.
    """
    checks.floating_on_one_device(NAME, x=x, w_in=w_in, w_out=w_out, expert_weight=expert_weight, w_gate=w_gate)
    tokens = "B T" if x.ndim == 3 else "N"
    checks.match_shapes(
        NAME,
        x=(x, f"{tokens} D"),
        w_in=(w_in, "E D F"),
        w_gate=(w_gate, "E D F"),
        w_out=(w_out, "E F D"),
        expert_index=(expert_index, f"{tokens} k"),
        expert_weight=(expert_weight, f"{tokens} k"),
    )
    if activation not in ACTIVATIONS:
        raise checks.unknown_name("activation", activation, ACTIVATIONS)
    checks.dense(NAME, "expert_index", expert_index)
    if expert_index.dtype != torch.int64:
        raise TypeError(f"{NAME}: expert_index has dtype {expert_index.dtype}, expected torch.int64")
    if expert_index.device != x.device:
        raise ValueError(f"{NAME}: expert_index is on {expert_index.device}, expected {x.device} as x")
    return OP(backend, ExpertsInputs(x, w_in, w_out, expert_index, expert_weight, w_gate, activation))


def flops(tokens: int, top_k: int, d_model: int, hidden: int, gated: bool = True) -> int:
    """FLOPs of the chosen experts: ``2 D F`` per product, three products when gated and two when not."""
    return 2 * (3 if gated else 2) * d_model * hidden * top_k * tokens
