"""Gated slot attention against its equations, slot by slot."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from seqarch.layers import build_mixer
from seqarch.layers.linear_attention.gated_slot_attention import GatedSlotAttention
from seqarch.testing import inputs


def test_slots_are_running_means_that_queries_attend_to():
    """``K_t = a K + (1 - a) k^T``, ``V_t`` alike, ``o = softmax(q K_t^T) V_t`` (section 3.1)."""
    torch.manual_seed(0)
    mixer, x = build_mixer("gated_slot_attention", d_model=32, num_heads=2, num_slots=5).double(), inputs(12)
    assert isinstance(mixer, GatedSlotAttention)
    torch.nn.init.normal_(mixer.forget.weight)
    q, k, v = F.silu(x @ mixer.qkv_proj.linear.weight.T).chunk(3, dim=-1)
    q, k, v = (m.unflatten(-1, (2, 16)) for m in (q, k, v))
    a = torch.sigmoid(x @ mixer.forget.weight.T).unflatten(-1, (2, 5)) ** (1 / 8)
    keys = values = torch.zeros(2, 2, 5, 16, dtype=torch.float64)
    outputs = []
    for t in range(12):
        gate = a[:, t].unsqueeze(-1)
        keys = gate * keys + (1 - gate) * k[:, t].unsqueeze(-2)
        values = gate * values + (1 - gate) * v[:, t].unsqueeze(-2)
        weights = (keys @ q[:, t].unsqueeze(-1)).squeeze(-1).softmax(-1)
        outputs.append((weights.unsqueeze(-2) @ values).squeeze(-2))
    o = F.silu(torch.stack(outputs, dim=1).flatten(2))
    o = o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * mixer.norm.weight
    y, state = mixer(x)
    torch.testing.assert_close(y, o @ mixer.out_proj.weight.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.recurrent, torch.cat([keys, values], dim=-1), rtol=0, atol=1e-12)
