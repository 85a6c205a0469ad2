"""The CUDA kernels of the package ``flash-attn``, windows and packed sequences included.

Its version 2.1 or newer: older ones align a causal mask with the first key, not the last.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from seqarch.ops.attention.inputs import AttentionInputs
from seqarch.ops.dispatch import vendors
from seqarch.ops.native.custom_op import first_derivatives_only

WIDEST = 256
"""The greatest head width that the kernels take."""


def unavailable() -> str | None:
    return vendors.unavailable("flash_attn")


def unsupported(inputs: AttentionInputs) -> str | None:
    keys, values = inputs.q.shape[3], inputs.v.shape[3]
    if inputs.logit_cap:
        return "logit_cap is given, which is not passed on"
    if inputs.return_lse:
        return "return_lse is asked for, whose gradient flash_attn does not have"
    if inputs.key_bias is not None:
        return "key_bias is given, which flash_attn does not know"
    if inputs.key_start is not None:
        return "key_start is given, and flash_attn takes no padding before the keys"
    if keys != values:
        return f"keys are {keys} wide and values {values}, expected the same"
    if not 1 <= keys <= WIDEST:
        return f"K is {keys}, expected 1 to {WIDEST}"
    return vendors.unsupported(vendors.NARROW, q=inputs.q, k=inputs.k, v=inputs.v)


def run(inputs: AttentionInputs) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    q, k, v, offsets = inputs.q, inputs.k, inputs.v, inputs.offsets
    before = (inputs.window - 1, 0) if inputs.window else (-1, -1)  # theirs does not count the token itself
    options = {"softmax_scale": inputs.scale, "causal": inputs.causal, "window_size": before}
    if offsets is None:
        o = flash_attn_func(q, k, v, **options)
    else:
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=q.device)
        longest = max(end - start for start, end in pairwise(offsets))
        o = flash_attn_varlen_func(q[0], k[0], v[0], cu_seqlens, cu_seqlens, longest, longest, **options)[None]
    first_derivatives_only("attention: backend 'chunk_flash_attn'", "choose chunk_triton or recurrent_torch", o)
    return o
