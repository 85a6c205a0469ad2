r"""Causal softmax attention over listed blocks of keys alone, a list for each query and head of lists.

.. math::
    o_i = \sum_{j \in \mathrm{visible}(i)} \frac{e^{\mathrm{scale}\, q_i \cdot k_j}}
          {\sum_{l \in \mathrm{visible}(i)} e^{\mathrm{scale}\, q_i \cdot k_l}}\, v_j, \qquad
    \mathrm{visible}(i) = \{\, j \le i : \lfloor j / b \rfloor \in \mathrm{list}_i \ \text{or}\ i - j < w \,\}

Zaheer et al. 2020, "Big Bird", section 2, with lists that may depend on the data, as in Yuan et al. 2025, "Native
Sparse Attention", section 3.3.2; the window is that of Beltagy et al. 2020, "Longformer", to the past only.

Blocks have ``block_size`` tokens and count from each sequence's own first token. The last query is at the last
key: of Tq queries and Tk keys, query i has position ``i + Tk - Tq``. A block listed twice counts once, -1 is no block,
and what lies after the query is not seen, listed or not. A query that sees no key gives 0, with gradient 0.

``return_lse`` asks for the logarithms of the sums below the fraction, too, by which attentions over parts of the keys
are put together.

Inputs are expected to be finite. A NaN or an infinity in v reaches the queries that see it and may reach earlier ones
of its block, in ``parallel_torch`` all earlier ones, but never another row, head or packed sequence. In ``chunk_torch``
and ``recurrent_torch`` it reaches only the queries that see it.

Work is ``O(Tq S b (K + V))`` per query head for lists of S blocks, and no tensor of a call, forward or backward, holds
all pairs of queries and keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.block_sparse_attention import (
    chunk_torch,
    grouped_cpp,
    grouped_torch,
    grouped_triton,
    parallel_torch,
    recurrent_torch,
)
from seqarch.ops.block_sparse_attention.inputs import BlockSparseAttentionInputs
from seqarch.ops.dispatch import checks
from seqarch.ops.dispatch.op import Op

NAME = "block_sparse_attention"

LEAST_BLOCK = 128
"""A block of so many tokens at least keeps its size where there are fewer keys: backends choose by it."""


OP = Op(
    NAME,
    order=(grouped_cpp, grouped_triton, grouped_torch, chunk_torch, parallel_torch, recurrent_torch),
    reference=recurrent_torch,
    step_order=(grouped_cpp, grouped_triton, chunk_torch, parallel_torch, recurrent_torch),
)


@OP.public
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block_size: int,
    *,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    key_start: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Softmax attention of each query over the tokens up to its own in the blocks listed for it.

    Args:
        q: ``[B, Tq, H, K]``.
        k, v: ``[B, Tk, G, K]`` and ``[B, Tk, G, V]``; query head h uses head ``h // (H / G)``.
        block_index: ``[B, Tq, I, S]``, int64: the blocks of each query, -1 for none, in any order. G divides I and I
            divides H; query head h uses list ``h // (H / I)``. That entries are below ``ceil(Tk / block_size)`` is
            checked on a CPU outside of ``torch.compile`` alone; elsewhere a block that does not exist is no block.
        block_size: tokens of a block; any number that is not below Tk makes one block of all.
        window: a query also sees its own key and the ``window - 1`` before it, or all before it where they are fewer;
            ``None`` for listed blocks alone.
        scale: defaults to ``K ** -0.5``.
        cu_seqlens: boundaries of the sequences packed into ``B = 1``, from 0 to T; needs Tq = Tk. Blocks count from the
            start of each sequence.
        key_start: ``[B]``, the first key of each row that is not padding: for rows of different lengths that end
            together, as in a cache. Blocks count from it. Below 0 it counts as 0, past Tk it hides the whole row.
        return_lse: whether the logarithms of the sums are returned, too.
        backend: a name, or ``"auto"``.

    Returns:
        o ``[B, Tq, H, V]`` in v's dtype; with ``return_lse`` o and ``[B, Tq, H]``, float32 or float64: -inf of a query
        that sees no key.

    Raises:
        ValueError: shapes disagree, heads do not divide, offsets are wrong, ``block_size`` or ``window`` is below 1, a
            block does not exist, or no backend has that name.
        TypeError: an input is not floating point, or ``block_index`` or ``key_start`` of the wrong dtype.
        BackendError: the named backend cannot serve the call.
    """
    checks.floating_on_one_device(NAME, q=q, k=k, v=v)
    sizes = _sizes(q=q, k=k, v=v, key_start=key_start, block_index=block_index)
    _check_lists(block_index, q.device)
    _check_counts(block_size=block_size, window=1 if window is None else window)
    if cu_seqlens is not None and sizes["Tq"] != sizes["Tk"]:
        raise ValueError(f"{NAME}: cu_seqlens packs queries and keys alike, got {sizes['Tq']} and {sizes['Tk']}")
    checks.entries_within(NAME, "block_index", block_index, -1, -(-sizes["Tk"] // block_size) - 1)
    checks.key_start(NAME, key_start, cu_seqlens is not None, q.device)
    offsets = checks.sequence_offsets(NAME, cu_seqlens, sizes["B"], sizes["Tq"])
    # no backend is given a size that no memory has
    window = 0 if window is None else min(window, max(1, sizes["Tk"]))
    block_size = min(block_size, max(LEAST_BLOCK, sizes["Tk"]))
    key_start = None if key_start is None else key_start.clamp(0, sizes["Tk"])
    scale = checks.finite_scale(NAME, scale, sizes["K"])
    given = q, k, v, block_index, block_size, window, scale, offsets, key_start, return_lse
    return OP(backend, BlockSparseAttentionInputs(*given))


PATTERNS = {"q": "B Tq H K", "k": "B Tk G K", "v": "B Tk G V", "key_start": "B", "block_index": "B Tq I S"}


def _sizes(**tensors: Tensor | None) -> dict[str, int]:
    """The sizes that the shapes agree on."""
    sizes = checks.match_shapes(NAME, **{name: (tensor, PATTERNS[name]) for name, tensor in tensors.items()})
    checks.divides(NAME, sizes["G"], "the heads of k and v", sizes["I"], "the heads of block_index")
    checks.divides(NAME, sizes["I"], "the heads of block_index", sizes["H"], "the heads of q")
    return sizes


def _check_lists(block_index: Tensor, device: torch.device) -> None:
    checks.dense(NAME, "block_index", block_index)
    if block_index.dtype != torch.int64 or block_index.device != device:
        given = f"{block_index.dtype} on {block_index.device}"
        raise TypeError(f"{NAME}: block_index is {given}, expected torch.int64 on {device}")


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{NAME}: {name} counts tokens, expected a whole number of at least 1, got {count!r}")


def flops(pairs: int, key_width: int, value_width: int) -> int:
    """FLOPs of so many visible pairs of a query and a key, summed over the query heads: ``2 K + 2 V`` per pair."""
    return 2 * pairs * (key_width + value_width)
