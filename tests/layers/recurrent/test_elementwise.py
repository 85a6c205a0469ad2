"""RG-LRU, HGRN and minGRU against their papers' equations, one token at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch.layers import build_mixer
from seqarch.layers.recurrent.rg_lru import complement
from seqarch.testing import assert_close, inputs

EXACT = 1e-12


def build(name: str, **options: Any) -> Any:
    """In float64, with every parameter moved from its initial value, so that none is 0 or 1."""
    torch.manual_seed(0)
    mixer = build_mixer(name, d_model=32, **options).double()
    for parameter in mixer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return mixer


def loop(decay: Tensor, write: Tensor) -> Tensor:
    h, outputs = torch.zeros_like(write[:, 0]), []
    for t in range(write.shape[1]):
        h = decay[:, t] * h + write[:, t]
        outputs.append(h)
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("scale_first", [False, True])
def test_rg_lru_is_its_equation(negative: bool, scale_first: bool):
    mixer = build("rg_lru", lru_width=48, num_heads=3, negative_eigenvalues=negative, scale_first=scale_first)
    mixer.Lambda.data += 4  # decays on both sides of 1/2
    x = inputs(20)
    u = F.conv1d(F.pad(mixer.in_proj(x).mT, (3, 0)), mixer.conv.weight.unsqueeze(1), mixer.conv.bias, groups=48).mT

    def gate(linear: Any) -> Tensor:
        return torch.sigmoid(u @ torch.block_diag(*linear.weight) + linear.bias.flatten())

    a = torch.sigmoid(-mixer.Lambda) ** (8 * gate(mixer.decay_gate))
    a = 2 * a - 1 if negative else a
    assert (a < 0).any() == negative
    scale = (1 - a**2).sqrt()
    if not scale_first:
        scale[:, 0] = 1
    h = loop(a, scale * gate(mixer.write_gate) * u)
    z = mixer.gate(x)
    gelu = z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    assert_close(mixer(x)[0], mixer.out_proj(h * gelu), EXACT)


def test_rg_lru_forgets_as_slowly_at_first_as_the_paper_says():
    torch.manual_seed(0)
    decay = (-8 * F.softplus(build_mixer("rg_lru", d_model=4096).Lambda.detach())).exp()
    assert 0.9 <= decay.min() < 0.901
    assert 0.998 < decay.max() <= 0.999
    assert abs(float(decay.mean()) - 0.9495) < 0.002


@pytest.mark.parametrize("signed", [False, True])
def test_the_scale_of_a_decay_of_one_is_right_and_its_gradient_finite(signed: bool):
    log_decay = torch.tensor([0.0, -1e-12, -1e-9, -1e-6, -1e-3, -0.5], requires_grad=True)
    scale = complement(log_decay, signed)
    wide = log_decay.detach().double()
    expected = -4 * wide.exp() * torch.expm1(wide) if signed else -torch.expm1(2 * wide)
    assert torch.allclose(scale.double(), expected.sqrt(), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(scale.sum(), log_decay)
    assert gradient.isfinite().all()
    assert (gradient < 0).all()
    assert gradient.abs().max() <= 4001  # 1000 times the derivative of 1 - a^2


def test_only_the_first_token_of_a_sequence_is_not_scaled():
    """Across calls and packed sequences, empty ones among them."""
    mixer, x = build("rg_lru"), inputs(12)
    whole, _ = mixer(x)
    state = None
    for piece, expected in zip(x.split((0, 1, 5, 6), 1), whole.split((0, 1, 5, 6), 1), strict=True):
        y, state = mixer(piece, state)
        assert torch.allclose(y, expected, rtol=0, atol=EXACT)
    packed, _ = mixer(torch.cat([x[:1], x[1:, :5]], dim=1), None, [0, 12, 12, 17])
    assert_close(packed[:, :12], whole[:1], EXACT)
    assert_close(packed[:, 12:], whole[1:, :5], EXACT)


@pytest.mark.parametrize("bound", [0.0, 0.5])
@pytest.mark.parametrize("complex_state", [False, True])
def test_hgrn_is_its_equation(bound: float, complex_state: bool):
    mixer, x = build("hgrn", lower_bound=bound, complex_state=complex_state), inputs(40)
    f = bound + (1 - bound) * torch.sigmoid(mixer.forget(x))
    candidate = mixer.in_proj(x) * torch.sigmoid(mixer.in_proj(x))
    if complex_state:
        decay = f * torch.exp(1j * mixer.theta)
        h = loop(decay, (1 - f) * torch.complex(*candidate.chunk(2, dim=-1)))
        h = torch.cat([h.real, h.imag], dim=-1)
    else:
        h = loop(f, (1 - f) * candidate)
    centred = h - h.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight + mixer.norm.bias
    gate = mixer.gate(x) * torch.sigmoid(mixer.gate(x))
    assert_close(mixer(x)[0], mixer.out_proj(normed * gate), EXACT)


@pytest.mark.parametrize("candidate", ["linear", "positive"])
@pytest.mark.parametrize("negative", [False, True])
def test_min_gru_is_its_equation(candidate: str, negative: bool):
    mixer, x = build("min_gru", candidate=candidate, negative_eigenvalues=negative), inputs(40)
    z, c = mixer.in_proj(x).chunk(2, dim=-1)
    z = (2 if negative else 1) * torch.sigmoid(z)
    if candidate == "positive":
        c = torch.where(c >= 0, c + 0.5, torch.sigmoid(c))
        assert (c > 0).all()
    assert_close(mixer(x)[0], loop(1 - z, z * c), EXACT)


def test_min_gru_keeps_the_parity_of_a_sequence_with_negative_eigenvalues():
    """A decay of -1 at a one and of 1 at a zero flips and holds: what no decay in (0, 1) can do."""
    mixer = build_mixer("min_gru", d_model=32, negative_eigenvalues=True).double()
    bits = torch.randint(0, 2, (4, 200), generator=torch.Generator().manual_seed(0))
    x = torch.zeros(4, 200, 32, dtype=torch.float64)
    x[..., 0] = 2.0 * bits - 1
    x[:, 0, :2] = torch.tensor([0.0, 1.0])  # the start: a half written, a decay of 0
    with torch.no_grad():
        mixer.in_proj.weight.zero_()
        mixer.in_proj.bias.zero_()
        mixer.in_proj.weight[0, 0] = 40.0
        mixer.in_proj.weight[32, 1] = 1.0
        y, _ = mixer(x)
    odd = bits[:, 1:].cumsum(1) % 2
    assert torch.allclose(y[:, 1:, 0], 1.0 - 2 * odd.double(), atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("min_gru", {"candidate": "linaer"}, "Did you mean 'linear'"),
        ("hgrn", {"lower_bound": 1.0}, "lower_bound must be below 1"),
        ("rg_lru", {"lru_width": 48, "num_heads": 5}, r"num_heads \(5\) must divide the inner width \(48\)"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        build_mixer(name, d_model=32, **options)
