r"""The delta rule: linear attention that overwrites what a key held before.

.. math::
    P = \mathrm{decay}_t \cdot S_{t-1}, \qquad S_t = P + \beta_t k_t^\top (v_t - k_t P), \qquad
    o_t = \mathrm{scale} \cdot q_t S_t

and with what is read, erased and written given apart

.. math::
    S_t = P + \beta_t \big(k_t^\top v_t - \mathrm{erase}_t^\top (\mathrm{read}_t P)\big)

Without decay: DeltaNet (Schlag et al. 2021, "Linear Transformers Are Secretly Fast Weight Programmers", eq. 24; Yang
et al. 2024, "Parallelizing Linear Transformers with the Delta Rule", section 2.2). One decay per head and step: Gated
DeltaNet (Yang et al. 2024, "Gated Delta Networks", eq. 10). One per key dimension: Kimi delta attention (Zhang et al.
2025, "Kimi Linear", eq. 1). With a vector ``read`` of its own: Gated DeltaNet-2 (Hatamizadeh et al. 2026, "Gated
DeltaNet-2"). With ``erase`` as well: RWKV-7 (Peng et al. 2025, "RWKV-7 Goose", eq. 17), whose correction reads the
state before its decay, so that its ``read`` is divided by the decay.

With keys of unit norm the eigenvalue of a step along k_t is ``1 - beta_t``: beta in (0, 1) forgets, beta in (1, 2)
makes it negative (Grazzi et al. 2024), beyond 2 the state grows.

Work is ``O(T K V)`` per head, ``O(T C (K + V + C))`` more in chunks of C tokens. Any log decay from 0 to -inf is right.
All other inputs are expected to be finite: a NaN or an infinity reaches later outputs and may reach earlier ones of its
chunk (none in ``recurrent_torch``), but never another row, head or packed sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from seqarch.ops.chunked.recurrence import prepare_recurrence
from seqarch.ops.delta_rule import chunk_cpp, chunk_torch, chunk_triton, recurrent_torch, recurrent_triton
from seqarch.ops.delta_rule.inputs import DeltaRuleInputs
from seqarch.ops.dispatch.op import Op

NAME = "delta_rule"


OP = Op(
    NAME,
    order=(chunk_cpp, chunk_triton, recurrent_triton, chunk_torch, recurrent_torch),
    reference=recurrent_torch,
    step_order=(chunk_cpp, recurrent_triton, recurrent_torch, chunk_torch),
)


@OP.public
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    log_decay: Tensor | None = None,
    *,
    read: Tensor | None = None,
    erase: Tensor | None = None,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``P = exp(log_decay_t) S_{t-1}``, ``S_t = P + beta_t (k_t^T v_t - erase_t^T (read_t P))``, ``o_t = q_t S_t``.

    Args:
        q, k: ``[B, T, G, K]``; head h of v uses head ``h // (H / G)``. Keys are expected to have unit norm.
        v: ``[B, T, H, V]``, H a multiple of G.
        beta: ``[B, T, H]``, in (0, 2): how much of the old value is replaced; ones if ``None``.
        log_decay: natural logarithms, at most 0: ``None``, ``[H]``, ``[B, T, H]`` or ``[B, T, H, K]``.
        read, erase: ``[B, T, G, K]``, what reads the old value and where it is removed; k if ``None``.
        scale: defaults to ``K ** -0.5``.
        state: ``[B, H, K, V]`` before the first token (one row per sequence under ``cu_seqlens``); zeros if ``None``.
        cu_seqlens: boundaries of the sequences packed into ``B = 1``, from 0 to T.
        backend: a name, or ``"auto"``.

    Returns:
        o ``[B, T, H, V]`` in v's dtype and the last state, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes disagree, heads do not divide, offsets are wrong, or no backend has that name.
        TypeError: an input is not floating point.
        BackendError: the named backend cannot serve the call.
    """
    scale, state, offsets = prepare_recurrence(
        NAME, q, k, v, log_decay, scale, state, cu_seqlens, beta, read=read, erase=erase
    )
    beta = v.new_ones(v.shape[:3]) if beta is None else beta
    read, erase = None if read is k else read, None if erase is k else erase
    return OP(backend, DeltaRuleInputs(q, k, v, beta, log_decay, read, erase, scale, state, offsets))


def flops(
    length: int, heads: int, key_width: int, value_width: int, batch_size: int = 1, erase_apart: bool = False
) -> int:
    """FLOPs of the recurrence: ``2 K V`` each to recall, to write, to erase where that is apart, and to read, a head
    and token."""
    return (8 if erase_apart else 6) * batch_size * length * heads * key_width * value_width
