"""Decay inside a chunk, in forms that stay finite and right however strong it is.

With ``L_t`` the sum of the log decays of a chunk's tokens up to and including t, a chunked recurrence needs
``exp(L_i - L_j)`` for ``i >= j``, ``exp(L_i)`` and ``exp(L_C - L_j)``. Every exponent here is a difference that is at
most 0, taken before the exponential, so nothing overflows; sums are float64, so that a weak decay after a strong one
keeps its digits. Dividing by ``exp(L_j)`` instead overflows from ``L_j = -88`` on.

Tensors are ``[B, N, G, R, C, ...]``: N chunks of C tokens; head h is row ``h % R`` of group ``h // R``, and the heads
of a group share their queries and keys (R = 1 there). The batch of the decay may be 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.chunked.packing import Chunks

STRONGEST = -1000.0
"""Log decays are held above this: its exponential is 0 in float64, and differences of sums stay finite for -inf."""

SUB_CHUNK = 16
"""Tokens whose pairwise decays are formed one by one where the decay is a vector; further pairs are matrix products."""


def _above_diagonal(size: int, device: torch.device) -> Tensor:
    """``[C, C]``, true where j > i: the pairs that causality excludes."""
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)


class NoDecay:
    """``exp(0)`` throughout."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """``[..., C, C]``: ``q_i . k_j`` for ``i >= j``, else 0."""
        return (q @ k.mT).tril()

    def from_start(self, x: Tensor) -> Tensor:
        """``x_i`` decayed from the chunk's start: ``x_i exp(L_i)``."""
        return x

    def to_end(self, x: Tensor) -> Tensor:
        """``x_j`` decayed to the chunk's end: ``x_j exp(L_C - L_j)``."""
        return x

    def over(self, chunk: int, state: Tensor) -> Tensor:
        """The state ``[B, G, R, K, V]`` decayed over a whole chunk: ``exp(L_C) S``."""
        return state


class ScalarDecay:
    """One decay per head and step: ``log_decay [B, N, G, R, C]``."""

    def __init__(self, log_decay: Tensor, dtype: torch.dtype):
        self._dtype = dtype
        self._sums = log_decay.double().clamp(min=STRONGEST).cumsum(-1)
        self._whole = self._sums[..., -1, None, None].to(dtype).exp().unbind(1)
        differences = (self._sums.unsqueeze(-1) - self._sums.unsqueeze(-2)).to(dtype)
        self._between = differences.masked_fill(
            _above_diagonal(self._sums.shape[-1], log_decay.device), -torch.inf
        ).exp()

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT) * self._between

    def from_start(self, x: Tensor) -> Tensor:
        return x * self._sums.to(self._dtype).exp().unsqueeze(-1)

    def to_end(self, x: Tensor) -> Tensor:
        return x * (self._sums[..., -1:] - self._sums).to(self._dtype).exp().unsqueeze(-1)

    def over(self, chunk: int, state: Tensor) -> Tensor:
        return state * self._whole[chunk]


class VectorDecay:
    """One decay per key dimension: ``log_decay [B, N, G, R, C, K]``, C a multiple of ``SUB_CHUNK``."""

    def __init__(self, log_decay: Tensor, dtype: torch.dtype):
        self._dtype = dtype
        self._sums = log_decay.double().clamp(min=STRONGEST).cumsum(-2)
        self._whole = self._sums[..., -1, :, None].to(dtype).exp().unbind(1)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Pairs in the same sub-chunk one by one, earlier keys by matrix products about the sub-chunk's start."""
        size = self._sums.shape[-2]
        rows = []
        for start in range(0, size, SUB_CHUNK):
            own = slice(start, start + SUB_CHUNK)
            row = [self._near(q[..., own, :], k[..., own, :], self._sums[..., own, :])]
            if start:
                row.insert(0, self._far(q[..., own, :], k[..., :start, :], start))
            rows.append(torch.nn.functional.pad(torch.cat(row, -1), (0, size - start - SUB_CHUNK)))
        return torch.cat(rows, -2)

    def _near(self, q: Tensor, k: Tensor, sums: Tensor) -> Tensor:
        differences = (sums.unsqueeze(-2) - sums.unsqueeze(-3)).to(self._dtype)
        above = _above_diagonal(SUB_CHUNK, q.device).unsqueeze(-1)
        decayed = k.unsqueeze(-3) * differences.masked_fill(above, -torch.inf).exp()
        return (decayed @ q.unsqueeze(-1)).squeeze(-1)

    def _far(self, q: Tensor, k: Tensor, start: int) -> Tensor:
        border = self._sums[..., start - 1 : start, :]
        own = self._sums[..., start : start + SUB_CHUNK, :]
        since = (own - border).to(self._dtype).exp()
        until = (border - self._sums[..., :start, :]).to(self._dtype).exp()
        return (q * since) @ (k * until).mT

    def from_start(self, x: Tensor) -> Tensor:
        return x * self._sums.to(self._dtype).exp()

    def to_end(self, x: Tensor) -> Tensor:
        return x * (self._sums[..., -1:, :] - self._sums).to(self._dtype).exp()

    def over(self, chunk: int, state: Tensor) -> Tensor:
        return state * self._whole[chunk]


Decay = NoDecay | ScalarDecay | VectorDecay


def chunk_heads(x: Tensor, chunks: Chunks, groups: int, dtype: torch.dtype) -> Tensor:
    """``[B, T, H, D]`` to ``[B, N, G, R, C, D]``."""
    return chunks.split(x.to(dtype)).movedim(2, 3).unflatten(2, (groups, -1))


def chunk_decay(log_decay: Tensor | None, chunks: Chunks, groups: int, dtype: torch.dtype) -> Decay:
    """The decay of a call, from ``None``, ``[H]``, ``[B, T, H]`` or ``[B, T, H, K]``."""
    if log_decay is None:
        return NoDecay()
    if log_decay.ndim == 1:
        log_decay = log_decay.expand(1, chunks.length, -1)
    if log_decay.ndim == 3:
        return ScalarDecay(chunk_heads(log_decay.unsqueeze(-1), chunks, groups, torch.float64).squeeze(-1), dtype)
    return VectorDecay(chunk_heads(log_decay, chunks, groups, torch.float64), dtype)


def join_heads(x: Tensor, chunks: Chunks) -> Tensor:
    """``[B, N, G, R, C, D]`` back to ``[B, T, H, D]``."""
    return chunks.join(x.flatten(2, 3).movedim(3, 2))
