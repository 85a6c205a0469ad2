"""The reference: the equations as they are written, a token at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch.ops.chunked.packing import over_sequences
from seqarch.ops.gated_rnn.inputs import GatedRnnInputs

TRANSFORMABLE = True

Step = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]]
"""From what input and last output give to each gate, and the states before a token, to those after it."""


def _slstm(x: Sequence[Tensor], r: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    z, i, f, o = (own + last for own, last in zip(x, r, strict=True))
    _, c, n, m = states
    m, forgotten = m.detach(), F.logsigmoid(f) + m.detach()
    after = torch.where(n == 0, i, torch.maximum(forgotten, i)).detach()
    write, keep = (i - after).exp(), (forgotten - after).clamp(max=0).exp()
    c, n = keep * c + write * z.tanh(), keep * n + write
    return o.sigmoid() * c / n, c, n, after


def _lstm(x: Sequence[Tensor], r: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    i, f, g, o = (own + last for own, last in zip(x, r, strict=True))
    c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Sequence[Tensor], r: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    reset, keep = (x[0] + r[0]).sigmoid(), (x[1] + r[1]).sigmoid()
    new = (x[2] + reset * r[2]).tanh()
    return (new + keep * (states[0] - new),)


STEPS: dict[str, Step] = {"slstm": _slstm, "lstm": _lstm, "gru": _gru}


def run(inputs: GatedRnnInputs) -> tuple[Tensor, Tensor]:
    weight, bias, step = inputs.weight.flatten(1, 2).mT, inputs.bias, STEPS[inputs.cell]
    gates = bias.shape[1]

    def sequence(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        # gradients are defined without tokens, too: zeros
        outputs = [] if x.shape[1] else [x[:, :0, :, 0] + 0 * (weight.sum() + bias.sum())]
        for own in x.unbind(1):
            # [H, B, W] times [H, W, gates W]
            r = (state[:, 0].transpose(0, 1) @ weight).transpose(0, 1).unflatten(-1, (gates, -1)) + bias
            state = torch.stack(step(own.unbind(2), r.unbind(2), state.unbind(1)), dim=1)
            outputs.append(state[:, :1])
        return torch.cat(outputs, dim=1), state.clone()

    h, state = over_sequences(sequence, inputs.offsets, inputs.state, inputs.x.to(inputs.state.dtype))
    return h.to(inputs.x.dtype), state
