"""Launches the Triton kernels of the delta rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from seqarch.ops.delta_rule import kernels
from seqarch.ops.delta_rule.inputs import DeltaRuleInputs
from seqarch.ops.triton import launch
from seqarch.ops.triton.launch import PLAIN, block, rows, tuned
from seqarch.ops.triton.recurrence import NONE, VECTOR, Recurrence


@dataclass(frozen=True)
class Solution:
    """The chunks' systems and what solves them.

    Attributes:
        scores: ``read_i . k_j``, decayed, ``i > j``: ``[rows, H, CHUNK]``.
        inverse: of the systems.
        recall: ``[rows, H, K]``, what the corrected values lose to the state before the chunk.
        u: the corrected values, ``[rows, H V]``.
        states: before each chunk, ``[chunks, H, K, V]``.
        last: the last state.
    """

    scores: Tensor
    inverse: Tensor
    recall: Tensor
    u: Tensor
    states: Tensor
    last: Tensor


class DeltaRule(Recurrence):
    """One call of the delta rule: a :class:`Recurrence` that corrects its values."""

    def __init__(self, inputs: DeltaRuleInputs):
        q, k, v, beta, read = inputs.q, inputs.k, inputs.v, inputs.beta, inputs.read
        super().__init__(inputs, (q, k, v) if read is None else (q, k, v, read))
        self.queries, self.keys, self.values, self.beta = rows(q), rows(k), rows(v), rows(beta)
        self.read = self.keys if read is None else rows(read)
        self.columns = block(self.V, 16 if self.decay == VECTOR else self.most // 2)
        self.whole = self._tiled() | {"BK": block(self.K, 256), "BV": self.columns}

    def forward(self, state: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The outputs, ``[rows, H, V]``, and the last state."""
        solution = self.solve(state)
        scores = self.scores(self.queries, self.keys, self.K, decayed=True, scale=scale)
        return self.outputs(self.queries, solution.u, scores, solution.states, scale, dtype), solution.last

    def solve(self, state: Tensor) -> Solution:
        """The corrected values, and the state before each chunk, from the one before the first."""
        scores = self.scores(self.read, self.keys, self.K, decayed=True, scale=1.0, strict=True)
        inverse = torch.empty_like(scores)
        launch.launch(
            tuned(kernels.invert, 8), self.chunks * self.heads,
            scores, self.beta, inverse, *self.bounds, self.beta.stride(0), self.heads,
            PRECISION="tf32x3", **self.types,
        )  # fmt: skip
        recall = self._solve(inverse, self.read, self.K, decayed=True)
        written = self._solve(inverse, self.values, self.V, decayed=False)
        u, last = torch.empty_like(written), torch.empty_like(state)
        states = self.empty(self.chunks, self.heads, self.K, self.V)
        launch.launch(
            tuned(kernels.corrected_states, 8, PLAIN), self._state_programs(),
            self.keys, recall, written, *self.decays, state, states, u, last, *self.bounds, self.layout.sequences,
            self.keys.stride(0), self.groups, self.heads, **self.whole,
        )  # fmt: skip
        return Solution(scores, inverse, recall, u, states, last)

    def _state_programs(self) -> int:
        return self.sequences * self.heads * triton.cdiv(self.V, self.columns)

    def _solve(self, inverse: Tensor, x: Tensor, width: int, decayed: bool) -> Tensor:
        """``inverse (beta x)``, x decayed from the chunk's start or not: ``[rows, H width]``."""
        out = self.empty(self.rows, self.heads * width)
        tile = block(width, self.most)
        launch.launch(
            tuned(kernels.solve), self.chunks * self.heads * triton.cdiv(width, tile),
            inverse, x, self.beta, *self.decays, out, *self.bounds, x.stride(0), self.beta.stride(0),
            x.shape[1] // width, self.heads, D=width, BLOCK=tile, DECAY=self.decay if decayed else NONE,
            **self.products,
        )  # fmt: skip
        return out

    def differentiate(self, do: Tensor, dlast: Tensor, state: Tensor, scale: float) -> list[Tensor]:
        """The gradients of q, k, v, beta, log_decay, read (part of that of k where it is k) and state."""
        solution = self.solve(state)
        u, states = solution.u, solution.states
        scores = self.scores(self.queries, self.keys, self.K, decayed=True, scale=scale)
        within = self.outputs(self.keys, do, scores, states, 1.0, self.work, backward=True, carried=False)
        du, dstates, dstate = torch.empty_like(u), torch.empty_like(states), torch.empty_like(dlast)
        launch.launch(
            tuned(kernels.corrected_gradients, 8, PLAIN), self._state_programs(),
            self.queries, self.keys, solution.recall, do, within, *self.decays, dlast, dstates, du, dstate,
            *self.bounds, self.layout.sequences, scale, self.queries.stride(0), self.keys.stride(0), do.stride(0),
            self.groups, self.heads, **self.whole,
        )  # fmt: skip
        z, dbeta = self._value_gradients(solution, du)
        decay_terms = self.decay_terms(2)
        both = states, dstates
        dq, dk = self.key_gradients(self.queries, self.keys, do, u, both, scale, decay_terms)
        dread, again = self.key_gradients(self.read, self.keys, z, u, both, 1.0, decay_terms, call=1)
        dk += again
        if self.read is self.keys:
            dk += dread
        return [dq, dk, -z, dbeta, self.decay_gradients(decay_terms), dread, dstate]

    def _value_gradients(self, solution: Solution, du: Tensor) -> tuple[Tensor, Tensor]:
        z, dbeta = torch.empty_like(du), self.empty(self.rows, self.heads, dtype=self.sums)
        launch.launch(
            tuned(kernels.value_gradients, 8, PLAIN), self.chunks * self.heads,
            solution.inverse, solution.scores, solution.u, du, self.values, self.beta, self.read, *self.decays,
            solution.states, z, dbeta, *self.bounds, self.values.stride(0), self.beta.stride(0), self.read.stride(0),
            self.groups, self.heads, **self._tiled(),
        )  # fmt: skip
        return z, dbeta
