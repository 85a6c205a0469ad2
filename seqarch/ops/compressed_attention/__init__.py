r"""Causal softmax attention to compressed blocks of tokens, and the blocks that its weights select to be read in full.

.. math::
    o_t = \sum_i p_{ti}\, v_i, \qquad
    p_{ti} = \frac{e^{\mathrm{scale}\, q_t \cdot k_i}}{\sum_l e^{\mathrm{scale}\, q_t \cdot k_l}}
    \quad \text{over } i, l \text{ with } d\, i + l_c - 1 \le t

    s_{tj} = \sum_{h} \sum_i p_{thi}\, \frac{|\,[d i, d i + l_c) \cap [b j, b (j + 1))\,|}{d}, \qquad
    \mathrm{index}_t = \text{forced blocks, then those } j \le t / b \text{ of the largest } s_{tj}

Yuan et al. 2025, "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention", sections 3.3.1
and 3.3.2. Key and value i stand for the ``l_c`` tokens (``compressed_length``) from ``d i`` on, d being
``compressed_stride``: whoever compresses them calls this with the results. A block of b tokens (``block_size``) counts
each compressed block that overlaps it, times the strides that the two share, summed over the query heads of a key head.
That is the convention of open implementations: ``sum over m < b/d, n < l_c/d of p[(b/d) j + m - n]``. The paper's eq. 9
reads ``p[(b/d) j - m - n]``, which is the same if blocks are counted from 1, and the block before if from 0.

Forced blocks (the first ``initial_blocks``, the last ``local_blocks`` up to the query's own) come first, then the most
important, of equals the earlier; as many as there are, even those of importance 0. The choice has no gradient. A query
before the first complete block gives 0, with gradient 0.

Inputs are expected to be finite. A NaN or an infinity in v reaches the queries that see its block and may, in
``chunk_torch``, reach earlier ones, but never another row, key head or packed sequence.

Work is ``O(T M (K + V))`` per query head, and no tensor of a call, forward or backward, holds all pairs of queries and
blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from seqarch.ops.compressed_attention import chunk_torch, recurrent_torch
from seqarch.ops.compressed_attention.blocks import Blocks
from seqarch.ops.compressed_attention.inputs import CompressedAttentionInputs
from seqarch.ops.dispatch import checks
from seqarch.ops.dispatch.op import Op

NAME = "compressed_attention"


OP = Op(NAME, order=(chunk_torch, recurrent_torch), reference=recurrent_torch)


@OP.public
def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    compressed_length: int,
    compressed_stride: int,
    block_size: int,
    selected_blocks: int,
    *,
    initial_blocks: int = 1,
    local_blocks: int = 2,
    query_start: int = 0,
    scale: float | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    key_start: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query to the compressed blocks that are complete, and the blocks that it selects.

    Args:
        q: ``[B, T, H, K]``.
        k, v: ``[B, M, G, K]`` and ``[B, M, G, V]``, one each for every block that the tokens complete, from each row's
            first token on; query head h uses head ``h // (H / G)``. Packed sequences' blocks follow each other.
        compressed_length: tokens of a compressed block.
        compressed_stride: tokens from one to the next; divides ``compressed_length`` and ``block_size``.
        block_size: tokens of a block that may be selected.
        selected_blocks: blocks that a query selects, the forced ones included.
        initial_blocks: of these, so many first ones of the sequence are forced.
        local_blocks: and so many last ones, the query's own included.
        query_start: tokens before the first query, in the longest row; 0 with ``cu_seqlens``.
        scale: defaults to ``K ** -0.5``.
        cu_seqlens: boundaries of the sequences packed into ``B = 1``, from 0 to T.
        key_start: ``[B]``, the first token of each row that is not padding: for rows of different lengths that end
            together, as in a cache. Blocks count from it, and there may be fewer than the tokens would complete. Below
            0 it counts as 0, past the last token it hides the whole row.
        backend: a name, or ``"auto"``.

    Returns:
        o ``[B, T, H, V]`` in v's dtype, and index ``[B, T, G, S]``, int64, the blocks that each query selects: what
        :func:`seqarch.ops.block_sparse_attention` takes. S is ``selected_blocks``, or as many as the tokens begin; -1
        where a query has fewer.

    Raises:
        ValueError: shapes or sizes disagree, heads do not divide, offsets are wrong, k and v hold another number of
            blocks, or no backend has that name.
        TypeError: an input is not floating point, or ``key_start`` of the wrong dtype.
        BackendError: the named backend cannot serve the call.
    """
    blocks = Blocks(compressed_length, compressed_stride, block_size, selected_blocks, initial_blocks, local_blocks)
    checks.floating_on_one_device(NAME, q=q, k=k, v=v)
    sizes = checks.match_shapes(NAME, q=(q, "B T H K"), k=(k, "B M G K"), v=(v, "B M G V"), key_start=(key_start, "B"))
    checks.divides(NAME, sizes["G"], "the heads of k and v", sizes["H"], "the heads of q")
    _check_sizes(blocks, query_start, packed=cu_seqlens is not None)
    checks.key_start(NAME, key_start, cu_seqlens is not None, q.device)
    offsets = checks.sequence_offsets(NAME, cu_seqlens, sizes["B"], sizes["T"])
    tokens = query_start + sizes["T"]
    _check_count(blocks, sizes["M"], tokens, offsets, at_most=key_start is not None)
    key_start = None if key_start is None else key_start.clamp(0, tokens)
    scale = checks.finite_scale(NAME, scale, sizes["K"])
    return OP(backend, CompressedAttentionInputs(q, k, v, *blocks, query_start, scale, offsets, key_start))


def _check_sizes(blocks: Blocks, query_start: int, packed: bool) -> None:
    names = "compressed_length", "compressed_stride", "block_size", "selected_blocks", "initial_blocks", "local_blocks"
    for name, count in (*zip(names, blocks, strict=True), ("query_start", query_start)):
        least = int(name in names[:4])
        if count < least:
            raise ValueError(f"{NAME}: {name} is {count!r}, expected a whole number of at least {least}")
    for name, count in (("compressed_length", blocks.length), ("block_size", blocks.size)):
        if count % blocks.stride:
            raise ValueError(f"{NAME}: {name} ({count}) must be a multiple of compressed_stride ({blocks.stride})")
    if blocks.initial + blocks.local > blocks.count:
        forced = f"{blocks.initial} initial and {blocks.local} local"
        raise ValueError(f"{NAME}: selected_blocks ({blocks.count}) must hold the forced ones, {forced}")
    if packed and query_start:
        raise ValueError(f"{NAME}: cu_seqlens packs sequences from their beginning, got query_start {query_start}")


def _check_count(blocks: Blocks, given: int, tokens: int, offsets: tuple[int, ...] | None, at_most: bool) -> None:
    lengths = [tokens] if offsets is None else [end - start for start, end in pairwise(offsets)]
    complete = sum(map(blocks.complete, lengths))
    if given > complete or (given < complete and not at_most):
        raise ValueError(f"{NAME}: k and v hold {given} blocks, expected the {complete} that {tokens} tokens complete")


def flops(
    queries: int, query_start: int, heads: int, key_width: int, value_width: int, blocks: Blocks, batch_size: int = 1
) -> int:
    """FLOPs of a row's queries with the blocks that are complete by then: ``2 K + 2 V`` per pair and query head."""
    pairs = blocks.compressed_pairs(query_start + queries) - blocks.compressed_pairs(query_start)
    return 2 * batch_size * heads * pairs * (key_width + value_width)
