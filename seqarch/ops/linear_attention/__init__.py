r"""Linear attention with any diagonal decay.

.. math::
    S_t = \mathrm{decay}_t \cdot S_{t-1} + k_t^\top v_t, \qquad o_t = \mathrm{scale} \cdot q_t S_t

with ``decay_t = exp(log_decay_t)``: none (Katharopoulos et al. 2020, "Transformers are RNNs", eq. 16-20), one per head
(Sun et al. 2023, "Retentive Network", eq. 6), one per head and step (Dao and Gu 2024, "Transformers are SSMs", section
6: q = C, k = B, v = dt x), one per key dimension and step (Yang et al. 2023, "Gated Linear Attention", eq. 3).

Work is ``O(T K V)`` per head, ``O(T C (K + V))`` more in chunks of C tokens. Any log decay from 0 to -inf is right.
All other inputs are expected to be finite: a NaN or an infinity reaches later outputs and may reach earlier ones of its
chunk (none in ``recurrent_torch``), but never another row, head or packed sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from seqarch.ops.chunked.recurrence import prepare_recurrence
from seqarch.ops.dispatch.op import Op
from seqarch.ops.linear_attention import (
    chunk_cpp,
    chunk_mamba_ssm,
    chunk_torch,
    chunk_triton,
    recurrent_torch,
    recurrent_triton,
)
from seqarch.ops.linear_attention.inputs import LinearAttentionInputs

NAME = "linear_attention"


OP = Op(
    NAME,
    order=(chunk_cpp, chunk_triton, recurrent_triton, chunk_torch, recurrent_torch),
    reference=recurrent_torch,
    step_order=(chunk_cpp, recurrent_triton, recurrent_torch, chunk_torch),
    opt_in=(chunk_mamba_ssm,),
)


@OP.public
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Linear attention: ``S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t``, ``o_t = scale q_t S_t``.

    Args:
        q, k: ``[B, T, G, K]``; head h of v uses head ``h // (H / G)``.
        v: ``[B, T, H, V]``, H a multiple of G.
        log_decay: natural logarithms, at most 0: ``None``, ``[H]``, ``[B, T, H]`` or ``[B, T, H, K]``.
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
    scale, state, offsets = prepare_recurrence(NAME, q, k, v, log_decay, scale, state, cu_seqlens)
    return OP(backend, LinearAttentionInputs(q, k, v, log_decay, scale, state, offsets))


def flops(length: int, heads: int, key_width: int, value_width: int, batch_size: int = 1) -> int:
    """FLOPs of the recurrence: ``2 K V`` to write and ``2 K V`` to read, a head and token."""
    return 4 * batch_size * length * heads * key_width * value_width
