"""torch's ``scaled_dot_product_attention`` on all queries at once, with a mask only where it needs one.

Its fused kernels have first derivatives in reverse mode alone, no cap of the scores, no logarithms of their sums and no
gradient of what is added to scores. For transforms, and with any of these, the same is computed in parts, ``plain``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch.ops.attention.inputs import AttentionInputs
from seqarch.ops.attention.scores import capped
from seqarch.ops.chunked.packing import split_sequences
from seqarch.ops.chunked.softmax import masked_logsumexp, masked_softmax
from seqarch.ops.dispatch.checks import accumulation_dtype, promoted_dtype
from seqarch.ops.dispatch.eager import active_transform
from seqarch.ops.native.custom_op import first_derivatives_only

TRANSFORMABLE = True

QUERIES_AT_A_TIME = 256
"""Where scores are held: those before others then need none of later keys."""

OTHERS = "choose chunk_cpp, chunk_triton or recurrent_torch"


Results = tuple[Tensor, ...]
"""o, and its logarithms of sums where they are asked for."""


def run(inputs: AttentionInputs, plain: bool = False) -> Tensor | Results:
    """With ``plain``, by functions of torch that have derivatives of any kind."""
    if inputs.offsets is None:
        found = _attend(inputs, plain)
    else:
        parts = "q", "k", "v", "key_bias"
        sequences = split_sequences(inputs.offsets, *(getattr(inputs, name) for name in parts))
        changes = (dict(zip(parts, each, strict=True)) for each in sequences)
        found = _joined(_attend(inputs.replace(**each, offsets=None), plain) for each in changes)
    return found if inputs.return_lse else found[0]


def _joined(parts: Iterable[Results]) -> Results:
    return tuple(torch.cat(each, dim=1) for each in zip(*parts, strict=True))


def _attend(inputs: AttentionInputs, plain: bool) -> Results:
    q, k, v, key_start, key_bias = inputs.q, inputs.k, inputs.v, inputs.key_start, inputs.key_bias
    causal, window = inputs.causal, inputs.window
    in_parts = inputs.logit_cap or inputs.return_lse or key_bias is not None
    if in_parts and causal and q.shape[1] > QUERIES_AT_A_TIME:
        return _joined(_attend(piece, plain) for piece in _pieces(inputs, QUERIES_AT_A_TIME))
    unseen = max(0, k.shape[1] - q.shape[1] - window + 1) if window else 0
    if unseen:  # keys that have left even the first query's window
        k, v = k[:, unseen:], v[:, unseen:]
        key_start = None if key_start is None else key_start - unseen
        key_bias = None if key_bias is None else key_bias[:, unseen:]
    if window >= k.shape[1]:
        window = 0
    if q.shape[1] == 1:  # the last query sees all that is left
        causal, window = False, 0
    # torch aligns is_causal with the first key, this operation with the last
    whole = not window and key_start is None and (not causal or bool(q.shape[1] == k.shape[1]))
    mask = None if whole else visible(q.shape[1], k.shape[1], causal, window, key_start, q.device)
    options = {"plain": plain, "logit_cap": inputs.logit_cap, "return_lse": inputs.return_lse, "key_bias": key_bias}
    return sdpa(q, k, v, inputs.scale, mask, is_causal=causal and whole, **options)


def _pieces(inputs: AttentionInputs, size: int) -> Iterator[AttentionInputs]:
    """So many queries each, with the keys up to the last one's own."""
    queries, keys = inputs.q.shape[1], inputs.k.shape[1]
    for start in range(0, queries, size):
        q = inputs.q[:, start : start + size]
        end = max(0, keys - queries + start + q.shape[1])
        bias = None if inputs.key_bias is None else inputs.key_bias[:, :end]
        yield inputs.replace(q=q, k=inputs.k[:, :end], v=inputs.v[:, :end], key_bias=bias)


def visible(
    queries: int, keys: int, causal: bool, window: int, key_start: Tensor | None, device: torch.device
) -> Tensor:
    """Which key each query sees: booleans ``[1, 1, Tq, Tk]``, or ``[B, 1, Tq, Tk]`` with ``key_start``."""
    key = torch.arange(keys, device=device)
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    mask = key <= query if causal else torch.ones(queries, keys, dtype=torch.bool, device=device)
    if window:
        mask = mask & (key > query - window)
    if key_start is None:
        return mask[None, None]
    return mask & (key >= key_start[:, None, None, None])


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    is_causal: bool = False,
    plain: bool = False,
    logit_cap: float = 0.0,
    return_lse: bool = False,
    key_bias: Tensor | None = None,
) -> Results:
    """``scaled_dot_product_attention`` in this project's layout, dtypes and shared heads."""
    if plain or logit_cap or return_lse or key_bias is not None or active_transform() is not None:
        if mask is None:
            mask = visible(q.shape[1], k.shape[1], is_causal, 0, None, q.device)
        return _in_parts(q, k, v, scale, mask, logit_cap, return_lse, key_bias)
    if not scale > 0:  # with which torch's fused kernel for CPUs multiplies masked scores, too
        q, scale = q * scale, 1.0
    common = promoted_dtype(q, k, v)
    shared = q.shape[2] != k.shape[2]
    if folded := shared and q.shape[1] == 1:  # heads that share keys are so many queries: torch would repeat the keys
        q = q.unflatten(2, (k.shape[2], -1)).squeeze(1).transpose(1, 2)
    heads_first = (tensor.to(common).transpose(1, 2) for tensor in (q, k, v))
    o = F.scaled_dot_product_attention(
        *heads_first, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=shared and not folded
    )
    if folded:
        o = o.flatten(1, 2).unsqueeze(2)
    if not torch.compiler.is_compiling() and "ScaledDotProduct" in str(o.grad_fn):  # else torch took it apart
        first_derivatives_only("attention: torch's fused kernel", OTHERS, o)
    return (o.transpose(1, 2).to(v.dtype),)


def _in_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor,
    logit_cap: float,
    return_lse: bool,
    key_bias: Tensor | None,
) -> Results:
    wide, groups = accumulation_dtype(q, k, v), k.shape[2]
    queries, keys, values = (x.to(wide).transpose(1, 2) for x in (q * scale, k, v))
    scores = capped(queries.unflatten(1, (groups, -1)) @ keys.unsqueeze(2).mT, logit_cap)
    if key_bias is not None:  # [B, Tk, H] to [B, G, H / G, 1, Tk]
        scores = scores + key_bias.to(wide).transpose(1, 2).unflatten(1, (groups, -1)).unsqueeze(3)
    mask = mask.unsqueeze(1)
    o = masked_softmax(scores, mask) @ values.unsqueeze(2)
    found = [o.to(v.dtype), *([masked_logsumexp(scores, mask)] if return_lse else [])]
    return tuple(each.flatten(1, 2).transpose(1, 2) for each in found)
