r"""The loss of the lightning indexer of DeepSeek sparse attention: its divergence from the attention's own weights.

.. math::
    \mathrm{loss} = \sum_t \mathrm{KL}\big(p_t \,\|\, \mathrm{softmax}_{s \in S_t} I_{ts}\big), \qquad
    I_{ts} = \sum_j w_{tj} \,\mathrm{relu}(q^I_{tj} \cdot k^I_s), \qquad
    p_t = \frac{1}{H} \sum_h \mathrm{softmax}_{s \in S_t}(\mathrm{scale}\; q_{th} \cdot k_s)

DeepSeek-AI 2025, "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models", section 2.1.1. ``S_t`` are the
tokens that query t chose (the paper's sparse stage, with the lists of :func:`seqarch.ops.index_topk`), or all up to its
own (its dense warm-up). The loss teaches the indexer alone: q and k, the attention's queries and keys, get no gradient.

The last query is the last token: of Tq queries and Tk keys, query i has position ``i + Tk - Tq``. Tokens count from
each sequence's own first one; a token listed twice counts once, -1 is none, and what lies after the query is not seen.
A query that sees no token adds 0. All is computed in float32 (float64 for float64 inputs), whatever the inputs' dtype.

Inputs are expected to be finite. What is not makes the loss of its own row or packed sequence so, and of no other.

Work is ``O(Tq Tk (Hi Ki + H K))`` for lists of any length, which beats gathering what they list until Tk is some twenty
times as long; no tensor holds all pairs of queries and keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqarch.ops.dispatch import checks
from seqarch.ops.dispatch.op import Op
from seqarch.ops.indexer_loss import chunk_torch, recurrent_torch
from seqarch.ops.indexer_loss.inputs import IndexerLossInputs

NAME = "indexer_loss"


OP = Op(NAME, order=(chunk_torch, recurrent_torch), reference=recurrent_torch)


@OP.public
def indexer_loss(
    index_q: Tensor,
    index_k: Tensor,
    weight: Tensor,
    q: Tensor,
    k: Tensor,
    token_index: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    key_start: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The divergence of the indexer's distributions from the attention's, summed over the queries of each sequence.

    Args:
        index_q: the indexer's queries, ``[B, Tq, Hi, Ki]``.
        index_k: its keys, ``[B, Tk, Ki]``.
        weight: w, of each query's index heads, ``[B, Tq, Hi]``, scales included.
        q: the attention's queries, ``[B, Tq, H, K]``.
        k: its keys, ``[B, Tk, G, K]``; query head h uses head ``h // (H / G)``.
        token_index: ``[B, Tq, S]``, int64: the tokens that each query chose, -1 for none, in any order; ``None`` for
            all up to its own. That entries are below Tk is checked on a CPU outside of ``torch.compile`` alone;
            elsewhere a token that does not exist is none.
        scale: of the attention's scores; defaults to ``K ** -0.5``.
        cu_seqlens: boundaries of the sequences packed into ``B = 1``, from 0 to T; needs Tq = Tk.
        key_start: ``[B]``, the first token of each row that is not padding: for rows of different lengths that end
            together, as in a cache. Tokens count from it. Below 0 it counts as 0, past Tk it hides the whole row.
        backend: a name, or ``"auto"``.

    Returns:
        loss ``[B]``, or ``[N]`` for N packed sequences, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes disagree, heads do not divide or are none, offsets are wrong, a token does not exist, or no
            backend has that name.
        TypeError: an input is not floating point, or ``token_index`` or ``key_start`` of the wrong dtype.
        BackendError: the named backend cannot serve the call.
    """
    floats = {"index_q": index_q, "index_k": index_k, "weight": weight, "q": q, "k": k}
    checks.floating_on_one_device(NAME, **floats)
    sizes = _sizes(**floats, token_index=token_index, key_start=key_start)
    if token_index is not None:
        _check_lists(token_index, sizes["Tk"], q.device)
    if cu_seqlens is not None and sizes["Tq"] != sizes["Tk"]:
        raise ValueError(f"{NAME}: cu_seqlens packs queries and keys alike, got {sizes['Tq']} and {sizes['Tk']}")
    checks.key_start(NAME, key_start, cu_seqlens is not None, q.device)
    offsets = checks.sequence_offsets(NAME, cu_seqlens, sizes["B"], sizes["Tq"])
    key_start = None if key_start is None else key_start.clamp(0, sizes["Tk"])
    scale = checks.finite_scale(NAME, scale, sizes["K"])
    return OP(backend, IndexerLossInputs(index_q, index_k, weight, q, k, token_index, scale, offsets, key_start))


PATTERNS = {
    **{"index_q": "B Tq Hi Ki", "index_k": "B Tk Ki", "weight": "B Tq Hi", "q": "B Tq H K", "k": "B Tk G K"},
    **{"token_index": "B Tq S", "key_start": "B"},
}


def _sizes(**tensors: Tensor | None) -> dict[str, int]:
    """The sizes that the shapes agree on."""
    sizes = checks.match_shapes(NAME, **{name: (tensor, PATTERNS[name]) for name, tensor in tensors.items()})
    if not sizes["H"]:
        raise ValueError(f"{NAME}: q has no heads, expected at least 1")
    checks.divides(NAME, sizes["G"], "the heads of k", sizes["H"], "the heads of q")
    return sizes


def _check_lists(token_index: Tensor, tokens: int, device: torch.device) -> None:
    checks.dense(NAME, "token_index", token_index)
    if token_index.dtype != torch.int64 or token_index.device != device:
        given = f"{token_index.dtype} on {token_index.device}"
        raise TypeError(f"{NAME}: token_index is {given}, expected torch.int64 on {device}")
    checks.entries_within(NAME, "token_index", token_index, -1, tokens - 1)


def flops(pairs: int, index_heads: int, index_width: int, heads: int, width: int) -> int:
    """FLOPs of so many pairs of a query and a token of its list: ``2 Hi (Ki + 1) + 2 H K`` per pair."""
    return 2 * pairs * (index_heads * (index_width + 1) + heads * width)
