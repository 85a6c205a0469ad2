r"""Routed experts: each token goes through its own k of E small MLPs.

.. math::
    y = \sum_{j=1}^{k} \mathrm{weight}_j\,
        \big(\mathrm{act}(x W^{\mathrm{gate}}_{e_j}) \cdot (x W^{\mathrm{in}}_{e_j})\big) W^{\mathrm{out}}_{e_j}

or ``act(x W_in) W_out`` without a gate, each product with a bias where one is given. Shazeer et al. 2017,
"Outrageously Large Neural Networks", eq. 1, with every token kept, as in Gale et al. 2022, "MegaBlocks", section 4; the
gated form: Shazeer 2020, "GLU Variants", section 2.

With ``limit`` c the gates are bounded from above by c and the values, ``x W_in``, by -c and c, before the activation,
and ``value_offset`` is added to the values: with 7, 1 and ``"quick_gelu"`` GPT-OSS's experts (OpenAI 2025,
"gpt-oss-120b & gpt-oss-20b Model Card", section 2.2).

The index -1 names no expert: such a choice, one dropped by the caller, costs and adds nothing. Work is ``O(k D F)`` per
token, whatever E. An expert without tokens costs nothing and gets a zero gradient.
"""

from __future__ import annotations

import math

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
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    b_gate: Tensor | None = None,
    limit: float | None = None,
    value_offset: float = 0.0,
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
        activation: ``"silu"``, ``"gelu"`` (exact), ``"gelu_tanh"``, ``"quick_gelu"``, ``"relu"`` or ``"squared_relu"``.
        b_in, b_gate: biases ``[E, F]``; ``b_gate`` needs ``w_gate``.
        b_out: biases ``[E, D]``.
        limit: bounds gates and values; ``None`` for no bound. Needs ``w_gate``.
        value_offset: added to the values before they are gated. Needs ``w_gate``.
        backend: a name, or ``"auto"``.

    Returns:
        y in x's shape and dtype; gradients flow to x, the weights, the biases and ``expert_weight``; none to
        gates and values beyond ``limit``.

    Raises:
        ValueError: shapes disagree, an index is out of range, ``limit`` is not positive, an option of gates is given
            without ``w_gate``, or no activation or backend has that name.
        TypeError: ``expert_index`` is not int64, or another input not floating point.
        BackendError: the named backend cannot serve the call.
    """
    floating = {"w_in": w_in, "w_out": w_out, "w_gate": w_gate, "b_in": b_in, "b_out": b_out, "b_gate": b_gate}
    checks.floating_on_one_device(NAME, x=x, expert_weight=expert_weight, **floating)
    tokens = "B T" if x.ndim == 3 else "N"
    choices = {"expert_index": (expert_index, f"{tokens} k"), "expert_weight": (expert_weight, f"{tokens} k")}
    maps = {"w_in": (w_in, "E D F"), "w_gate": (w_gate, "E D F"), "w_out": (w_out, "E F D")}
    biases = {"b_in": (b_in, "E F"), "b_gate": (b_gate, "E F"), "b_out": (b_out, "E D")}
    checks.match_shapes(NAME, x=(x, f"{tokens} D"), **maps, **choices, **biases)
    _check_gates(w_gate is not None, b_gate, limit, value_offset)
    if activation not in ACTIVATIONS:
        raise checks.unknown_name("activation", activation, ACTIVATIONS)
    _check_index(expert_index, x)
    options = activation, b_in, b_out, b_gate, float(limit or 0), float(value_offset)
    return OP(backend, ExpertsInputs(x, w_in, w_out, expert_index, expert_weight, w_gate, *options))


def _check_index(expert_index: Tensor, x: Tensor) -> None:
    checks.dense(NAME, "expert_index", expert_index)
    if expert_index.dtype != torch.int64:
        raise TypeError(f"{NAME}: expert_index has dtype {expert_index.dtype}, expected torch.int64")
    if expert_index.device != x.device:
        raise ValueError(f"{NAME}: expert_index is on {expert_index.device}, expected {x.device} as x")


def _check_gates(gated: bool, b_gate: Tensor | None, limit: float | None, value_offset: float) -> None:
    """Raise where an option of gates is out of range, or given without them."""
    if limit is not None and not 0 < limit < math.inf:
        raise ValueError(f"{NAME}: limit is {limit!r}, expected a positive number or None")
    if not math.isfinite(value_offset):
        raise ValueError(f"{NAME}: value_offset is {value_offset!r}, expected a finite number")
    options = {"b_gate": b_gate is not None, "limit": limit is not None, "value_offset": value_offset != 0}
    given = [name for name, is_given in options.items() if is_given]
    if given and not gated:
        raise ValueError(f"{NAME}: {given[0]} is an option of gated experts, expected w_gate with it, got None")


def flops(tokens: int, top_k: int, d_model: int, hidden: int, gated: bool = True) -> int:
    """FLOPs of the chosen experts: ``2 D F`` per product, three products when gated and two when not."""
    return 2 * (3 if gated else 2) * d_model * hidden * top_k * tokens
