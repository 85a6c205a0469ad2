r"""Softmax attention: causal or not, with a window, grouped heads, packed sequences and rows of different lengths.

.. math::
    o_i = \sum_{j \in \mathrm{visible}(i)} \frac{e^{\mathrm{scale}\, q_i \cdot k_j}}
          {\sum_{l \in \mathrm{visible}(i)} e^{\mathrm{scale}\, q_i \cdot k_l}}\, v_j

Vaswani et al. 2017, "Attention Is All You Need", eq. 1; grouped heads: Ainslie et al. 2023, "GQA"; the window: Beltagy
et al. 2020, "Longformer", section 3.1, to the past only.

``causal`` aligns the last query with the last key: of Tq queries and Tk keys, query i is at position
``i + Tk - Tq`` and sees the keys up to it, itself included. A query that sees no key gives 0, with gradient 0; so do
the first queries where Tq > Tk.

With ``logit_cap`` c the scores are bounded softly before the softmax, ``c tanh(scale q_i . k_j / c)`` (Gemma Team 2024,
"Gemma 2", section 2). The kernels do not know it: torch's functions compute it, and hold a score per pair, or per pair
of a window.

``return_lse`` asks for the logarithms of the sums below the fraction, too, by which attentions over parts of the keys
are put together: ``o = sum_p exp(lse_p - lse) o_p``, ``lse = log sum_p exp(lse_p)``. They have gradients as o has. A
``sink`` s per head is one more score that no value belongs to, ``exp(s)`` in that sum (OpenAI 2025, "gpt-oss-120b &
gpt-oss-20b Model Card", section 2.2; Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks"): o
times ``sigmoid(lse - s)``, rounded once more in 16 bits. torch's fused kernels have no such gradient: where no other
kernel serves, as on a CPU without a compiler, torch's functions hold a score per pair, as with a cap.

A ``key_bias`` b adds to the scores of each key a number of its own for each query head, after the cap if there is one:
``scale q_i . k_j + b_j``. With minus the sums of log forget gates up to each key this is forgetting attention (Lin et
al. 2025, "Forgetting Transformer"), whose ``c_i - c_j`` differs from it by what all scores of a query share. It is
held in float32 at least, of which a sum near 1000 leaves the weights four digits. As with sinks, torch's fused kernels
do not serve it.

Inputs are expected to be finite. A NaN or an infinity in v reaches the queries that see it and may reach earlier ones
of its tile, in ``parallel_sdpa`` all earlier ones; where ``chunk_sdpa`` and ``parallel_sdpa`` use a mask, so may one in
k or in padding. It never reaches another row or head, and another packed sequence only in ``chunk_sdpa``. In
``recurrent_torch`` it reaches only the queries that see it.

Work is ``O(Tq Tk (K + V))`` per head, or ``O(Tq w (K + V))`` with a window of w.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from seqarch.ops.attention import (
    chunk_cpp,
    chunk_flash_attn,
    chunk_sdpa,
    chunk_triton,
    parallel_sdpa,
    recurrent_torch,
)
from seqarch.ops.attention.inputs import AttentionInputs
from seqarch.ops.dispatch import checks
from seqarch.ops.dispatch.op import Op

NAME = "attention"


OP = Op(
    NAME,
    order=(chunk_cpp, chunk_triton, chunk_sdpa, parallel_sdpa, recurrent_torch),
    reference=recurrent_torch,
    step_order=(chunk_triton, chunk_sdpa, parallel_sdpa, recurrent_torch),
    opt_in=(chunk_flash_attn,),
    autocast=True,
)


@OP.public
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    key_start: Tensor | None = None,
    logit_cap: float | None = None,
    sinks: Tensor | None = None,
    key_bias: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Softmax attention of the queries over the keys that each may see.

    Args:
        q, k, v: ``[B, Tq, H, K]``, ``[B, Tk, G, K]`` and ``[B, Tk, G, V]``; query head h uses head ``h // (H / G)``.
        causal: the last query is at the last key, and none sees a later key than its own.
        window: a query sees its own key and the ``window - 1`` before it, or all before it where they are fewer; needs
            ``causal``.
        scale: defaults to ``K ** -0.5``.
        cu_seqlens: boundaries of the sequences packed into ``B = 1``, from 0 to T; needs Tq = Tk.
        key_start: ``[B]``, the first key of each row that is not padding: for rows of different lengths that end
            together, as in a cache. A start at or past Tk hides the whole row.
        logit_cap: bounds the scores softly; ``None`` leaves them.
        sinks: ``[H]``, a score of each head beside those of the keys that it sees, which no value belongs to.
        key_bias: ``[B, Tk, H]``, added to the scores of each key.
        return_lse: whether the logarithms of the sums are returned, too.
        backend: a name, or ``"auto"``.

    Returns:
        o ``[B, Tq, H, V]`` in v's dtype; with ``return_lse`` o and ``[B, Tq, H]``, float32 or float64: of a query that
        sees no key -inf, or its sink.

    Raises:
        ValueError: shapes disagree, heads do not divide, offsets are wrong, ``window`` is below 1 or not causal,
            ``logit_cap`` is not positive, or no backend has that name.
        TypeError: an input is not floating point, or ``key_start`` not an integer.
        BackendError: the named backend cannot serve the call.
    """
    checks.floating_on_one_device(NAME, q=q, k=k, v=v, sinks=sinks, key_bias=key_bias)
    further = {"key_start": (key_start, "B"), "sinks": (sinks, "H"), "key_bias": (key_bias, "B Tk H")}
    sizes = checks.match_shapes(NAME, q=(q, "B Tq H K"), k=(k, "B Tk G K"), v=(v, "B Tk G V"), **further)
    checks.divides(NAME, sizes["G"], "the heads of k and v", sizes["H"], "the heads of q")
    _check_bounds(window, causal, logit_cap)
    if cu_seqlens is not None and sizes["Tq"] != sizes["Tk"]:
        raise ValueError(f"{NAME}: cu_seqlens packs queries and keys alike, got {sizes['Tq']} and {sizes['Tk']}")
    checks.key_start(NAME, key_start, cu_seqlens is not None, q.device)
    offsets = checks.sequence_offsets(NAME, cu_seqlens, sizes["B"], sizes["Tq"])
    window = 0 if window is None else min(window, max(1, sizes["Tk"]))  # no backend is given a size that no memory has
    scale = checks.finite_scale(NAME, scale, sizes["K"])
    cap, sums = float(logit_cap or 0), return_lse or sinks is not None
    key_bias = None if key_bias is None else key_bias.to(checks.accumulation_dtype(q, k, v))
    found = OP(backend, AttentionInputs(q, k, v, causal, window, scale, offsets, key_start, cap, sums, key_bias))
    if sinks is None or isinstance(found, AttentionInputs):
        return found
    return _with_sinks(found, sinks) if return_lse else _with_sinks(found, sinks)[0]


def _check_bounds(window: int | None, causal: bool, logit_cap: float | None) -> None:
    if window is not None and window < 1:
        expected = "expected a whole number of at least 1 or None"
        raise ValueError(f"{NAME}: window counts the token itself, {expected}, got {window!r}")
    if window is not None and not causal:
        raise ValueError(f"{NAME}: window={window} looks to the past only, expected causal=True with it")
    if logit_cap is not None and not 0 < logit_cap < math.inf:
        raise ValueError(f"{NAME}: logit_cap is {logit_cap!r}, expected a positive number or None")


def _with_sinks(found: tuple[Tensor, Tensor], sinks: Tensor) -> tuple[Tensor, Tensor]:
    """o and lse with one more score of each head, ``[H]``, and a value of zeros."""
    o, lse = found
    sinks = sinks.to(lse.dtype)
    apart = lse - sinks
    return (o * apart.sigmoid().unsqueeze(-1)).to(o.dtype), sinks - F.logsigmoid(-apart)


def flops(
    query_length: int,
    key_length: int,
    heads: int,
    key_width: int,
    value_width: int,
    causal: bool = True,
    window: int | None = None,
    batch_size: int = 1,
) -> int:
    """FLOPs over the visible pairs: ``2 K`` for a score and ``2 V`` to read, per pair and query head."""
    pairs = query_length * key_length
    if causal:
        pairs = _pairs_up_to(key_length, window) - _pairs_up_to(max(0, key_length - query_length), window)
    return 2 * batch_size * pairs * heads * (key_width + value_width)


def _pairs_up_to(length: int, window: int | None) -> int:
    """Pairs that the first ``length`` positions see causally."""
    growing = length if window is None else min(length, window)
    return growing * (growing + 1) // 2 + (length - growing) * growing
