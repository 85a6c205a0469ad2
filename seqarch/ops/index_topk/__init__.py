r"""The tokens that the lightning indexer of DeepSeek sparse attention chooses for each query.

.. math::
    I_{ts} = \sum_h w_{th} \,\mathrm{relu}(q_{th} \cdot k_s), \qquad
    \mathrm{index}_t = \text{the } n \text{ tokens } s \le t \text{ of the largest } I_{ts}

DeepSeek-AI 2025, "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models", section 2.1. The indexer has few
narrow heads and one key per token; scales are part of the weights. The largest score comes first, of equal ones that of
the earlier token, so that a step chooses as the whole sequence did. A query that sees fewer tokens lists -1 after them.

The last query is the last token: of Tq queries and Tk keys, query i has position ``i + Tk - Tq``. Tokens count from
each sequence's own first one. Scores are computed in float32 (float64 for float64 inputs) whatever the inputs' dtype.
A choice has no gradient.

Inputs are expected to be finite. What is not, in a query or a key, changes the lists of the queries that see it alone.

Work is ``O(Tq Tk H K)``, and no tensor holds the scores of all pairs of queries and keys.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from seqarch.ops.dispatch import checks
from seqarch.ops.dispatch.op import Op
from seqarch.ops.index_topk import chunk_torch, recurrent_torch
from seqarch.ops.index_topk.inputs import IndexTopKInputs

NAME = "index_topk"


OP = Op(NAME, order=(chunk_torch, recurrent_torch), reference=recurrent_torch)


@OP.public
def index_topk(
    q: Tensor,
    k: Tensor,
    weight: Tensor,
    top_k: int,
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    key_start: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The ``top_k`` tokens up to each query's own that the lightning indexer scores highest.

    Args:
        q: the indexer's queries, ``[B, Tq, H, K]``.
        k: its keys, ``[B, Tk, K]``.
        weight: w, of each query's heads, ``[B, Tq, H]``, scales included.
        top_k: tokens to choose.
        cu_seqlens: boundaries of the sequences packed into ``B = 1``, from 0 to T; needs Tq = Tk.
        key_start: ``[B]``, the first token of each row that is not padding: for rows of different lengths that end
            together, as in a cache. Tokens count from it. Below 0 it counts as 0, past Tk it hides the whole row.
        backend: a name, or ``"auto"``.

    Returns:
        index ``[B, Tq, min(top_k, Tk)]``, int64: what :func:`seqarch.ops.block_sparse_attention` takes as blocks of one
        token.

    Raises:
        ValueError: shapes disagree, offsets are wrong, ``top_k`` is below 1, or no backend has that name.
        TypeError: an input is not floating point, or ``key_start`` of the wrong dtype.
        BackendError: the named backend cannot serve the call.
    """
    checks.floating_on_one_device(NAME, q=q, k=k, weight=weight)
    sizes = checks.match_shapes(
        NAME, q=(q, "B Tq H K"), k=(k, "B Tk K"), weight=(weight, "B Tq H"), key_start=(key_start, "B")
    )
    if top_k < 1:
        raise ValueError(f"{NAME}: top_k counts tokens, expected a whole number of at least 1, got {top_k!r}")
    if cu_seqlens is not None and sizes["Tq"] != sizes["Tk"]:
        raise ValueError(f"{NAME}: cu_seqlens packs queries and keys alike, got {sizes['Tq']} and {sizes['Tk']}")
    checks.key_start(NAME, key_start, cu_seqlens is not None, q.device)
    offsets = checks.sequence_offsets(NAME, cu_seqlens, sizes["B"], sizes["Tq"])
    key_start = None if key_start is None else key_start.clamp(0, sizes["Tk"])
    return OP(backend, IndexTopKInputs(q, k, weight, min(top_k, sizes["Tk"]), offsets, key_start))


def flops(queries: int, keys: int, heads: int, width: int, batch_size: int = 1) -> int:
    """FLOPs of the scores of queries, the last of which is the last token: ``2 H (K + 1)`` per visible pair."""
    seeing = min(queries, keys)
    pairs = seeing * (keys - seeing) + seeing * (seeing + 1) // 2
    return 2 * batch_size * pairs * heads * (width + 1)
