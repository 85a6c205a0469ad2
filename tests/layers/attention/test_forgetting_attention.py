"""Forgetting attention against its equations written out, and what it is of attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch.layers import build_mixer, measured_state_bytes
from seqarch.layers.attention.forgetting_attention import ForgettingAttention

PRO = {"qk_norm": True, "output_gate": True, "output_norm": True, "kv_shift": True}


def build(**options) -> ForgettingAttention:
    torch.manual_seed(0)
    mixer = build_mixer("forgetting_attention", d_model=32, num_heads=4, **options).double()
    assert isinstance(mixer, ForgettingAttention)
    return mixer


def inputs(length: int = 11) -> Tensor:
    return torch.randn(2, length, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def forgotten(mixer: ForgettingAttention, x: Tensor) -> Tensor:
    """``D_ij``, the log forget gates after j up to i, one sum after the other: ``[B, H, T, T]``."""
    log_f = torch.log(torch.sigmoid(x @ mixer.forget.weight.T + mixer.forget.bias))
    T = x.shape[1]
    sums = [[log_f[:, j + 1 : i + 1].sum(1) for j in range(T)] for i in range(T)]
    return torch.stack([torch.stack(row, dim=-1) for row in sums], dim=-2)


def read(mixer: ForgettingAttention, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shared = q.shape[2] // k.shape[2]
    k, v = (m.repeat_interleave(shared, dim=2) for m in (k, v))
    logits = torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5 + forgotten(mixer, x)
    hidden = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    return torch.einsum("bhij,bjhv->bihv", logits.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("pro", [False, True])
def test_it_is_its_equations(pro: bool):
    mixer, x = build(num_kv_heads=2, **(PRO if pro else {})), inputs()
    y = x @ mixer.qkv_proj.linear.weight.T
    q, k, v = (m.unflatten(-1, (-1, 8)) for m in y.split([32, 16, 16], dim=-1))
    if pro:
        for norm in (mixer.query_norm, mixer.key_norm, mixer.read_norm):
            torch.nn.init.uniform_(norm.weight, 0.5, 2)
        shares = torch.sigmoid(x @ mixer.shares.weight.T)[..., None]
        k, v = (
            share * F.pad(m, (0, 0, 0, 0, 1, 0))[:, :-1] + (1 - share) * m
            for m, share in ((k, shares[:, :, :2]), (v, shares[:, :, 2:]))
        )
        q, k = rms(q, mixer.query_norm.weight), rms(k, mixer.key_norm.weight)
    o = read(mixer, x, q, k, v)
    if pro:
        o = rms(o, mixer.read_norm.weight) * torch.sigmoid(x @ mixer.gate.weight.T).unflatten(-1, (4, 8))
    torch.testing.assert_close(mixer(x)[0], o.flatten(2) @ mixer.out_proj.weight.T, rtol=0, atol=1e-12)


def test_with_gates_of_1_it_is_attention_without_positions():
    mixer, x = build(forget_bias=100.0), inputs(40)
    torch.nn.init.zeros_(mixer.forget.weight)
    attention = build_mixer("attention", d_model=32, num_heads=4, position="none").double()
    attention.load_state_dict({name: m for name, m in mixer.state_dict().items() if not name.startswith("forget")})
    torch.testing.assert_close(mixer(x)[0], attention(x)[0], rtol=0, atol=1e-12)


def test_steps_hold_float32_where_sums_are_large():
    """After 3000 tokens that each forget half: the sums are 2000, of which float32 leaves neighbours three digits."""
    mixer, x = build(), inputs(3010)[:1]
    low = build().float()
    with torch.no_grad():
        exact = mixer(x)[0][:, -10:]
        _, state = low(x[:, :3000].float())
        assert state.forgotten.keys.dtype == torch.float32
        assert state.forgotten.keys[0, -1].abs().min() > 1500
        assert measured_state_bytes(state) == low.state_bytes(3000) == 3000 * 4 * (2 * 32 + 4)
        outputs = []
        for token in x[:, 3000:].float().split(1, dim=1):
            out, state = low(token, state)
            outputs.append(out)
    found = torch.cat(outputs, dim=1).double()
    assert ((found - exact).square().mean() / exact.square().mean()).sqrt() < 2e-4


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="kv_shift=True mixes tokens as a short convolution does: conv_width is 3"):
        build(kv_shift=True, conv_width=3)
