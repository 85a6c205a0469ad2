"""The CUDA kernels of the package ``flash-attn``, windows and packed sequences included.

Its version 2.1 or newer: older ones align a causal mask with the first key, not the last.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from seqarch.ops.dispatch import vendors
from seqarch.ops.native.custom_op import first_derivatives_only

WIDEST = 256
"""The greatest head width that the kernels take."""


def unavailable() -> str | None:
    return vendors.unavailable("flash_attn")


def refuse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    offsets: tuple[int, ...] | None,
    key_start: Tensor | None,
) -> str | None:
    if key_start is not None:
        return "key_start is given, and flash_attn takes no padding before the keys"
    if q.shape[3] != v.shape[3]:
        return f"keys are {q.shape[3]} wide and values {v.shape[3]}, expected the same"
    if not 1 <= q.shape[3] <= WIDEST:
        return f"K is {q.shape[3]}, expected 1 to {WIDEST}"
    return vendors.refuse(vendors.NARROW, q=q, k=k, v=v)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    offsets: tuple[int, ...] | None,
    key_start: Tensor | None,
) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    reach = (-1, -1) if window is None else (window - 1, 0)  # theirs does not count the token itself
    options = {"softmax_scale": scale, "causal": causal, "window_size": reach}
    if offsets is None:
        o = flash_attn_func(q, k, v, **options)
    else:
        borders = torch.tensor(offsets, dtype=torch.int32, device=q.device)
        longest = max(end - start for start, end in pairwise(offsets))
        o = flash_attn_varlen_func(q[0], k[0], v[0], borders, borders, longest, longest, **options)[None]
    first_derivatives_only("attention: backend 'chunk_flash_attn'", "choose chunk_triton or recurrent_torch", o)
    return o
