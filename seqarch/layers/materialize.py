"""The T x T matrices that a mixer applies to its values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seqarch import ops
from seqarch.layers.mixer import Mixer
from seqarch.ops import OPS, Call

VALUES = {
    "attention": "v",
    "block_sparse_attention": "v",
    "delta_rule": "v",
    "linear_attention": "v",
    "log_linear_attention": "v",
    "path_attention": "v",
    "selective_scan": "x",
    "stick_breaking_attention": "v",
}
"""Operations that are linear in one of their inputs, the values, once the others are given: its name."""


class Materialized(NamedTuple):
    """One call of an operation, as a map of its values.

    Attributes:
        op: the operation.
        matrix: ``[B, H, T, T]``: row t holds the weights of the values in output t. ``H`` are channels in
            ``selective_scan``.
        values: ``[B, T, H, V]`` (``[B, T, D]`` in ``selective_scan``).
        output: of the same shape: ``matrix @ values``, head by head.
    """

    op: str
    matrix: Tensor
    values: Tensor
    output: Tensor


def materialize(mixer: Mixer, x: Tensor, *, gradients: bool = False) -> list[Materialized]:
    """The matrices by which a mixer turns values into outputs, given an input ``x: [B, T, D]``.

    Attention, the selective scan, linear attention, the delta rule and the log-linear forms of both are all linear in
    their values, with weights that depend on the rest of the input (Dao and Gu 2024, "Transformers are SSMs", section
    3). One entry for each call of such an operation, in order; short convolutions, norms and gates are outside. Work
    and memory grow as ``T^2`` times the operation's own: for tests, for pictures and for matching one mixer's matrices
    to another's, at small T.

    Args:
        gradients: whether gradients flow from the matrices to x and the mixer's parameters.

    Raises:
        ValueError: the mixer calls no such operation.
    """
    with torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
        with ops.record_calls() as calls:
            mixer(x)
        found = [_materialize(call) for call in calls if call.op in VALUES]
    if not found:
        used = ", ".join(dict.fromkeys(call.op for call in calls)) or "none"
        raise ValueError(
            f"materialize: {type(mixer).__name__} calls no operation that is linear in its values: expected one of"
            f" {', '.join(VALUES)}, it calls {used}"
        )
    return found


def _materialize(call: Call) -> Materialized:
    values = getattr(call.inputs, VALUES[call.op])
    output = call.result if isinstance(call.result, Tensor) else call.result[0]
    if call.op == "selective_scan":
        return Materialized(call.op, _scan_matrix(call), values, output)
    length, heads = values.shape[1:3]
    units = torch.eye(length, dtype=values.dtype, device=values.device)
    units = units[None, :, None].expand(len(values), -1, heads, -1)
    return Materialized(call.op, _again(call, units).permute(0, 2, 1, 3), values, output)


def _scan_matrix(call: Call) -> Tensor:
    """One call per token s, whose values are 1 at s and 0 elsewhere: column s of every channel's matrix."""
    values = call.inputs.x
    matrix = values.new_empty(*values.shape, values.shape[1])
    for s in range(values.shape[1]):
        unit = torch.zeros_like(values)
        unit[:, s] = 1
        matrix[..., s] = _again(call, unit)
    return matrix.transpose(1, 2)


def _again(call: Call, values: Tensor) -> Tensor:
    """The outputs of the call with other values, from an empty state."""
    inputs = call.inputs.replace(**{VALUES[call.op]: values})
    if (state := getattr(inputs, "state", None)) is not None:
        width = state.shape[-1] if call.op == "selective_scan" else values.shape[-1]
        inputs = inputs.replace(state=state.new_zeros(*state.shape[:-1], width))
    result = OPS[call.op]("auto", inputs)
    return result if isinstance(result, Tensor) else result[0]
