"""The reference: one step after the other, as the equation is written."""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.chunked.packing import join_sequences, sequences
from seqarch.ops.selective_scan.inputs import SelectiveScanInputs
from seqarch.ops.selective_scan.pointwise import scaled_input, skip_and_gate, step_size

TRANSFORMABLE = True


def run(inputs: SelectiveScanInputs) -> tuple[Tensor, Tensor]:
    dtype = inputs.state.dtype
    A, B, C = (m.to(dtype) for m in (inputs.A, inputs.B, inputs.C))
    delta = step_size(inputs)
    pieces = sequences(inputs.offsets, inputs.state, scaled_input(inputs, delta), delta, B, C)
    outputs, states = zip(*[scan(u, delta, B, C, A, h) for h, u, delta, B, C in pieces], strict=True)
    return skip_and_gate(inputs, join_sequences(outputs, dim=1)), join_sequences(states, dim=0)


def scan(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, A: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """``u, delta [B, T, D]``, ``B, C [B, T, G, N]``, ``A [D, N]``, ``h [B, D, N]`` to y and the last state."""
    outputs, groups = [], B.shape[2]
    for t in range(u.shape[1]):
        write = u[:, t].unflatten(1, (groups, -1)).unsqueeze(-1) @ B[:, t].unsqueeze(-2)
        h = (delta[:, t].unsqueeze(-1) * A).exp() * h + write.flatten(1, 2)
        outputs.append((h.unflatten(1, (groups, -1)) @ C[:, t].unsqueeze(-1)).flatten(1))
    return torch.stack(outputs, dim=1) if outputs else u, h
