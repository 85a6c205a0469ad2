"""What every backend does around its own form: wide numbers, and packed sequences one after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seqarch.ops.chunked.packing import split_sequences
from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.path_attention.inputs import PathAttentionInputs


def over_sequences(attend: Callable[..., tuple[Tensor, Tensor]], inputs: PathAttentionInputs) -> tuple[Tensor, Tensor]:
    """Outputs and keys by ``attend(q, k, v, w, beta, key_bias, key_start)`` of scaled q, in float32 at least."""
    wide = accumulation_dtype(inputs.q, inputs.k, inputs.v, inputs.w, inputs.beta)
    q, k, v, w, beta = (x.to(wide) for x in (inputs.q, inputs.k, inputs.v, inputs.w, inputs.beta))
    q, bias = q * inputs.scale, None if inputs.key_bias is None else inputs.key_bias.to(wide)
    if inputs.offsets is None:
        o, keys = attend(q, k, v, w, beta, bias, inputs.key_start)
    else:
        parts = [attend(*sequence, None) for sequence in split_sequences(inputs.offsets, q, k, v, w, beta, bias)]
        o, keys = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    return o.to(inputs.v.dtype), keys.to(inputs.k.dtype)
