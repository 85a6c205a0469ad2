"""Triton kernels (Dao 2023, "FlashAttention-2"): tiles of queries walk over the keys that they see, and no others.

Windows, packed sequences, rows of different lengths and heads that share keys are part of the kernels: nothing is
masked beforehand, copied or repeated. Of few queries, as of a token that is generated, programs share out the keys.
Products of 16-bit inputs are 16-bit with float32 sums; those of float32 ones are TF32, three products for one where
float32 is asked to be exact (``torch.set_float32_matmul_precision("highest")``, torch's default). Each gradient is
added up by one program, in an order that does not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.attention.inputs import AttentionInputs
from seqarch.ops.attention.operators import AttentionOperators
from seqarch.ops.dispatch.checks import promoted_dtype
from seqarch.ops.native.custom_op import Upstream
from seqarch.ops.triton import availability

unavailable = availability.unavailable


def unsupported(inputs: AttentionInputs) -> str | None:
    if inputs.logit_cap:
        return "logit_cap is given, which the kernels do not know"
    return availability.unsupported_attention(inputs.q, inputs.k, inputs.v)


def deprioritised(inputs: AttentionInputs) -> str | None:
    queries, keys, offsets = inputs.q.shape[1], inputs.k.shape[1], inputs.offsets
    masked = (
        inputs.return_lse
        or inputs.key_bias is not None
        or inputs.window
        or inputs.key_start is not None
        or (inputs.causal and queries not in (1, keys))
    )
    if masked or (offsets is not None and len(offsets) > 2):
        return None
    return "queries see whole sequences, for which torch has kernels of its own"


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    from seqarch.ops.attention.launches_triton import Attention

    return Attention(inputs).forward()


def backward(inputs: AttentionInputs, upstream: Upstream) -> list[Tensor]:
    from seqarch.ops.attention.launches_triton import Attention

    (o, log_sum), (do, *dlse) = upstream.kept, upstream.gradients
    dlse = dlse[0].contiguous() if dlse else None
    dq, dk, dv, dbias = Attention(inputs).differentiate(o.contiguous(), log_sum.contiguous(), do, dlse)
    return [dq, dk, dv, torch.empty(0), dbias]


operators = AttentionOperators("attention_triton", forward, backward, ("cpu", "cuda"))


def run(inputs: AttentionInputs) -> Tensor | tuple[Tensor, Tensor]:
    return operators(inputs, promoted_dtype(inputs.q, inputs.k, inputs.v))
