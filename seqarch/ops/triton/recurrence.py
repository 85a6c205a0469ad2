"""Launches the Triton kernels of chunked recurrences.

A call's tokens are rows, numbered through the whole batch; sequences, packed or the entries of a batch, are cut into
chunks that hold tokens of one sequence each. What kernels need to know of that are three small tables per batch layout,
kept for the calls to come.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import triton
from torch import Tensor

from seqarch.ops.dispatch.inputs import RecurrenceInputs
from seqarch.ops.triton import availability, chunk_scores, chunk_state, decay_sums, launch, step, tiles
from seqarch.ops.triton.launch import PLAIN, TYPES, block, precision, rows, tuned

CHUNK: int = tiles.CHUNK.value
SUB: int = tiles.SUB.value
NONE, SCALAR, VECTOR = (kind.value for kind in (tiles.NONE, tiles.SCALAR, tiles.VECTOR))


@dataclass(frozen=True)
class Layout:
    """Where sequences and chunks lie among the rows, as int64 tensors on the device.

    Attributes:
        offsets: the first row of each sequence, and the number of rows.
        starts, ends: of each chunk its first row, and the end of its sequence.
        sequences: of each sequence its first chunk, and the number of chunks.
    """

    offsets: Tensor
    starts: Tensor
    ends: Tensor
    sequences: Tensor

    @classmethod
    @functools.lru_cache(maxsize=32)
    def of(cls, batch: int, length: int, offsets: tuple[int, ...] | None, device: torch.device) -> Layout:
        """The layout of a batch of sequences of one length, or of packed ones."""
        bounds = [n * length for n in range(batch + 1)] if offsets is None else list(offsets)
        starts = [range(first, last, CHUNK) for first, last in pairwise(bounds)]
        ends = [last for pieces, last in zip(starts, bounds[1:], strict=True) for _ in pieces]
        firsts = accumulate((len(pieces) for pieces in starts), initial=0)
        tables = (bounds, [row for pieces in starts for row in pieces], ends, list(firsts))
        return cls(*(torch.tensor(table, dtype=torch.int64).to(device) for table in tables))


@dataclass(frozen=True)
class DecayTerms:
    """The terms of the decays' gradient, which the kernel ``decay_gradients`` sums; the first dimensions are parts.

    Attributes:
        met: ``[..., rows, width]``, of each token's queries, and of its keys within the chunk; width is H or ``H K``.
        written: ``[parts, rows, width]``, of what each token's keys write to the state.
        carried: ``[parts, chunks, width]``, of the state that passes each chunk.
    """

    met: Tensor
    written: Tensor
    carried: Tensor


class Recurrence:
    """One call of a recurrence: its sizes and dtypes, its layout, and its decays as sums inside chunks.

    Args:
        inputs: of which log_decay is ``None``, ``[B, T, H]`` or ``[B, T, H, K]``.
        activations: the tensors whose dtypes decide on that of the products: bfloat16 if all are, else that of sums.
    """

    def __init__(self, inputs: RecurrenceInputs, activations: Sequence[Tensor]):
        k, v, log_decay, state = inputs.k, inputs.v, inputs.log_decay, inputs.state
        batch, length, self.heads, self.V = v.shape
        self.groups, self.K = k.shape[2:]
        self.rows = batch * length
        self.layout = Layout.of(batch, length, _packed(inputs), v.device)
        self.chunks, self.sequences = self.layout.starts.numel(), state.shape[0]
        self.sums = state.dtype
        same = all(x.dtype == torch.bfloat16 for x in activations)
        self.work = torch.bfloat16 if same and self.sums == torch.float32 else self.sums
        half = all(x.dtype.itemsize == 2 for x in activations)
        self.types = {"ACC": TYPES[self.sums]}
        # Triton's interpreter takes the bits of bfloat16 matrices for integers.
        products = self.sums if availability.interpreting() else self.work
        self.products = self.types | {"WORK": TYPES[products], "PRECISION": precision(exact=not half)}
        # Tiles and warps such that no thread runs out of registers: tests/data/triton_resources.json.
        narrow = self.work == torch.bfloat16
        self.warps = 4 if narrow and self.K <= 128 else 8
        self.most = 64 if narrow else 32
        few = 16 if not narrow else 64 if self.K <= 128 else 32
        self.BK, self.BV, self.part = block(self.K, self.most), block(self.V, self.most), block(self.K, few)
        self.bounds = self.layout.starts, self.layout.ends
        self.decay = NONE if log_decay is None else SCALAR if log_decay.ndim == 3 else VECTOR
        self.log_decay = k.new_empty(0, 0) if log_decay is None else rows(log_decay)
        self.decays = self._sums_of_decays(v)

    def _sums_of_decays(self, v: Tensor) -> tuple[Tensor, Tensor]:
        width = {NONE: 0, SCALAR: self.heads, VECTOR: self.heads * self.K}[self.decay]
        first, second = (v.new_empty(self.rows, width, dtype=self.sums) for _ in range(2))
        arguments = (self.log_decay, first, second, *self.bounds, self.log_decay.stride(0), self.heads)
        if self.decay == SCALAR:
            launch.launch(
                decay_sums.scalar_sums, self.chunks * triton.cdiv(self.heads, 32), *arguments, LANES=32, num_warps=1
            )
        elif self.decay == VECTOR:
            pieces = self.chunks * (CHUNK // SUB) * self.heads
            lanes = block(self.K, 256)
            launch.launch(decay_sums.vector_sums, pieces, *arguments, K=self.K, LANES=lanes, num_warps=1)
        return first, second

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor that kernels exchange: in the dtype of the products unless named."""
        return self.layout.starts.new_empty(shape, dtype=dtype or self.work)

    def scores(self, x: Tensor, y: Tensor, width: int, decayed: bool, scale: float, strict: bool = False) -> Tensor:
        """``[rows, H, CHUNK]``: ``scale x_i . y_j`` of tokens of one chunk, the decay between them counted or not.

        Args:
            x, y: rows of heads of this width.
            strict: leave out ``i = j``.
        """
        out = self.empty(self.rows, self.heads, CHUNK)
        sizes = (*self.bounds, scale, x.stride(0), y.stride(0))
        if decayed and self.decay == VECTOR:
            launch.launch(
                tuned(chunk_scores.vector_scores), self.chunks * (CHUNK // SUB) * self.heads,
                x, y, self.log_decay, *self.decays, out, *sizes, self.log_decay.stride(0), self.groups, self.heads,
                K=self.K, BLOCK=block(self.K, 256), STRICT=strict, **self.products,
            )  # fmt: skip
        else:
            launch.launch(
                tuned(chunk_scores.scores), self.chunks * self.heads,
                x, y, *self.decays, out, *sizes, x.shape[1] // width, y.shape[1] // width, self.heads,
                D=width, BLOCK=block(width, self.most), STRICT=strict, DECAY=self.decay if decayed else NONE,
                **self.products,
            )  # fmt: skip
        return out

    def states(self, x: Tensor, w: Tensor, initial: Tensor, scale: float, backward: bool) -> tuple[Tensor, Tensor]:
        """The state before each chunk from keys x and values w, ``[chunks, H, K, V]``, and the last one; backward, the
        gradient of the state after each chunk from queries x and gradients w, and that of the first."""
        out = self.empty(self.chunks, self.heads, self.K, self.V)
        last = torch.empty_like(initial)
        tiles = triton.cdiv(self.K, self.BK) * triton.cdiv(self.V, self.BV)
        kernel = tuned(chunk_state.states, 8, PLAIN) if self.decay == VECTOR else tuned(chunk_state.states)
        launch.launch(
            kernel, self.sequences * self.heads * tiles,
            x, w, *self.decays, initial, out, last, *self.bounds, self.layout.sequences, scale,
            x.stride(0), w.stride(0), self.groups, self.heads, BACKWARD=backward, **self._tiled(),
        )  # fmt: skip
        return out, last

    def outputs(
        self,
        x: Tensor,
        w: Tensor,
        scores: Tensor,
        states: Tensor,
        scale: float,
        dtype: torch.dtype,
        backward: bool = False,
        carried: bool = True,
    ) -> Tensor:
        """``[rows, H, V]``: ``scores w`` and what queries x read from states; backward, ``scores^T w`` and what keys x
        get from the gradients of states. Without ``carried``, of the scores alone."""
        out = self.empty(self.rows, self.heads, self.V, dtype=dtype)
        launch.launch(
            tuned(chunk_state.outputs), self.chunks * self.heads * triton.cdiv(self.V, self.BV),
            x, w, scores, *self.decays, states, out, *self.bounds, scale, x.stride(0), w.stride(0),
            self.groups, self.heads, BACKWARD=backward, CARRIED=carried, STRICT=False, **self._tiled(),
        )  # fmt: skip
        return out

    def decay_terms(self, calls: int) -> DecayTerms:
        """Uninitialised, for as many ``calls`` of :meth:`key_gradients`."""
        width = {NONE: 0, SCALAR: self.heads, VECTOR: self.heads * self.K}[self.decay]
        parts = 1 if self.decay == VECTOR else triton.cdiv(self.K, self.part)
        sides = calls if self.decay == VECTOR else 2 * calls
        met = self.empty(sides, parts, self.rows, width, dtype=self.sums)
        written = self.empty(parts, self.rows, width, dtype=self.sums)
        return DecayTerms(met, written, self.empty(parts, self.chunks, width, dtype=self.sums))

    def key_gradients(
        self,
        x: Tensor,
        y: Tensor,
        do: Tensor,
        w: Tensor,
        states: tuple[Tensor, Tensor],
        scale: float,
        decay_terms: DecayTerms,
        call: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """The gradients of queries x and keys y, ``[rows, G, K]`` each, in the dtype of sums.

        Args:
            do: rows of the gradient of what x reads.
            w: rows of the values under y.
            states: before each chunk, and the gradients of those after each.
            decay_terms: receives this call's terms of the decays' gradient.
            call: after the first, y has written to the states already, and a token does not meet itself.
        """
        again = call > 0
        dscores = self.scores(do, w, self.V, decayed=False, scale=1.0, strict=again)
        shared = 1 if self.decay == VECTOR else self.heads // self.groups
        few = self.heads // shared
        dx, dy = (self.empty(self.rows, few, self.K, dtype=self.sums) for _ in range(2))
        sides = (x, y, do, *states, dx), (y, x, w, *reversed(states), dy)
        for side, (own, other, values, read, rest, gradient) in enumerate(sides):
            if again and side and self.decay == VECTOR:
                dy.zero_()
                continue
            met = decay_terms.met[call if self.decay == VECTOR else 2 * call + side]
            launch.launch(
                tuned(chunk_state.gradients, 8), self.chunks * few * triton.cdiv(self.K, self.part),
                own, other, values, dscores, *self.decays, read, rest, gradient, met, decay_terms.written,
                decay_terms.carried, *self.bounds, self.chunks, self.rows, scale, own.stride(0), other.stride(0),
                values.stride(0), self.groups, self.heads, shared,
                BACKWARD=bool(side), CARRIED=not (side and again), STRICT=again, **self._tiled() | {"BK": self.part},
            )  # fmt: skip
        if self.decay != VECTOR:
            return dx, dy
        launch.launch(
            chunk_scores.vector_score_gradients, self.chunks * (CHUNK // SUB) * self.heads,
            x, y, self.log_decay, *self.decays, dscores, dx, dy, decay_terms.met[call], *self.bounds, scale,
            x.stride(0), y.stride(0), self.log_decay.stride(0), self.groups, self.heads,
            K=self.K, BLOCK=block(self.K, 256), STRICT=again, num_warps=self.warps, **self.products,
        )  # fmt: skip
        return dx.unflatten(1, (self.groups, -1)).sum(2), dy.unflatten(1, (self.groups, -1)).sum(2)

    def decay_gradients(self, decay_terms: DecayTerms) -> Tensor:
        """``[rows, H]`` or ``[rows, H K]``, in the dtype of sums; empty without decay."""
        parts, _, width = decay_terms.written.shape
        gradient = self.empty(self.rows, width, dtype=self.sums)
        launch.launch(
            decay_sums.decay_gradients, self.chunks * triton.cdiv(width, 64),
            decay_terms.met, decay_terms.written, decay_terms.carried, gradient, *self.bounds, self.chunks, self.rows,
            width, MET=decay_terms.met.shape[:2].numel(), PARTS=parts, LANES=64, num_warps=2,
        )  # fmt: skip
        return gradient

    def _tiled(self) -> dict[str, Any]:
        tiles = {"K": self.K, "V": self.V, "BK": self.BK, "BV": self.BV}
        return tiles | {"DECAY": self.decay} | self.products


def _packed(inputs: RecurrenceInputs) -> tuple[int, ...] | None:
    """The offsets as a key of :meth:`Layout.of`: an operator gets a list."""
    return None if inputs.offsets is None else tuple(inputs.offsets)


def steps(inputs: RecurrenceInputs, beta: Tensor | None = None, read: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Token by token, linear attention, or with beta the delta rule: ``o [B, T, H, V]`` and the last state."""
    q, k, v, log_decay, state = inputs.q, inputs.k, inputs.v, inputs.log_decay, inputs.state
    (batch, length, heads, V), (groups, K) = v.shape, k.shape[2:]
    layout = Layout.of(batch, length, _packed(inputs), v.device)
    out, last = v.new_empty(v.shape), torch.empty_like(state)
    decay = NONE if log_decay is None else SCALAR if log_decay.ndim == 3 else VECTOR
    absent = v.new_empty(0, 0)
    given = [absent if x is None else rows(x) for x in (q, k, v, beta, k if read is None else read, log_decay)]
    wide = block(V, 16)
    launch.launch(
        tuned(step.steps, 2), state.shape[0] * heads * triton.cdiv(V, wide),
        *given, state.contiguous(), out, last, layout.offsets, inputs.scale, *(x.stride(0) for x in given),
        groups, heads,
        K=K, V=V, BK=block(K, 256), BV=wide, DELTA=beta is not None, DECAY=decay,
        ACC=TYPES[state.dtype],
    )  # fmt: skip
    return out, last
