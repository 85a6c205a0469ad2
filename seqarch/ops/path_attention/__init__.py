r"""Path attention (PaTH): softmax attention whose keys are multiplied by a Householder-like matrix with every token.

.. math::
    o_t = \sum_{j \le t} \mathrm{softmax}_j\big(\mathrm{scale} \cdot q_t^\top H_t H_{t-1} \cdots H_{j+1} k_j + b_j\big)
    \, v_j, \qquad H_l = I - \beta_l w_l w_l^\top

(Yang et al. 2025, "PaTH Attention: Position Encoding via Accumulating Householder Transformations", section 2). With w
of unit norm and beta from 0 to 2, no H makes a key longer; with beta = 2 it is a reflection. A key bias that is minus
the sum of log forget gates up to each token gives PaTH-FoX (section 3.3), as in ``attention``.

A later call on the same sequences takes the keys that this one returns, multiplied up to the last token, and the
factors of its own tokens alone. Work is ``O(T^2 (K + V))``, in memory for 128 queries and all keys at a time. Inputs
are expected to be finite.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from seqarch.ops.dispatch import checks
from seqarch.ops.dispatch.op import Op
from seqarch.ops.path_attention import chunk_torch, recurrent_torch
from seqarch.ops.path_attention.inputs import PathAttentionInputs

NAME = "path_attention"

OP = Op(
    NAME,
    order=(chunk_torch, recurrent_torch),
    reference=recurrent_torch,
    step_order=(recurrent_torch, chunk_torch),
)


@OP.public
def path_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    *,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    key_start: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention of the queries over the keys up to their own, by the products of ``I - beta w^T w`` between.

    Args:
        q, k, v: ``[B, Tq, H, K]``, ``[B, Tk, G, K]`` and ``[B, Tk, G, V]``; query head h uses head ``h // (H / G)``.
            The last query is at the last key. Keys before the first query are as an earlier call returned them.
        w: ``[B, Tq, G, K]``, of the queries' tokens.
        beta: ``[B, Tq, G]``.
        key_bias: ``[B, Tk, H]``, added to the scores of each key.
        scale: defaults to ``K ** -0.5``.
        cu_seqlens: boundaries of the sequences packed into ``B = 1``, from 0 to T; needs Tq = Tk.
        key_start: ``[B]``, the first key of each row that is not padding: for rows of different lengths that end
            together, as in a cache.
        backend: a name, or ``"auto"``.

    Returns:
        o ``[B, Tq, H, V]`` in v's dtype, 0 where a query sees no key, and the keys ``[B, Tk, G, K]`` in k's dtype, each
        multiplied up to the last token: ``H_T ... H_{j+1} k_j``.

    Raises:
        ValueError: shapes disagree, heads do not divide, offsets are wrong, or no backend has that name.
        TypeError: an input is not floating point, or ``key_start`` not an integer.
        BackendError: the named backend cannot serve the call.
    """
    checks.floating_on_one_device(NAME, q=q, k=k, v=v, w=w, beta=beta, key_bias=key_bias)
    shapes = {"q": (q, "B Tq H K"), "k": (k, "B Tk G K"), "v": (v, "B Tk G V"), "w": (w, "B Tq G K")}
    further = {"beta": (beta, "B Tq G"), "key_bias": (key_bias, "B Tk H"), "key_start": (key_start, "B")}
    sizes = checks.match_shapes(NAME, **shapes, **further)
    checks.divides(NAME, sizes["G"], "the heads of k and v", sizes["H"], "the heads of q")
    if cu_seqlens is not None and sizes["Tq"] != sizes["Tk"]:
        raise ValueError(f"{NAME}: cu_seqlens packs queries and keys alike, got {sizes['Tq']} and {sizes['Tk']}")
    if sizes["Tq"] > sizes["Tk"]:
        raise ValueError(f"{NAME}: there are {sizes['Tq']} queries and {sizes['Tk']} keys, expected no more than keys")
    checks.key_start(NAME, key_start, cu_seqlens is not None, q.device)
    offsets = checks.sequence_offsets(NAME, cu_seqlens, sizes["B"], sizes["Tq"])
    scale = checks.finite_scale(NAME, scale, sizes["K"])
    return OP(backend, PathAttentionInputs(q, k, v, w, beta, key_bias, scale, offsets, key_start))


def flops(
    query_length: int,
    key_length: int,
    heads: int,
    key_heads: int,
    key_width: int,
    value_width: int,
    batch_size: int = 1,
) -> int:
    """FLOPs: ``4 K`` to multiply each earlier key, a head of keys, ``2 (K + V)`` to read each key up to one's own, a
    head of queries."""
    before = key_length - query_length
    earlier = key_length * (key_length - 1) // 2 - before * (before - 1) // 2
    pairs = earlier + query_length
    return batch_size * (4 * earlier * key_heads * key_width + 2 * pairs * heads * (key_width + value_width))
