"""MesaNet and Gated KalmaNet against their equations, token by token, and where sequences are long."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers import build_mixer, clone_state
from seqarch.layers.linear_attention.gated_kalma_net import GatedKalmaNet
from seqarch.layers.linear_attention.mesa_net import MesaNet
from seqarch.layers.linear_attention.ridge_regression import RidgeRegression, RidgeRegressionState
from seqarch.testing import D_MODEL, assert_close, inputs

WIDTHS = {"num_heads": 2, "key_width": 6, "value_width": 5, "conv_width": 0}
NAMES = ("mesa_net", "gated_kalma_net")


def built(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    mixer = build_mixer(name, d_model=D_MODEL, **(WIDTHS | options)).double()
    for parameter in (parameter for parameter in mixer.parameters() if parameter.ndim == 1):
        torch.nn.init.normal_(parameter)
    return mixer


def heads(x: Tensor, *widths: int) -> list[Tensor]:
    return [part.unflatten(-1, (2, -1)) for part in x.split([2 * width for width in widths], dim=-1)]


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def mesa_reads(mixer: MesaNet, x: Tensor, state: RidgeRegressionState) -> tuple[Tensor, Tensor, Tensor]:
    """Section 2: what the sums are read by is ``(H + Lambda)^-1 q``."""
    q, k = heads(F.silu(x @ mixer.qk_proj.linear.weight.T), 6, 6)
    (v,) = heads(x @ mixer.value.linear.weight.T, 5)
    q, k = unit(q), unit(k)
    a, b = (torch.sigmoid(layer(x)) for layer in (mixer.decay, mixer.rate))
    ridge = torch.diag_embed(0.25 + F.softplus(mixer.ridge))
    covariance, sums, outputs = state.covariance, state.recurrent, []
    for t in range(x.shape[1]):
        kept, write = a[:, t, :, None, None], b[:, t, :, None, None] * k[:, t].unsqueeze(-1)
        covariance = kept * covariance + write * k[:, t].unsqueeze(-2)
        sums = kept * sums + write * v[:, t].unsqueeze(-2)
        read = torch.linalg.inv(covariance + ridge) @ q[:, t].unsqueeze(-1)
        outputs.append((read.mT @ sums).squeeze(-2))
    o = torch.stack(outputs, dim=1)
    return mixer.norm.weight * o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt(), sums, covariance


def kalma_reads(mixer: GatedKalmaNet, x: Tensor, state: RidgeRegressionState) -> tuple[Tensor, Tensor, Tensor]:
    """Section 3: a ridge of .02 of the Frobenius norm, and a share of the query as it is."""
    q, k, v = heads(F.silu(x @ mixer.qkv_proj.linear.weight.T), 6, 6, 5)
    b, share = (torch.sigmoid(layer(x)).unsqueeze(-1) for layer in (mixer.rates, mixer.mixing))
    q, k, v = unit(q), (b + 1e-6) * unit(k), (b + 1e-6) * v
    a = torch.exp(-mixer.A_log.exp() * F.softplus(x @ mixer.decay.weight.T + mixer.dt_bias))
    covariance, sums, outputs = state.covariance, state.recurrent, []
    for t in range(x.shape[1]):
        kept, write = a[:, t, :, None, None], k[:, t].unsqueeze(-1)
        covariance = kept * covariance + write * k[:, t].unsqueeze(-2)
        sums = kept * sums + write * v[:, t].unsqueeze(-2)
        norm = torch.linalg.matrix_norm(covariance)[..., None, None]
        read = torch.linalg.inv(covariance + 0.02 * norm * torch.eye(6).double()) @ q[:, t].unsqueeze(-1)
        read = q[:, t].unsqueeze(-1) + share[:, t].unsqueeze(-1) * (read - q[:, t].unsqueeze(-1))
        outputs.append((read.mT @ sums).squeeze(-2) / 6**0.5)
    o = torch.stack(outputs, dim=1)
    o = mixer.norm.weight * o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return o * F.silu(x @ mixer.gate.weight.T).unflatten(-1, (2, 5)), sums, covariance


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_the_inverse(name: str):
    """Of input, parameters and both parts of the state, from a state that other tokens left."""
    mixer, x = built(name), inputs(9).requires_grad_()
    with torch.no_grad():
        _, state = mixer(inputs(7, seed=2))
    state = RidgeRegressionState(None, *(part.requires_grad_() for part in state[1:]))
    reads: Any = {"mesa_net": mesa_reads, "gated_kalma_net": kalma_reads}[name]
    o, sums, covariance = reads(mixer, x, state)
    expected = (o.flatten(2) @ mixer.out_proj.weight.T, sums, covariance)
    y, after = mixer(x, clone_state(state))
    found = (y, after.recurrent, after.covariance)
    leaves = [x, state.recurrent, state.covariance, *mixer.parameters()]
    gradients = []
    for results in (found, expected):
        weights = [torch.linspace(-1, 1, each.numel()).double().cos().view_as(each) for each in results]
        total = torch.stack([(each * w).sum() for each, w in zip(results, weights, strict=True)]).sum()
        gradients.append(torch.autograd.grad(total, leaves))
    for own, theirs in zip(found, expected, strict=True):
        assert_close(own, theirs, 1e-12)
    for place, (own, theirs) in enumerate(zip(*gradients, strict=True)):
        if leaves[place] is state.covariance:  # which is symmetric: of a number and its mirror image the sum is told
            own, theirs = own + own.mT, theirs + theirs.mT
        assert_close(own, theirs, 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_no_iteration_is_kept_for_the_backward_pass(name: str):
    """Of 8 iterations, the solution and what is read by it one product each is in the graph."""
    mixer = built(name, iterations=8)
    with ops.record_calls() as calls:
        mixer(inputs(9).requires_grad_())
    products = [call for call in calls if call.op == "linear_attention" and call.inputs.k is calls[-1].inputs.k]
    assert [call.result[0].requires_grad for call in products] == [False] * 8 + [True] * 2


@pytest.mark.parametrize("name", NAMES)
def test_long_sequences_of_keys_that_are_much_alike(name: str):
    """Little is forgotten, and the largest eigenvalue of H is near the number of tokens: float32 beside float64."""
    options = MesaNet.Config.slow_gates if name == "mesa_net" else GatedKalmaNet.Config.slow_gates
    mixer = build_mixer(name, d_model=64, num_heads=2, **options).double()
    assert isinstance(mixer, RidgeRegression)
    torch.manual_seed(0)
    x = torch.randn(1, 1, 64).double() + 0.3 * torch.randn(1, 2500, 64).double()
    with torch.no_grad():
        expected, state = mixer(x)
    assert torch.linalg.eigvalsh(state.covariance).max() > 40
    given = x.float().requires_grad_()
    y, after = mixer.float()(given)
    assert_close(y.detach().double(), expected, 2e-4)
    assert torch.linalg.eigvalsh(after.covariance).min() > -1e-4
    y.square().sum().backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in (given, *mixer.parameters()))
    low = mixer.bfloat16()(x.bfloat16())[0].detach()
    assert_close(low.double(), expected, 0.1)


def test_the_default_iterations_solve_64_keys():
    """Far below the rounding of float32, if not to that of float64 as they do 32 keys; from split to split as well."""
    torch.manual_seed(0)
    mixer = build_mixer("gated_kalma_net", d_model=64, num_heads=2, key_width=64).double()
    torch.manual_seed(0)
    exact = build_mixer("gated_kalma_net", d_model=64, num_heads=2, key_width=64, iterations=100).double()
    x = torch.randn(1, 200, 64, dtype=torch.float64)
    with torch.no_grad():
        y, _ = mixer(x)
        assert_close(y, exact(x)[0], 1e-10)
        first, state = mixer(x[:, :131])
        assert_close(torch.cat([first, mixer(x[:, 131:], state)[0]], dim=1), y, 1e-10)


def test_tokens_of_zeros_are_read_as_zeros():
    """Nothing is written, and no norm is divided by."""
    for name in NAMES:
        mixer = build_mixer(name, d_model=D_MODEL)
        x = torch.zeros(1, 5, D_MODEL, requires_grad=True)
        y, _ = mixer(x)
        y.sum().backward()
        assert x.grad is not None
        assert not y.any()
        assert x.grad.isfinite().all()


def test_a_ridge_below_the_least_is_named():
    with pytest.raises(ValueError, match=r"first_ridge \(0.2\) must be above least_ridge \(0.25\)"):
        build_mixer("mesa_net", d_model=32, first_ridge=0.2)
