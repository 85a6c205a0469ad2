"""The reference: torch's own convolution over the concatenated history, all tokens at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqarch.ops.causal_conv1d.inputs import CausalConv1dInputs
from seqarch.ops.chunked.packing import join_sequences, sequences
from seqarch.ops.dispatch.eager import active_transform

TRANSFORMABLE = True


def _convolve(history: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[B, T + W - 1, D]`` to ``[B, T, D]``.

    As a two-dimensional convolution of height 1, whose channels-last layout is what ``history`` already has: on a CPU
    several times faster than ``conv1d``, which wants channels first. In float64, where torch has a slow loop
    for it, as a matrix product of the windows; under transforms, which have rules for neither, tap by tap.
    """
    if active_transform() is not None:
        length = history.shape[1] - weight.shape[1] + 1
        taps = [history[:, w : w + length] * weight[:, w] for w in range(weight.shape[1])]
        return torch.stack(taps).sum(0) if bias is None else torch.stack(taps).sum(0) + bias
    if weight.dtype == torch.float64:
        windows = history.unfold(1, weight.shape[1], 1).permute(2, 0, 1, 3)
        y = (windows.flatten(1, 2) @ weight.unsqueeze(-1)).view(windows.shape[:3]).permute(1, 2, 0)
        return y if bias is None else y + bias
    image = history.transpose(1, 2).unsqueeze(2)
    return F.conv2d(image, weight[:, None, None], bias, groups=weight.shape[0]).squeeze(2).transpose(1, 2)


def run(inputs: CausalConv1dInputs) -> tuple[Tensor, Tensor]:
    weight, bias, dtype = inputs.weight, inputs.bias, inputs.x.dtype
    outputs, states = [], []
    for state, x in sequences(inputs.offsets, inputs.initial_state(), inputs.x):
        history = torch.cat([state, x], dim=1)
        if x.numel():
            z = _convolve(history.to(weight.dtype), weight, bias)
        else:  # torch refuses to convolve nothing; this keeps the gradients defined: zeros
            z = x * weight[:, 0] if bias is None else x * weight[:, 0] + bias
        outputs.append((F.silu(z) if inputs.silu else z).to(dtype))
        states.append(history[:, x.shape[1] :].clone())  # a view would keep the whole history alive
    return join_sequences(outputs, dim=1), join_sequences(states, dim=0)
