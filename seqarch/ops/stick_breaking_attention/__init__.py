r"""Stick-breaking attention: each key, from the last on, takes its share of what the later ones left.

.. math::
    A_{ij} = \sigma(z_{ij}) \prod_{j < l < i} (1 - \sigma(z_{il})), \qquad z_{ij} = \mathrm{scale} \cdot q_i k_j, \qquad
    o_i = \sum_{j < i} A_{ij} v_j

and what is left of the stick, ``r_i = prod_{j < i} (1 - sigma(z_ij)) = 1 - sum_j A_ij`` (Tan et al. 2024, "Scaling
Stick-Breaking Attention", section 3). A query does not see its own key. There are no positions: of two keys with equal
scores the later one counts more.

Work is ``O(T^2 (K + V))``; the compiled kernel leaves out keys before which nothing is left, ``chunk_torch`` holds the
scores of 128 queries and all keys at a time. Scores of any size are right; inputs are expected to be finite.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from seqarch.ops.dispatch import checks
from seqarch.ops.dispatch.op import Op
from seqarch.ops.stick_breaking_attention import chunk_cpp, chunk_torch, recurrent_torch
from seqarch.ops.stick_breaking_attention.inputs import StickBreakingInputs

NAME = "stick_breaking_attention"

OP = Op(NAME, order=(chunk_cpp, chunk_torch, recurrent_torch), reference=recurrent_torch)


@OP.public
def stick_breaking_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    key_start: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Stick-breaking attention of the queries over the keys before their own.

    Args:
        q, k, v: ``[B, Tq, H, K]``, ``[B, Tk, G, K]`` and ``[B, Tk, G, V]``; query head h uses head ``h // (H / G)``.
            The last query is at the last key.
        scale: defaults to ``K ** -0.5``.
        cu_seqlens: boundaries of the sequences packed into ``B = 1``, from 0 to T; needs Tq = Tk.
        key_start: ``[B]``, the first key of each row that is not padding: for rows of different lengths that end
            together, as in a cache.
        backend: a name, or ``"auto"``.

    Returns:
        o ``[B, Tq, H, V]`` in v's dtype, and what is left of the stick, ``[B, Tq, H]``, float32 or float64.

    Raises:
        ValueError: shapes disagree, heads do not divide, offsets are wrong, or no backend has that name.
        TypeError: an input is not floating point, or ``key_start`` not an integer.
        BackendError: the named backend cannot serve the call.
    """
    checks.floating_on_one_device(NAME, q=q, k=k, v=v)
    shapes = {"q": (q, "B Tq H K"), "k": (k, "B Tk G K"), "v": (v, "B Tk G V"), "key_start": (key_start, "B")}
    sizes = checks.match_shapes(NAME, **shapes)
    checks.divides(NAME, sizes["G"], "the heads of k and v", sizes["H"], "the heads of q")
    if cu_seqlens is not None and sizes["Tq"] != sizes["Tk"]:
        raise ValueError(f"{NAME}: cu_seqlens packs queries and keys alike, got {sizes['Tq']} and {sizes['Tk']}")
    if sizes["Tq"] > sizes["Tk"]:
        raise ValueError(f"{NAME}: there are {sizes['Tq']} queries and {sizes['Tk']} keys, expected no more than keys")
    checks.key_start(NAME, key_start, cu_seqlens is not None, q.device)
    offsets = checks.sequence_offsets(NAME, cu_seqlens, sizes["B"], sizes["Tq"])
    scale = checks.finite_scale(NAME, scale, sizes["K"])
    return OP(backend, StickBreakingInputs(q, k, v, scale, offsets, key_start))


def flops(query_length: int, key_length: int, heads: int, key_width: int, value_width: int, batch_size: int = 1) -> int:
    """FLOPs over the pairs of a query and a key before its own: ``2 K`` for a score and ``2 V`` to read, a head."""
    before = key_length - query_length
    pairs = key_length * (key_length - 1) // 2 - before * (before - 1) // 2
    return 2 * batch_size * pairs * heads * (key_width + value_width)
