"""The CUDA kernel of the package ``causal-conv1d``, on rows whose channels lie side by side.

The last rows, which are the state, are taken from the inputs here: the package has none for packed sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.causal_conv1d.inputs import CausalConv1dInputs
from seqarch.ops.chunked.packing import join_sequences, sequences
from seqarch.ops.dispatch import vendors
from seqarch.ops.native.custom_op import first_derivatives_only

WIDTHS = range(2, 5)
MULTIPLE = 8
"""Of this the channels and strides must be multiples, where channels lie side by side."""


def unavailable() -> str | None:
    return vendors.unavailable("causal_conv1d")


def unsupported(inputs: CausalConv1dInputs) -> str | None:
    if inputs.offsets is not None and inputs.state is not None:
        return "cu_seqlens and state are given, and causal_conv1d takes no states of packed sequences"
    if inputs.weight.shape[1] not in WIDTHS:
        return f"W is {inputs.weight.shape[1]}, expected {WIDTHS.start} to {WIDTHS.stop - 1}"
    if inputs.x.shape[2] % MULTIPLE:
        return f"D is {inputs.x.shape[2]}, expected a multiple of {MULTIPLE}"
    return vendors.unsupported(vendors.FLOATS, x=inputs.x)


def run(inputs: CausalConv1dInputs) -> tuple[Tensor, Tensor]:
    from causal_conv1d import causal_conv1d_fn  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    x, offsets = inputs.x, inputs.offsets
    if x.stride(2) != 1 or any(stride % MULTIPLE for stride in x.stride()[:2]):
        x = x.contiguous()
    first = None if inputs.state is None else inputs.state.contiguous().transpose(1, 2)
    options = {"seq_idx": _numbers(offsets, x), "initial_states": first, "activation": "silu" if inputs.silu else None}
    y = causal_conv1d_fn(x.transpose(1, 2), inputs.weight, inputs.bias, **options)
    first_derivatives_only(
        "causal_conv1d: backend 'parallel_causal_conv1d'", "choose parallel_cuda or parallel_torch", y
    )
    pieces = sequences(offsets, inputs.initial_state(), x)
    return y.transpose(1, 2), join_sequences([_last_rows(*piece) for piece in pieces], dim=0)


def _numbers(offsets: tuple[int, ...] | None, x: Tensor) -> Tensor | None:
    """The number of each token's sequence, ``[1, T]``."""
    if offsets is None:
        return None
    lengths = torch.tensor(offsets, device=x.device).diff()
    numbers = torch.arange(len(offsets) - 1, device=x.device, dtype=torch.int32)
    return numbers.repeat_interleave(lengths, output_size=x.shape[1])[None]


def _last_rows(state: Tensor, x: Tensor) -> Tensor:
    width = state.shape[1]
    return torch.cat([state, x[:, max(0, x.shape[1] - width) :]], dim=1)[:, -width:]
