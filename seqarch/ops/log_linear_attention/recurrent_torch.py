"""The reference: one token after the other, each level's state as the equation is written."""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.chunked.recurrence import join_tokens
from seqarch.ops.log_linear_attention.inputs import LogLinearAttentionInputs
from seqarch.ops.log_linear_attention.levels import as_slots, bits, carried, over_rows

TRANSFORMABLE = True


def run(inputs: LogLinearAttentionInputs) -> tuple[Tensor, Tensor]:
    return over_rows(_tokens, inputs)


def _tokens(inputs: LogLinearAttentionInputs) -> tuple[Tensor, Tensor]:
    q, k, v, beta, dtype = inputs.q, inputs.k, inputs.v, inputs.beta, inputs.state.dtype
    # a row per head of v, and matrices of one row: [B, T, H, 1, K]
    q, k = (x.to(dtype).repeat_interleave(v.shape[2] // x.shape[2], dim=2).unsqueeze(-2) for x in (q, k))
    v, weight = v.to(dtype).unsqueeze(-2), inputs.level_weight.to(dtype)
    beta = None if beta is None else beta.to(dtype)[..., None, None]
    decay = None if inputs.log_decay is None else inputs.log_decay.to(dtype).exp()[..., None, None, None]
    first = inputs.before[0] if inputs.before else 0
    states, outputs = {place: inputs.state[:, :, place] for place in bits(first)}, []
    for t in range(q.shape[1]):
        own = k[:, t].mT @ (v[:, t] if beta is None else beta[:, t] * v[:, t])
        if decay is not None and not states:
            own = own + 0 * decay[:, t].squeeze(2)  # a first token has a gradient of its decay: zeros
        places, seen = [*states], own.unsqueeze(2)
        if places:
            held = torch.stack([*states.values()], dim=2)  # [B, H, levels, K, V]
            if decay is not None:
                held = decay[:, t] * held
            if beta is not None:
                key = k[:, t].unsqueeze(2)
                held = held - key.mT @ (beta[:, t].unsqueeze(2) * (key @ held))
            states, seen = dict(zip(places, held.unbind(2), strict=True)), torch.cat([seen, held], dim=2)
        levels = torch.stack([weight[:, t, :, level] for level in (0, *(place + 1 for place in places))], dim=-1)
        query = (inputs.scale * q[:, t]).unsqueeze(2)
        outputs.append((levels[..., None, None] * (query @ seen)).sum(2))
        carried(states, own, 0)
    o = join_tokens(outputs, inputs, q, k, v, weight, *(x for x in (beta, decay) if x is not None))
    return o.to(inputs.v.dtype), as_slots(states, inputs.state, 2)
