"""Convolutions, S4D and Hyena against their papers' equations, written as sums and loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch.layers import build_mixer
from seqarch.layers.modules.long_conv import fft_length, long_conv
from seqarch.testing import assert_close, inputs

EXACT = 1e-11


def build(name: str, **options: Any) -> Any:
    """In float64, with every parameter moved from its initial value."""
    torch.manual_seed(0)
    mixer = build_mixer(name, d_model=32, **options).double()
    for parameter in mixer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return mixer


def direct(x: Tensor, filters: Tensor) -> Tensor:
    """``y_t = sum_s h_s x_{t - s}``."""
    return torch.stack([sum(filters[s] * x[:, t - s] for s in range(t + 1)) for t in range(x.shape[1])], dim=1)


@pytest.mark.parametrize("length", [1, 2, 5, 17, 64])
@pytest.mark.parametrize("before", [0, 1, 30])
def test_a_long_convolution_is_a_sum_over_the_past(length: int, before: int):
    x, filters = torch.randn(2, before + length, 3).double(), torch.randn(before + length, 3).double()
    leaves = [x.requires_grad_(), filters.requires_grad_()]
    got = long_conv(x[:, before:], filters, x[:, :before] if before else None)
    expected = direct(x, filters)[:, before:]
    assert_close(got, expected, EXACT)
    weights = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), leaves) for y in (got, expected)), strict=True):
        assert_close(a, b, EXACT)


def test_transforms_have_fast_lengths_that_are_not_much_longer():
    for least in range(1, 3000):
        length = fft_length(least)
        assert least <= length <= max(least * 4 / 3, least + 1)
        for factor in (2, 3, 5):
            while length % factor == 0:
                length //= factor
        assert length == 1


@pytest.mark.parametrize("init", ["lin", "inv", "legs"])
def test_s4d_is_a_state_space_under_zero_order_hold(init: str):
    mixer, x = build("s4d", init=init, d_state=8), inputs(40)
    A = torch.complex(-mixer.log_A_real.exp(), mixer.A_imag)
    C = torch.view_as_complex(mixer.C)
    decay = torch.exp(mixer.log_dt.exp()[:, None] * A)
    B = (decay - 1) / A
    h, outputs = torch.zeros(2, *A.shape, dtype=A.dtype), []
    for t in range(x.shape[1]):
        h = decay * h + B * x[:, t, :, None]
        both = (C * h).sum(-1) + (C.conj() * h.conj()).sum(-1)
        outputs.append(both.real + mixer.D * x[:, t])
    value, gate = mixer.out_proj(F.gelu(torch.stack(outputs, dim=1))).chunk(2, dim=-1)
    assert_close(mixer(x)[0], value * torch.sigmoid(gate), EXACT)


def test_s4d_starts_as_the_paper_says():
    mixers = {init: build_mixer("s4d", d_model=32, init=init) for init in ("lin", "inv", "legs")}
    n = torch.arange(32.0)
    expected = {"lin": math.pi * n, "inv": 64 / math.pi * (64 / (2 * n + 1) - 1)}
    # LegS: the eigenvalues of HiPPO's matrix plus the rank-one term that makes it normal
    root = (2 * torch.arange(64.0).double() + 1).sqrt()
    hippo = -torch.outer(root, root).tril(-1) - torch.diag(torch.arange(64.0).double() + 1)
    eigenvalues = torch.linalg.eigvals(hippo + torch.outer(root, root) / 2)
    assert torch.allclose(eigenvalues.real, torch.full((64,), -0.5).double())
    expected["legs"] = eigenvalues.imag[eigenvalues.imag > 0].sort().values.float()
    for init, mixer in mixers.items():
        assert torch.allclose(mixer.A_imag[5], expected[init], rtol=1e-5)
        assert torch.allclose(-mixer.log_A_real.exp(), torch.tensor(-0.5))
        assert 0.001 <= mixer.log_dt.exp().min() < mixer.log_dt.exp().max() <= 0.1


def test_s4d_in_float32_stays_near_float64_over_thousands_of_tokens():
    torch.manual_seed(0)
    mixer = build_mixer("s4d", d_model=32)
    x = torch.randn(1, 5000, 32)
    with torch.no_grad():
        (low, state), (high, wide) = mixer(x), mixer.double()(x.double())
    assert_close(low, high, 1e-5)
    assert_close(state.recurrent, wide.recurrent, 1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_a_gated_short_convolution_is_its_equation(bias: bool):
    mixer, x = build("gated_short_conv", bias=bias), inputs(20)
    before, after, u = mixer.in_proj(x).split(32, dim=-1)
    z = before * u
    taps = mixer.conv.weight.unbind(-1)
    sums = [sum(tap * z[:, t - s] for s, tap in enumerate(reversed(taps)) if s <= t) for t in range(20)]
    y = torch.stack(sums, dim=1) + (mixer.conv.bias if bias else 0)
    assert_close(mixer(x)[0], mixer.out_proj(after * y), EXACT)
    # the last two tokens, the same at every length
    assert mixer.float().state_bytes(7) == mixer.state_bytes(7000) == 2 * 32 * 4


@pytest.mark.parametrize("order", [1, 2, 3])
def test_hyena_is_its_equation(order: int):
    mixer, x = build("hyena", order=order, length=50, filter_features=3), inputs(40)
    weight = mixer.conv.weight.unsqueeze(1)
    u = F.conv1d(F.pad(mixer.in_proj(x).mT, (2, 0)), weight, mixer.conv.bias, groups=len(weight))
    z, *gates = u.mT.split(32, dim=-1)
    filters = hyena_filters(mixer.filters, 40, 50, order)
    for gate, h, skip in zip(gates, filters, mixer.skip, strict=True):
        z = gate * (direct(z, h) + skip * z)
    assert_close(mixer(x)[0], mixer.out_proj(z), EXACT)


def hyena_filters(network: Any, length: int, unit: int, order: int) -> list[Tensor]:
    """``[T, D]`` each: the network of sines of the encoded positions, times windows from slow to fast."""
    rows = []
    for t in range(length):
        turns = [2 * math.pi * k * t / unit for k in range(3)]
        hidden = torch.tensor([t / unit, *map(math.cos, turns), *map(math.sin, turns)], dtype=torch.float64)
        for layer in (network.first, network.second, network.third):
            hidden = torch.sin(network.frequency * layer(hidden))
        rates = [math.log(100) / 1.5 + (math.log(100) / 0.3 - math.log(100) / 1.5) * d / 31 for d in range(32)]
        window = torch.tensor([math.exp(-rate * t / unit) for rate in rates], dtype=torch.float64)
        rows.append(network.last(hidden).view(order, 32) * window)
    return list(torch.stack(rows, dim=1))


@pytest.mark.parametrize("unit", [64, 1024, 16384])
def test_hyenas_filters_start_with_a_norm_near_one(unit: int):
    torch.manual_seed(0)
    with torch.no_grad():
        norms = build_mixer("hyena", d_model=64, length=unit).filters(2 * unit).norm(dim=1)
    assert 0.8 < norms.square().mean().sqrt() < 1.2


def test_hyenas_frequency_may_be_a_whole_number():
    whole, other = (build("hyena", filter_frequency=frequency).filters.frequency for frequency in (3, 3.0))
    assert torch.equal(whole, other)


def test_hyenas_filters_go_on_beyond_their_unit_and_fade():
    filters = build("hyena", length=50).filters
    long = filters(200)
    assert_close(long[:, :50], filters(50), EXACT)
    assert long[:, 100:].norm() < 0.02 * long[:, :50].norm()


def test_hyenas_steps_follow_a_change_of_the_parameters():
    """The filters that steps remember without gradients are those of the parameters as they are."""
    mixer, x = build("hyena"), inputs(12)
    with torch.no_grad():
        for change in (lambda: mixer.filters.last.weight.data.mul_(2), mixer.float, mixer.double):
            _, state = mixer(x[:, :10].to(mixer.skip.dtype))
            _, state = mixer(x[:, 10:11].to(mixer.skip.dtype), state)
            change()
            step = x[:, 11:].to(mixer.skip.dtype)
            state = state._replace(**{name: getattr(state, name).to(step.dtype) for name in ("conv", "inputs")})
            got, _ = mixer(step, state)
            with torch.enable_grad():
                expected, _ = mixer(step, state)
            assert_close(got, expected, EXACT)


def test_hyena_pads_rows_of_different_lengths_with_nothing():
    """Rows that grew apart in packed calls hold no more than the longest of them."""
    mixer = build("hyena")
    _, state = mixer(inputs(10, 1), None, [0, 9, 10])
    assert state.lengths == (9, 1)
    _, state = mixer(inputs(9, 1), state, [0, 1, 9])
    assert state.lengths == (10, 9)
    assert state.inputs.shape[2] == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 3}, "d_state must be even"),
        ({"init": "leg"}, "Did you mean 'legs'"),
        ({"dt_min": 0.2}, r"dt_min \(0.2\) must not be above dt_max \(0.1\)"),
    ],
)
def test_wrong_options_of_s4d_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        build_mixer("s4d", d_model=32, **options)
