r"""The selective scan of a diagonal state-space model.

.. math::
    h_t = \exp(\Delta_t A) \odot h_{t-1} + \Delta_t B_t x_t, \qquad y_t = (C_t h_t + D x_t) \cdot \mathrm{silu}(z_t)

with a step size a channel, ``Delta_t = softplus(dt_t + dt_bias)`` or dt as given (Gu and Dao 2023, "Mamba", algorithm 2
and section 3.2; the input is discretised by the Euler rule as in the reference release, not by zero-order hold).
Without the factor Delta on the input (``scale_input=False``) and with N = 1 it is any elementwise gated recurrence
``h_t = f_t h_{t-1} + i_t`` (RG-LRU, HGRN, minGRU): ``A = -1``, ``B = C = 1``, ``dt = -log f`` and ``x = i``.

Work is ``O(T D N)``. ``Delta_t A`` from 0 to -inf is right.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from seqarch.ops.dispatch import checks
from seqarch.ops.dispatch.op import Op
from seqarch.ops.selective_scan import chunk_cpp, chunk_cuda, chunk_mamba_ssm, chunk_torch, recurrent_torch
from seqarch.ops.selective_scan.inputs import SelectiveScanInputs

NAME = "selective_scan"


OP = Op(
    NAME,
    order=(chunk_cpp, chunk_cuda, chunk_torch, recurrent_torch),
    reference=recurrent_torch,
    step_order=(chunk_cpp, chunk_cuda, recurrent_torch, chunk_torch),
    opt_in=(chunk_mamba_ssm,),
)


@OP.public
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    scale_input: bool = True,
    state: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The selective scan: ``h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t``, ``y_t = (C_t h_t + D x_t) silu(z_t)``.

    Args:
        x: ``[B, T, D]``.
        dt: step sizes ``[B, T, D]``, at least 0 after ``dt_bias`` and ``dt_softplus``.
        A: ``[D, N]``, at most 0.
        B, C: ``[B, T, N]``, or ``[B, T, G, N]`` where group g serves channels ``g D / G`` on.
        D: ``[D]``, weight of the input in the output; ``None`` leaves it out.
        z: gate ``[B, T, D]``, applied as ``silu(z)``; ``None`` for no gate.
        dt_bias: ``[D]``, added to dt.
        dt_softplus: whether the step size is ``softplus(dt + dt_bias)``.
        scale_input: whether x is multiplied by the step size as it enters the state.
        state: ``[B, D, N]`` before the first token (one row per sequence under ``cu_seqlens``); zeros if ``None``.
        cu_seqlens: boundaries of the sequences packed into ``B = 1``, from 0 to T.
        backend: a name, or ``"auto"``.

    Returns:
        y ``[B, T, D]`` in x's dtype and the last state, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes disagree, groups do not divide, offsets are wrong, or no backend has that name.
        TypeError: an input is not floating point.
        BackendError: the named backend cannot serve the call.
    """
    checks.floating_on_one_device(NAME, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, state=state)
    B, C = (m.unsqueeze(2) if m.ndim == 3 else m for m in (B, C))
    sizes = checks.match_shapes(
        NAME,
        x=(x, "B T D"),
        dt=(dt, "B T D"),
        A=(A, "D N"),
        B=(B, "B T G N"),
        C=(C, "B T G N"),
        D=(D, "D"),
        z=(z, "B T D"),
        dt_bias=(dt_bias, "D"),
    )
    checks.divides(NAME, sizes["G"], "the groups of B and C", sizes["D"], "the channels")
    offsets = checks.sequence_offsets(NAME, cu_seqlens, sizes["B"], sizes["T"])
    rows = sizes["B"] if offsets is None else len(offsets) - 1
    dtype = checks.accumulation_dtype(x, dt, A, B, C, D, z, dt_bias, state)
    state = checks.initial_state(NAME, state, (rows, sizes["D"], sizes["N"]), dtype, x.device)
    return OP(backend, SelectiveScanInputs(x, dt, A, B, C, D, z, dt_bias, dt_softplus, scale_input, state, offsets))


def flops(length: int, channels: int, state_width: int, batch_size: int = 1) -> int:
    """FLOPs of the recurrence: ``2 N`` to write and ``2 N`` to read, a channel and token."""
    return 4 * batch_size * length * channels * state_width
