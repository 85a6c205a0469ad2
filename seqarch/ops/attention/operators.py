"""What the compiled and the Triton kernels share: custom operators, of which nothing is kept but inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.attention import chunk_sdpa, parallel_sdpa
from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.native.custom_op import Formula, Saved, define
from seqarch.ops.native.huge_pages import in_huge_pages, like


def outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Room for o ``[B, Tq, H, V]`` and the logarithms of the softmax's sums ``[B, Tq, H]``."""
    return in_huge_pages(v.new_empty(*q.shape[:3], v.shape[3])), v.new_empty(q.shape[:3], dtype=accumulation_dtype(v))


def gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for those of q, k and v."""
    return like(q), like(k), like(v)


def differentiable(
    name: str, forward: Callable[..., Any], backward: Callable[..., Any], devices: str | Sequence[str]
) -> Callable[..., Any]:
    """The operator ``seqarch::NAME`` for these types of device.

    ``forward(q, k, v, causal, window, scale, key_start, cu_seqlens)`` gives o and the logarithms of the softmax's sums;
    ``q, k, v`` are of one dtype, ``key_start`` int64, and a window of 0 is none. ``backward`` takes the same arguments,
    o, these logarithms and the gradient of o, and gives the gradients of q, k and v.
    """

    def differentiate(call: Saved, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return gradient(*call.inputs, *call.kept, do)

    operator, gradient = define(
        name, forward, backward, lambda q, k, v, *_: outputs(q, k, v), lambda q, k, v, *_: gradients(q, k, v),
        Formula(differentiate, _plain, keeps=(0, 1)), devices,
    )  # fmt: skip
    return operator


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int,
    scale: float,
    key_start: Tensor | None,
    cu_seqlens: Sequence[int] | None,
) -> Tensor:
    offsets = None if cu_seqlens is None else tuple(cu_seqlens)
    if window:
        return chunk_sdpa.run(q, k, v, causal, window, scale, offsets, key_start, plain=True)
    return parallel_sdpa.run(q, k, v, causal, None, scale, offsets, key_start, plain=True)


def run(
    attend: Callable[..., Any],
    common_dtype: Callable[..., torch.dtype],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    offsets: tuple[int, ...] | None,
    key_start: Tensor | None,
) -> Tensor:
    """What a backend does with the prepared arguments, by its operator, in the dtype that it takes q, k and v in."""
    dtype = common_dtype(q, k, v)
    start = None if key_start is None else key_start.long()
    return attend(q.to(dtype), k.to(dtype), v.to(dtype), causal, window or 0, scale, start, offsets)[0].to(v.dtype)
