r"""Log-linear attention: linear attention, or the delta rule, with a state for each power of two of tokens.

A query at token t, counted from 0, sees itself at level 0. Where bit ``l - 1`` of t is set it sees at level l the
``2^(l-1)`` tokens before ``t - (t mod 2^(l-1))``, so that its levels partition the tokens up to t, and tokens j and t
meet at level ``bits(j xor t)``. Each level has a state, and each token and head a weight for every level:

.. math::
    o_t = \mathrm{scale} \sum_l \lambda_{t,l} \; q_t S^{(l)}_t

Within its level a state is that of linear attention, ``S_t = a_t S_{t-1} + k_t^T v_t``, or with beta that of the
delta rule, in which every level's state passes the transition ``a_t (I - beta_t k_t^T k_t)`` of every later token (Guo
et al. 2025, "Log-Linear Attention", section 3.1 to 3.3). Where all weights are 1 it is ``linear_attention``, or
``delta_rule``.

What is held between tokens is a binary counter: after n tokens a state of ``2^b`` tokens for each bit b of n that is
set. A token adds a state of its own, which is added to those that its carry passes. L levels serve ``2^(L-1)`` tokens.

Work is ``O(T log(T) K V)`` per head, in chunks of C tokens ``O(T C (K + V + C))`` and ``O(T log(T / C) K V)``. Any log
decay from 0 to -inf is right; all other inputs are expected to be finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from seqarch.ops.chunked.recurrence import stepwise
from seqarch.ops.dispatch import checks
from seqarch.ops.dispatch.op import Op
from seqarch.ops.log_linear_attention import chunk_cpp, chunk_torch, recurrent_torch
from seqarch.ops.log_linear_attention.inputs import LogLinearAttentionInputs

NAME = "log_linear_attention"

OP = Op(
    NAME,
    order=(chunk_cpp, chunk_torch, recurrent_torch),
    reference=recurrent_torch,
    step_order=(chunk_cpp, recurrent_torch, chunk_torch),
)


@OP.public
def log_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    level_weight: Tensor,
    beta: Tensor | None = None,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    before: int | Sequence[int] = 0,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``o_t = scale sum_l level_weight_tl q_t S_t^(l)``, with a state for each power of two of tokens.

    Args:
        q, k: ``[B, T, G, K]``; head h of v uses head ``h // (H / G)``. With beta, keys are expected to have unit norm.
        v: ``[B, T, H, V]``, H a multiple of G.
        level_weight: ``[B, T, H, L]``: of each token and head, what its levels count. L is at least 2.
        beta: ``[B, T, H]``, in (0, 2): the states are those of the delta rule; ``None`` for linear attention.
        log_decay: natural logarithms, at most 0: ``None``, ``[H]`` or ``[B, T, H]``.
        scale: defaults to ``K ** -0.5``.
        state: ``[B, H, L - 1, K, V]`` before the first token (one row per sequence under ``cu_seqlens``); entry b is
            that of ``2^b`` tokens, zeros where bit b of ``before`` is not set; all zeros if ``None``.
        before: tokens before the first, of all rows or of each.
        cu_seqlens: boundaries of the sequences packed into ``B = 1``, from 0 to T.
        backend: a name, or ``"auto"``.

    Returns:
        o ``[B, T, H, V]`` in v's dtype and the last state, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes disagree, heads do not divide, offsets are wrong, a row has more than ``2^(L-1)`` tokens with
            those before it, or no backend has that name.
        TypeError: an input is not floating point.
        BackendError: the named backend cannot serve the call.
    """
    tensors = {"q": q, "k": k, "v": v, "level_weight": level_weight, "beta": beta, "log_decay": log_decay}
    checks.floating_on_one_device(NAME, **tensors, state=state)
    sizes = _checked_sizes(**tensors)
    offsets = checks.sequence_offsets(NAME, cu_seqlens, sizes["B"], sizes["T"])
    rows = sizes["B"] if offsets is None else len(offsets) - 1
    counts = _checked_counts(before, rows, sizes["T"], offsets, sizes["L"])
    dtype = checks.accumulation_dtype(*tensors.values(), state)
    shape = (rows, sizes["H"], sizes["L"] - 1, sizes["K"], sizes["V"])
    state = checks.initial_state(NAME, state, shape, dtype, v.device)
    scale = checks.finite_scale(NAME, scale, sizes["K"])
    log_decay = stepwise(log_decay, v)
    return OP(backend, LogLinearAttentionInputs(q, k, v, level_weight, beta, log_decay, scale, state, counts, offsets))


def _checked_sizes(
    q: Tensor, k: Tensor, v: Tensor, level_weight: Tensor, beta: Tensor | None, log_decay: Tensor | None
) -> dict[str, int]:
    """The sizes of the arguments by their letters.

    Raises:
        ValueError: shapes disagree, or heads do not divide.
    """
    if log_decay is not None and log_decay.ndim not in (1, 3):
        raise ValueError(f"{NAME}: log_decay has shape {list(log_decay.shape)}, expected [H] or [B, T, H]")
    sizes = checks.match_shapes(
        NAME,
        q=(q, "B T G K"),
        k=(k, "B T G K"),
        v=(v, "B T H V"),
        level_weight=(level_weight, "B T H L"),
        beta=(beta, "B T H"),
        log_decay=(log_decay, "H" if log_decay is not None and log_decay.ndim == 1 else "B T H"),
    )
    checks.divides(NAME, sizes["G"], "the heads of q and k", sizes["H"], "the heads of v")
    if sizes["L"] < 2:
        raise ValueError(f"{NAME}: level_weight has {sizes['L']} levels, expected at least 2")
    return sizes


def _checked_counts(
    before: int | Sequence[int], rows: int, length: int, offsets: tuple[int, ...] | None, levels: int
) -> tuple[int, ...]:
    """The tokens before each row.

    Raises:
        ValueError: they are no whole numbers, or levels are too few for them and those of the call.
    """
    counts = tuple(before) if isinstance(before, Sequence) else (before,) * rows
    if len(counts) != rows or not all(checks.fits(count, (int,)) and count >= 0 for count in counts):
        raise ValueError(f"{NAME}: before is {before!r}, expected {rows} whole numbers of at least 0, or one")
    own = [length] * rows if offsets is None else [end - start for start, end in pairwise(offsets)]
    most = max([0, *(count + new for count, new in zip(counts, own, strict=True))])
    if most > 1 << (levels - 1):
        raise ValueError(
            f"{NAME}: a row has {most} tokens, expected at most {1 << (levels - 1)}: level_weight has {levels} levels,"
            " and each more serves twice as many"
        )
    return counts


def flops(
    length: int,
    heads: int,
    levels: int,
    key_width: int,
    value_width: int,
    batch_size: int = 1,
    delta: bool = False,
) -> int:
    """FLOPs of the recurrence from an empty state on: ``2 K V`` to write and to read the token's own state, and to read
    each state of the levels above, a head and token; with the delta rule, twice as much again to correct each of them.
    """
    above = sum(_set_before(length, bit) for bit in range(levels - 1))
    return 2 * batch_size * heads * key_width * value_width * (2 * length + (3 if delta else 1) * above)


def _set_before(length: int, bit: int) -> int:
    """How many of the numbers below ``length`` have this bit set."""
    half = 1 << bit
    whole = length // (2 * half)
    return whole * half + max(0, length - whole * 2 * half - half)
