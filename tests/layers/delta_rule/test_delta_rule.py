"""The mixers on the delta rule against plain loops over their papers' equations, and what they are of each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers import build_mixer
from seqarch.layers.delta_rule.base import DeltaRuleMixer
from seqarch.layers.delta_rule.kda import KDA
from seqarch.layers.delta_rule.rwkv7 import Rwkv7

SHARED_KEYS = {"num_heads": 4, "num_key_heads": 2, "key_width": 6, "expand_v": 1.5}


def build(name: str, **options) -> DeltaRuleMixer:
    torch.manual_seed(0)
    mixer = build_mixer(name, d_model=32, **options).double()
    assert isinstance(mixer, DeltaRuleMixer)
    return mixer


def inputs(length: int = 9, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def projected(mixer: DeltaRuleMixer, x: Tensor, steps: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Unit q, unit k and v, a head of values each: ``[B, T, H, ...]``, or ``[B, T, n, H, ...]`` for k and v."""
    (groups, keys), (heads, values) = mixer.config.key_shape, mixer.config.value_shape
    assert mixer.qkv_proj.conv is not None
    weight = mixer.qkv_proj.conv.weight
    y = x @ mixer.qkv_proj.linear.weight.T
    y = F.silu(sum(F.pad(y, (0, 0, 3 - i, 0))[:, : y.shape[1]] * weight[:, i] for i in range(4)))
    q, k, v = y.split([groups * keys, steps * groups * keys, steps * heads * values], dim=-1)
    q, k, v = (
        q.unflatten(-1, (1, groups, keys)),
        k.unflatten(-1, (steps, groups, keys)),
        v.unflatten(-1, (steps, heads, values)),
    )
    q, k = (m / (m.square().sum(-1, keepdim=True) + 1e-6).sqrt() for m in (q, k))
    q, k = (m.repeat_interleave(heads // groups, dim=3) for m in (q, k))
    return q.squeeze(2), k, v


def decays(mixer: DeltaRuleMixer, logits: Tensor) -> Tensor:
    """``[B, T, H, 1]`` or ``[B, T, H, K]``."""
    heads = len(mixer.A_log)
    rate = mixer.A_log.exp()[:, None]
    return torch.exp(-rate * torch.log1p(torch.exp(logits + mixer.dt_bias)).unflatten(-1, (heads, -1)))


def run(q: Tensor, k: Tensor, v: Tensor, erase: Tensor, write: Tensor, decay: Tensor) -> Tensor:
    """``S = prod_i (I - k_i (erase_i * k_i)^T) diag(decay) S + ...``: every factor as the K x K matrix that it is."""
    batch, length, steps, heads, keys = k.shape
    state, outputs = torch.zeros(batch, heads, keys, v.shape[-1], dtype=v.dtype), []
    for t in range(length):
        state = torch.diag_embed(decay[:, t].expand(batch, heads, keys)) @ state
        for i in range(steps):
            key = k[:, t, i, :, :, None]
            reflection = torch.eye(keys).double() - key @ (erase[:, t, i] * k[:, t, i])[:, :, None]
            state = reflection @ state + key @ (write[:, t, i] * v[:, t, i])[:, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * keys**-0.5)
    return torch.stack(outputs, dim=1)


def left(mixer: DeltaRuleMixer, o: Tensor, gate: Tensor) -> Tensor:
    normed = o * (o.square().mean(-1, keepdim=True) + mixer.config.norm_eps).rsqrt() * mixer.norm.weight
    return (normed.flatten(2) * gate) @ mixer.out_proj.weight.T


def test_gated_delta_net_is_its_equation():
    mixer, x = build("gated_delta_net", **SHARED_KEYS, norm_eps=1e-3), inputs()
    torch.nn.init.uniform_(mixer.norm.weight, 0.5, 2)
    a, b = (x @ mixer.ab_proj.weight.T).split(4, dim=-1)
    beta = b.sigmoid()[:, :, None, :, None]
    o = run(*projected(mixer, x), beta, beta, decays(mixer, a))
    same(mixer(x)[0], left(mixer, o, F.silu(x @ mixer.gate.weight.T)))


@pytest.mark.parametrize("negative", [False, True])
def test_kda_is_its_equation(negative: bool):
    mixer, x = build("kda", num_heads=2, key_width=6, gate_rank=5, negative_eigenvalues=negative), inputs()
    torch.nn.init.uniform_(mixer.norm.weight, 0.5, 2)
    beta = (x @ mixer.beta_proj.weight.T).sigmoid()[:, :, None, :, None] * (1 + negative)
    decay = decays(mixer, x @ mixer.decay[0].weight.T @ mixer.decay[1].weight.T)
    assert decay.shape == (2, 9, 2, 6)
    o = run(*projected(mixer, x), beta, beta, decay)
    same(mixer(x)[0], left(mixer, o, (x @ mixer.gate[0].weight.T @ mixer.gate[1].weight.T).sigmoid()))


def test_gated_delta_net_2_is_its_equation():
    mixer, x = build("gated_delta_net_2", num_heads=2, expand_v=0.5, negative_eigenvalues=True), inputs()
    q, k, v = projected(mixer, x)
    erase, write = (x @ mixer.beta_proj.weight.T).sigmoid().split([32, 16], dim=-1)
    decay = decays(mixer, x @ mixer.decay[0].weight.T @ mixer.decay[1].weight.T)
    o = run(q, k, v, 2 * erase.view_as(k), write.view_as(v), decay)
    same(mixer(x)[0], left(mixer, o, (x @ mixer.gate[0].weight.T @ mixer.gate[1].weight.T).sigmoid()))


def test_gated_delta_product_is_its_equation():
    mixer, x = build("gated_delta_product", steps=3, **SHARED_KEYS), inputs()
    a, b = (x @ mixer.ab_proj.weight.T).split([4, 12], dim=-1)
    beta = 2 * b.sigmoid().unflatten(-1, (3, 4))[..., None]
    o = run(*projected(mixer, x, steps=3), beta, beta, decays(mixer, a))
    same(mixer(x)[0], left(mixer, o, F.silu(x @ mixer.gate.weight.T)))


def corrected(q: Tensor, k: Tensor, v: Tensor, p: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    """``S_t = a_t S_{t-1} + beta_t k_t^T (v_t - p_t S_{t-1})``, read by q, a step at a time."""
    state, outputs = torch.zeros(*q[:, 0].shape, v.shape[-1], dtype=v.dtype), []
    for t in range(q.shape[1]):
        wrong = v[:, t] - torch.einsum("bhk,bhkv->bhv", p[:, t], state)
        written = torch.einsum("bhk,bhv->bhkv", beta[:, t, :, None] * k[:, t], wrong)
        state = decay[:, t, :, :, None] * state + written
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("rate", [1.0, 100.0])
def test_comba_is_its_equation(rate: float):
    """Also where states are forgotten at once, whose decays the operation cannot divide by."""
    mixer, x = build("comba", **SHARED_KEYS, output_correction=0.3), inputs()
    torch.nn.init.uniform_(mixer.norm.weight, 0.5, 2)
    torch.nn.init.uniform_(mixer.feedback, -1, 1)
    torch.nn.init.uniform_(mixer.D, 0.2, 0.9)
    with torch.no_grad():
        mixer.A_log += torch.tensor(rate).log()
    a, b = (x @ mixer.ab_proj.weight.T).split(4, dim=-1)
    q, k, v = projected(mixer, x)
    k, v = k.squeeze(2), v.squeeze(2)
    p = mixer.feedback.sigmoid().repeat_interleave(2)[:, None] * k
    q = q - mixer.D.repeat_interleave(2)[:, None] * p
    decay = decays(mixer, a).clamp(min=math.exp(-60))
    o = corrected(q, k, v, p, b.sigmoid(), decay)
    same(mixer(x)[0], left(mixer, o, (x @ mixer.gate.weight.T).sigmoid()))


def test_jet_block_is_its_equation():
    mixer, x = build("jet_block", **SHARED_KEYS, tap_reduction=3), inputs()
    torch.nn.init.uniform_(mixer.norm.weight, 0.5, 2)
    torch.nn.init.normal_(mixer.qkv_proj.conv.taps[2].weight)
    q, k, v = (x @ mixer.qkv_proj.linear.weight.T).split([12, 12, 36], dim=-1)
    first, _, second = mixer.qkv_proj.conv.taps
    taps = (F.silu(x @ first.weight.T) @ second.weight.T + second.bias).unflatten(-1, (36, 4))
    assert first.weight.shape == (10, 32)
    windows = F.pad(v, (0, 0, 3, 0)).unfold(1, 4, 1)  # [B, T, 36, 4], the token itself last
    v = F.silu((windows * taps).sum(-1)).unflatten(-1, (4, 9))
    q, k = (F.silu(m).unflatten(-1, (2, 6)).repeat_interleave(2, dim=2) for m in (q, k))
    q, k = (m / (m.square().sum(-1, keepdim=True) + 1e-6).sqrt() for m in (q, k))
    a, b = (x @ mixer.ab_proj.weight.T).split(4, dim=-1)
    beta = b.sigmoid()[:, :, None, :, None]
    o = run(q, k.unsqueeze(2), v.unsqueeze(2), beta, beta, decays(mixer, a))
    same(mixer(x)[0], left(mixer, o, F.silu(x @ mixer.gate.weight.T)))


def test_one_step_a_token_is_gated_delta_net():
    mixer = build("gated_delta_product", steps=1, negative_eigenvalues=False)
    other = build("gated_delta_net")
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(mixer(inputs())[0], other(inputs())[0])


def test_gates_of_one_scalar_are_kda():
    mixer, other = build("gated_delta_net_2"), build("kda")
    shared = {name: value for name, value in mixer.state_dict().items() if name != "beta_proj.weight"}
    other.load_state_dict({**shared, "beta_proj.weight": torch.zeros_like(other.beta_proj.weight)})
    torch.nn.init.zeros_(mixer.beta_proj.weight)
    same(mixer(inputs())[0], other(inputs())[0])


def test_two_reflections_rotate():
    """A turn by a third of a circle: no single step has complex eigenvalues, and three turns are none."""
    mixer = build("gated_delta_product", num_heads=1, key_width=2, expand_v=1, conv_width=0)
    torch.nn.init.constant_(mixer.dt_bias, -1e3)  # no decay
    mixer.beta = lambda logits: torch.full_like(logits, 2.0)
    angles = torch.tensor([0.0, torch.pi / 3], dtype=torch.float64)
    k = torch.stack([angles.cos(), angles.sin()], dim=-1).view(1, 1, 4).repeat(1, 3, 1).unflatten(-1, (2, 2))
    nothing = torch.zeros(1, 3, 2, 2).double()
    unit = torch.eye(2).double()[None, None]
    third = mixer.recurrence(inputs(1, 1), nothing[:, :1, :1], k[:, :1], nothing[:, :1], unit, None)[1]
    same(third[0, 0].trace(), torch.tensor(-1.0).double())
    same(mixer.recurrence(inputs(3, 1), nothing[:, :, :1], k, nothing, unit, None)[1], unit)


@pytest.mark.parametrize(("name", "least"), [("gated_delta_net", 0.0), ("kda", 1.0)])
def test_decays_start_as_in_the_releases(name: str, least: float):
    mixer = build_mixer(name, d_model=2048)
    assert isinstance(mixer, DeltaRuleMixer)
    rate, step = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert least <= rate.min() < rate.max() <= 16.001
    assert 0.99e-3 <= step.min() < step.max() <= 0.101


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads .3. must divide d_model"),
        ({"num_heads": 4, "num_key_heads": 3}, "num_key_heads .3. must divide num_heads .4."),
        ({"key_width": 5, "expand_v": 0.5}, "expand_v . key_width must be a whole number, got 2.5"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        build_mixer("kda", d_model=32, **options)


@pytest.mark.parametrize("residual", ["none", "give", "take"])
def test_rwkv7_is_its_equation(residual: str):
    torch.manual_seed(0)
    options = {"num_heads": 2, "gate_rank": 7, "value_residual": residual, "value_rank": 5}
    mixer, x = build_mixer("rwkv7", d_model=32, **options).double(), inputs()
    assert isinstance(mixer, Rwkv7)
    for parameter in (mixer.bonus, mixer.replacement, mixer.norm.weight, mixer.norm.bias):
        torch.nn.init.uniform_(parameter, -1, 1)
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
    r, w, k, v, a, g = (x + (before - x) * mix for mix in mixer.shares)

    def low_rank(x: Tensor, name: str) -> Tensor:
        first, between, last = getattr(mixer, name)
        return between(x @ first.weight.T) @ last.weight.T + (0 if last.bias is None else last.bias)

    r, k, v = (m @ linear.weight.T for m, linear in ((r, mixer.receptance), (k, mixer.key), (v, mixer.value)))
    w, a, g = (
        torch.exp(-(torch.e**-0.5) * low_rank(w, "decay").sigmoid()),
        low_rank(a, "rate").sigmoid(),
        low_rank(g, "gate"),
    )
    own, first = v, torch.randn_like(v)
    if residual == "take":
        v = v + (first - v) * low_rank(x + (before - x) * mixer.shares[3], "value_gate").sigmoid()
    z = F.normalize((k * mixer.removal).unflatten(-1, (2, 16)), dim=-1)
    k = k * (1 + (a - 1) * mixer.replacement)
    r, w, k, v, a = (m.unflatten(-1, (2, 16)) for m in (r, w, k, v, a))
    state, outputs = torch.zeros(2, 2, 16, 16).double(), []  # [B, H, V, K], as in the paper
    for t in range(9):
        transition = torch.diag_embed(w[:, t]) - z[:, t, :, :, None] * (a * z)[:, t, :, None]
        state = state @ transition + v[:, t, :, :, None] * k[:, t, :, None]
        outputs.append((state @ r[:, t, :, :, None]).squeeze(-1))
    o = torch.stack(outputs, dim=1)
    o = (o - o.mean(-1, keepdim=True)) * (o.var(-1, unbiased=False, keepdim=True) + 16e-5).rsqrt()
    o = o.flatten(2) * mixer.norm.weight + mixer.norm.bias
    o = o + ((r * k * mixer.bonus).sum(-1, keepdim=True) * v).flatten(2)
    y, _, given = mixer(x, None, None, {"first_value": first})
    torch.testing.assert_close(y, (o * g) @ mixer.out_proj.weight.T, rtol=0, atol=1e-10)
    assert [*given] == [*mixer.gives] == (["first_value"] if residual == "give" else [])
    if residual == "give":
        torch.testing.assert_close(given["first_value"], own, rtol=0, atol=1e-12)
    if residual == "take":
        with pytest.raises(
            ValueError, match="Rwkv7: it takes first_value from an earlier layer of a stack, and was given none"
        ):
            mixer(x)
        with pytest.raises(
            ValueError, match=r"the first_value of an earlier layer is \[2, 9, 31\], expected \[2, 9, 32\]"
        ):
            mixer(x, None, None, {"first_value": first[..., :31]})


def test_rwkv7_starts_as_released():
    """Values of RWKV-LM's formulas at half the depth, computed apart: first, last and a middle channel."""
    mixer = build_mixer("rwkv7", d_model=128, value_residual="take")
    assert isinstance(mixer, Rwkv7)
    torch.testing.assert_close(mixer.value_gate[-1].bias[[0, 127]], torch.tensor([0.93, 0.53]))
    assert mixer.value_gate[0].weight.shape == (32, 128)
    same(mixer.shares[:, 0], torch.ones(6))
    torch.testing.assert_close(mixer.shares[1, 64], torch.tensor(1 - 0.5**0.45))
    bias = mixer.decay[-1].bias
    torch.testing.assert_close(bias[[0, 127]], torch.tensor([-8.0, 3.0]))
    torch.testing.assert_close(mixer.rate[-1].bias[[0, 127]], torch.tensor([-0.69, 0.31]))
    torch.testing.assert_close(mixer.removal[[0, 127]], torch.tensor([0.76, 0.66]))
    assert mixer.key.weight.abs().max() <= 0.05 * 128**-0.5
    assert "shift.weight" not in mixer.state_dict()


def test_kda_with_a_bound_keeps_at_least_its_exponential():
    """``-bound sigmoid(exp(A_log) (f + dt_bias))``, with A of 1 at first."""
    torch.manual_seed(0)
    mixer, x = build_mixer("kda", d_model=32, num_heads=2, log_decay_bound=5.0).double(), inputs(9)
    assert isinstance(mixer, KDA)
    assert (mixer.A_log == 0).all()
    torch.nn.init.normal_(mixer.A_log)
    torch.nn.init.normal_(mixer.dt_bias, std=20)
    logits = x @ mixer.decay[0].weight.T @ mixer.decay[1].weight.T + mixer.dt_bias
    expected = -5 * torch.sigmoid(mixer.A_log.exp()[:, None] * logits.unflatten(-1, (2, 16)))
    with ops.record_calls() as calls:
        mixer(x)
    (call,) = [call for call in calls if call.op == "delta_rule"]
    torch.testing.assert_close(call.inputs.log_decay, expected, rtol=0, atol=1e-13)
    assert -5 <= float(expected.detach().min()) < -4.9
