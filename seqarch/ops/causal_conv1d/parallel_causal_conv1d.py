"""The CUDA kernel of the package ``causal-conv1d``, on rows whose channels lie side by side.

The last rows, which are the state, are taken from the inputs here: the package has none for packed sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.chunked.packing import over_sequences
from seqarch.ops.dispatch import vendors
from seqarch.ops.native.custom_op import first_derivatives_only

WIDTHS = range(2, 5)
MULTIPLE = 8
"""Of this the channels and strides must be multiples, where channels lie side by side."""


def unavailable() -> str | None:
    return vendors.unavailable("causal_conv1d")


def refuse(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    silu: bool,
    offsets: tuple[int, ...] | None,
) -> str | None:
    if offsets is not None and state is not None:
        return "cu_seqlens and state are given, and causal_conv1d takes no states of packed sequences"
    if weight.shape[1] not in WIDTHS:
        return f"W is {weight.shape[1]}, expected {WIDTHS.start} to {WIDTHS.stop - 1}"
    if x.shape[2] % MULTIPLE:
        return f"D is {x.shape[2]}, expected a multiple of {MULTIPLE}"
    return vendors.refuse(vendors.FLOATS, x=x)


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    silu: bool,
    offsets: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    from causal_conv1d import causal_conv1d_fn  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    if x.stride(2) != 1 or any(stride % MULTIPLE for stride in x.stride()[:2]):
        x = x.contiguous()
    first = None if state is None else state.contiguous().transpose(1, 2)
    activation = "silu" if silu else None
    y = causal_conv1d_fn(
        x.transpose(1, 2), weight, bias, seq_idx=_numbers(offsets, x), initial_states=first, activation=activation
    )
    first_derivatives_only(
        "causal_conv1d: backend 'parallel_causal_conv1d'", "choose parallel_cuda or parallel_torch", y
    )
    rows = x.shape[0] if offsets is None else len(offsets) - 1
    if state is None:
        state = x.new_zeros(rows, weight.shape[1] - 1, x.shape[2])
    _, last = over_sequences(_last_rows, offsets, state, x)
    return y.transpose(1, 2), last


def _numbers(offsets: tuple[int, ...] | None, x: Tensor) -> Tensor | None:
    """The number of each token's sequence, ``[1, T]``."""
    if offsets is None:
        return None
    lengths = torch.tensor(offsets, device=x.device).diff()
    numbers = torch.arange(len(offsets) - 1, device=x.device, dtype=torch.int32)
    return numbers.repeat_interleave(lengths, output_size=x.shape[1])[None]


def _last_rows(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    width = state.shape[1]
    return x, torch.cat([state, x[:, max(0, x.shape[1] - width) :]], dim=1)[:, -width:]
