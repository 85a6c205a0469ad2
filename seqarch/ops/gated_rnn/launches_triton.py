"""Launches the Triton kernels of gated recurrences."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from seqarch.ops.gated_rnn import kernels
from seqarch.ops.gated_rnn.operators import CELLS, KernelInputs, empty_outputs
from seqarch.ops.triton import launch
from seqarch.ops.triton.launch import TYPES, block, rows
from seqarch.ops.triton.recurrence import Layout


class GatedRnn:
    """One call: its sizes, its layout and dtypes."""

    def __init__(self, inputs: KernelInputs):
        x = inputs.x
        batch, length, self.heads, gates, width = x.shape
        self.inputs, self.x = inputs, rows(x)
        self.layout = Layout.of(batch, length, inputs.offsets, x.device)
        self.programs = inputs.state.shape[0] * self.heads
        tile = block(width, 256)
        # such that no thread runs out of registers: tests/data/triton_resources.json
        warps = 4 if tile <= 32 else 8 if tile <= 64 or inputs.cell == "slstm" else 16
        self.constants = {
            "W": width,
            "BW": tile,
            "CELL": CELLS[inputs.cell],
            "GATES": gates,
            "STATES": inputs.state.shape[1],
            "ACC": TYPES[inputs.state.dtype],
            "num_warps": warps,
        }

    @property
    def read(self) -> tuple[Tensor, ...]:
        """What both kernels read first."""
        inputs = self.inputs
        return self.x, inputs.weight.contiguous(), inputs.bias.contiguous(), inputs.state.contiguous()

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """h, the last state, and the states of every step where they are kept."""
        o, last, steps = empty_outputs(self.inputs)
        launch.launch(
            kernels.forward, self.programs, *self.read, o, steps, last, self.layout.offsets, self.x.stride(0),
            self.heads, KEEP=self.inputs.keep, **self.constants,
        )  # fmt: skip
        return o, last, steps

    def differentiate(self, steps: Tensor, do: Tensor, dlast: Tensor) -> list[Tensor]:
        """The gradients of x, weight, bias and state."""
        x, state = self.inputs.x, self.inputs.state
        dx, dr = (torch.empty(x.shape, dtype=dtype, device=x.device) for dtype in (x.dtype, state.dtype))
        dstate = torch.empty(state.shape, dtype=state.dtype, device=x.device)
        launch.launch(
            kernels.backward, self.programs, *self.read, steps.contiguous(), do.contiguous(), dlast.contiguous(),
            dx, dr, dstate, self.layout.offsets, self.x.stride(0), self.heads, **self.constants,
        )  # fmt: skip
        dweight = torch.einsum("bthgi,bthj->hgij", dr, self._outputs_before(steps))
        return [dx, dweight, dr.sum((0, 1)), dstate]

    def _outputs_before(self, steps: Tensor) -> Tensor:
        """The output before each token ``[B, T, H, W]``: that of the state before a sequence's first."""
        h, initial, offsets = steps[:, :, 0], self.inputs.state[:, 0], self.inputs.offsets
        if offsets is None:
            return torch.cat([initial.unsqueeze(1), h], dim=1)[:, : h.shape[1]]
        begun = [(row, start) for row, (start, end) in enumerate(pairwise(offsets)) if end > start]
        before = h.roll(1, 1)
        if begun:
            own, starts = (torch.tensor(each, device=h.device) for each in zip(*begun, strict=True))
            before[0, starts] = initial[own]
        return before
