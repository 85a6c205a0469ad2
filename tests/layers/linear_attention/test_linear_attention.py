"""GLA, HGRN2, Based, lightning attention, mLSTM, Mamba-3 and RWKV-6 against their papers' equations, token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch.layers import build_mixer
from seqarch.layers.linear_attention.linear_attention import taylor
from seqarch.layers.modules.negative_eigenvalues import signed_linear_attention
from seqarch.testing import assert_close, error

EXACT = 1e-12


def build(name: str, d_model: int = 32, **options: Any) -> Any:
    """In float64, with every parameter moved from its initial value, so that none is 0 or 1."""
    torch.manual_seed(0)
    mixer = build_mixer(name, d_model=d_model, **options).double()
    for parameter in mixer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return mixer


def inputs(length: int, d_model: int = 32) -> Tensor:
    return torch.randn(2, length, d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rms(x: Tensor, eps: float = 1e-5) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def parts(mixer: Any, x: Tensor) -> list[Tensor]:
    """Queries, keys and values, ``[B, T, H, K]``, of a mixer without a convolution."""
    pieces = (x @ mixer.qkv_proj.linear.weight.T).split(mixer.qkv_proj.sizes, dim=-1)
    return [piece.unflatten(-1, shape) for piece, shape in zip(pieces, mixer.qkv_proj.parts, strict=True)]


def read_all(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """``S = diag(decay) S + k^T v``, ``o = q S``, token by token; ``decay: [B, T, H, K]``."""
    state, outputs = torch.zeros_like(k[:, 0, ..., None] * v[:, 0, :, None]), []
    for t in range(q.shape[1]):
        state = decay[:, t, ..., None] * state + k[:, t, ..., None] * v[:, t, :, None]
        outputs.append((q[:, t, ..., None] * state).sum(-2))
    return torch.stack(outputs, dim=1)


def test_lightning_attention_is_its_equation():
    mixer, x = build("lightning_attention", num_heads=3, head_dim=6, decay_factor=0.3), inputs(40)
    q, k, v = (F.silu(each) for each in parts(mixer, x))
    slopes = torch.tensor([2 ** (-8 * h / 3) for h in (1, 2, 3)], dtype=torch.float64)
    o = read_all(q, k, v, torch.exp(-0.3 * slopes)[None, None, :, None].expand_as(k))
    o = rms(o.flatten(2), 1e-6) * mixer.norm.weight * torch.sigmoid(x @ mixer.gate.weight.T)
    assert error(mixer(x)[0], o @ mixer.out_proj.weight.T) < EXACT
    with pytest.raises(ValueError, match=r"unknown activation 'silv'.* Did you mean 'silu'\?"):
        build_mixer("lightning_attention", d_model=32, activation="silv")


@pytest.mark.parametrize("negative", [False, True])
def test_gla_is_its_equation(negative: bool):
    mixer, x = build("gla", num_heads=2, temperature=2.0, negative_eigenvalues=negative), inputs(40)
    q, k, v = parts(mixer, x)
    low, high = mixer.decay
    decay = torch.sigmoid(x @ low.weight.T @ high.weight.T + high.bias).sqrt().unflatten(-1, (2, -1))
    decay = 2 * decay - 1 if negative else decay
    assert (decay < 0).any() == negative
    o = rms(read_all(q / math.sqrt(q.shape[-1]), k, v, decay)) * mixer.norm.weight
    o = o.flatten(-2) * F.silu(x @ mixer.gate.weight.T)
    assert_close(mixer(x)[0], o @ mixer.out_proj.weight.T, EXACT)


def test_gla_has_the_papers_size():
    mixer = build_mixer("gla", d_model=256)
    assert (mixer.config.keys, mixer.config.values) == (32, 64)
    count = sum(parameter.numel() for parameter in mixer.parameters())
    assert count == 4 * 256**2 + 16 * (256 + 128) + 128 + 64, "four times D^2, the low-rank gate and the norm"


@pytest.mark.parametrize("bound", [0.0, 0.9])
def test_hgrn2_is_its_equation(bound: float):
    mixer, x = build("hgrn2", num_heads=2, lower_bound=bound), inputs(40)
    q, f, i = parts(mixer, x)
    f = bound + (1 - bound) * torch.sigmoid(f)
    assert f.min() > bound
    o = rms(read_all(F.silu(q) / 4, 1 - f, i, f).flatten(-2)) * mixer.norm.weight
    assert_close(mixer(x)[0], o @ mixer.out_proj.weight.T, EXACT)


def test_hgrn2_refuses_a_bound_of_one():
    with pytest.raises(ValueError, match=r"'hgrn2': lower_bound must be below 1, got 1\.0"):
        build_mixer("hgrn2", d_model=32, lower_bound=1.0)


def test_the_taylor_map_is_the_second_order_of_the_exponential():
    q, k = torch.randn(2, 50, 16, dtype=torch.float64)
    s = (q * k).sum(-1) / 4
    assert taylor(q).shape[-1] == 17 * 18 // 2
    assert_close((taylor(q) * taylor(k)).sum(-1), 1 + s + s.square() / 2, EXACT)


def test_based_is_a_taylor_kernel_over_all_and_softmax_over_a_window():
    mixer, x = build("based", num_heads=2, key_width=6, window=5), inputs(40)
    q, k, v = parts(mixer.linear, x)
    s = torch.einsum("bihk,bjhk->bhij", q, k) / math.sqrt(6)
    weights = (1 + s + s.square() / 2).tril()
    o = torch.einsum("bhij,bjhv->bihv", weights / (weights.sum(-1, keepdim=True) + 1e-6), v)
    distant = o.flatten(-2) @ mixer.linear.out_proj.weight.T
    assert_close(mixer(x)[0] - distant, mixer.window(x)[0], EXACT)
    assert mixer.window.config.window == 5


def mlstm_cell(mixer: Any, x: Tensor) -> Tensor:
    """Equations 19 to 27 as written, without a stabiliser."""
    q, k, v = parts(mixer, x)
    logits = x @ mixer.gates.weight.T + mixer.gates.bias
    cap = mixer.config.gate_cap
    i, f = (cap * torch.tanh(logits / cap) if cap else logits).chunk(2, dim=-1)
    i, f = i.exp(), f.sigmoid() if mixer.config.forget_gate == "sigmoid" else f.exp()
    C, n, outputs = torch.zeros_like(k[:, 0, ..., None] * v[:, 0, :, None]), torch.zeros_like(k[:, 0]), []
    for t in range(x.shape[1]):
        key = k[:, t] / math.sqrt(k.shape[-1])
        C = f[:, t, :, None, None] * C + i[:, t, :, None, None] * key[..., None] * v[:, t, :, None]
        n = f[:, t, :, None] * n + i[:, t, :, None] * key
        below = (n * q[:, t]).sum(-1, keepdim=True).abs().clamp(min=1)
        outputs.append((q[:, t, ..., None] * C).sum(-2) / below)
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("options", [{}, {"forget_gate": "exponential", "gate_cap": 0.0}])
@pytest.mark.parametrize("gain", [0.1, 20.0])
def test_mlstm_is_its_equation(options: dict[str, Any], gain: float):
    mixer, x = build("mlstm", num_heads=2, **options), inputs(40)
    mixer.gates.weight.data *= gain
    h = F.layer_norm(mlstm_cell(mixer, x), (16,), eps=1e-6).flatten(-2) * mixer.norm_weight
    expected = (h * torch.sigmoid(x @ mixer.gate.weight.T)) @ mixer.out_proj.weight.T
    assert_close(mixer(x)[0], expected, 1e-9)


def test_mlstm_is_that_of_transformers():
    from transformers import xLSTMConfig
    from transformers.models.xlstm.modeling_xlstm import xLSTMLayer

    mixer, x = build("mlstm", num_heads=2), inputs(70)
    settings = {"chunkwise_kernel": "chunkwise--native_autograd", "sequence_kernel": "native_sequence__native"}
    config = xLSTMConfig(
        hidden_size=32,
        num_heads=2,
        num_hidden_layers=1,
        step_kernel="native",
        eps=0.0,
        autocast_kernel_dtype="float32",
        mode="inference",
        return_last_states=True,
        **settings,
    )
    other = xLSTMLayer(config).double()
    q, k, v = mixer.qkv_proj.linear.weight.split(mixer.qkv_proj.sizes)
    i, f = mixer.gates.weight.chunk(2)
    i_bias, f_bias = mixer.gates.bias.chunk(2)
    other.load_state_dict(
        {
            "q.weight": q,
            "k.weight": k,
            "v.weight": v,
            "ogate_preact.weight": mixer.gate.weight,
            "igate_preact.weight": i,
            "igate_preact.bias": i_bias,
            "fgate_preact.weight": f,
            "fgate_preact.bias": f_bias,
            "multihead_norm.weight": mixer.norm_weight,
            "out_proj.weight": mixer.out_proj.weight,
        }
    )
    assert error(mixer(x)[0], other(x)[0]) < 1e-5


def test_mlstm_stays_finite_where_its_gates_overflow():
    mixer = build("mlstm", num_heads=2, gate_cap=0.0).float()
    for shift in (-300.0, 300.0):
        mixer.gates.bias.data[:2] = shift
        x = inputs(70).float().requires_grad_()
        y, state = mixer(x)
        gradients = torch.autograd.grad(y.square().sum() + state.recurrent.sum(), [x, *mixer.parameters()])
        assert all(m.isfinite().all() for m in (y, *state[1:], *gradients)), shift


def test_mlstm_starts_as_released():
    mixer = build_mixer("mlstm", d_model=64)
    assert mixer.gates.weight.eq(0).all()
    assert torch.allclose(mixer.gates.bias[4:], torch.linspace(3, 6, 4))
    assert mixer.gates.bias[:4].abs().max() < 0.5
    other = build_mixer("mlstm", d_model=64, forget_gate="exponential")
    assert torch.allclose(other.gates.bias[4:].exp(), torch.linspace(3, 6, 4).sigmoid())


def as_complex(m: Tensor) -> Tensor:
    """Channels i and i + N / 2 as the parts of a complex number."""
    return torch.complex(*m.chunk(2, dim=-1))


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("norm", [False, True])
def test_mamba3_is_its_equation(rank: int, norm: bool):
    """As a recurrence of a complex state that turns, in place of B and C that do."""
    options = {"d_state": 8, "head_dim": 16, "n_groups": 2, "mimo_rank": rank, "output_norm": norm}
    mixer, x = build("mamba3", **options), inputs(40)
    mixer.D.data += 0.5
    z, u, B, C, dt, A, mix, turn = (x @ mixer.in_proj.weight.T).split(mixer.sizes, dim=-1)
    z, u = (m.unflatten(-1, (4, 1, 16)) for m in (z, u))
    if rank > 1:
        u, z = u * mixer.mimo_x, z * mixer.mimo_z
    groups = torch.arange(4) // 2
    B = rms(B.unflatten(-1, (rank, 2, 8))) * mixer.B_norm.weight
    C = rms(C.unflatten(-1, (rank, 2, 8))) * mixer.C_norm.weight
    B, C = (as_complex(m[:, :, :, groups].transpose(2, 3) + b) for m, b in ((B, mixer.B_bias), (C, mixer.C_bias)))
    dt, mix = F.softplus(dt + mixer.dt_bias), mix.sigmoid()
    a = torch.exp(-dt * torch.where(A < 0, 1 / (1 - A), 1 + A))
    angle = F.pad(math.pi * torch.tanh(turn), (0, 2))[:, :, None] * dt[..., None]
    moved = torch.polar(a[..., None].expand_as(angle), -angle)

    last = torch.zeros(2, 4, 4, 16, dtype=torch.complex128)
    state, outputs = last, []
    for t in range(40):
        now = torch.einsum("bhrn,bhrp->bhnp", B[:, t], u[:, t].to(B.dtype))
        step, share = dt[:, t, :, None, None], mix[:, t, :, None, None]
        state = moved[:, t, ..., None] * (state + (1 - share) * step * last) + share * step * now
        outputs.append(torch.einsum("bhrn,bhnp->bhrp", C[:, t].conj(), state).real)
        last = now
    y = torch.stack(outputs, dim=1) + mixer.D[:, None, None] * u
    y = rms(y) * mixer.norm.weight.view(4, 1, 16) * F.silu(z) if norm else y * F.silu(z)
    y = (y * mixer.mimo_y if rank > 1 else y).sum(-2).flatten(-2)
    assert_close(mixer(x)[0], y @ mixer.out_proj.weight.T, 1e-10)


def test_mamba3_keeps_its_place_over_many_turns():
    """The angle is carried within one turn, and what it multiplies does not change by that."""
    mixer, x = build("mamba3", d_state=8, head_dim=16), inputs(300)
    y, _ = mixer(x)
    state, pieces = None, []
    for piece in x.split(25, dim=1):
        out, state = mixer(piece, state)
        pieces.append(out)
        assert state.angle.min() >= 0
        assert state.angle.max() < 2 * math.pi
    assert_close(torch.cat(pieces, 1), y, 1e-10)
    steps = math.pi * torch.tanh((x @ mixer.in_proj.weight.T)[..., -2:])
    assert steps.abs().sum(1).max() > 20 * math.pi, "the case turns often"


def test_mamba3_starts_as_released():
    mixer = build_mixer("mamba3", d_model=512, mimo_rank=4)
    assert mixer.B_bias.shape == (16, 4, 128)
    assert all(m.eq(1).all() for m in (mixer.B_bias, mixer.C_bias, mixer.D, mixer.mimo_z))
    assert all(m.eq(0.25).all() for m in (mixer.mimo_x, mixer.mimo_y))
    dt = F.softplus(mixer.dt_bias)
    assert dt.min() > 0.00099
    assert dt.max() < 0.101
    # [z, x, B, C, dt, A, trapezoid, angle], as released
    assert mixer.in_proj.out_features == 2 * 1024 + 2 * 128 * 4 + 3 * 16 + 32


@pytest.mark.parametrize("options", [{"d_state": 7}, {"rotary_fraction": 1.5}, {"d_state": 2, "rotary_fraction": 0.5}])
def test_mamba3_refuses_a_rotation_without_pairs(options: dict[str, Any]):
    with pytest.raises(ValueError, match="rotation needs an even d_state"):
        build_mixer("mamba3", d_model=32, **options)


def test_rwkv6_is_its_equation():
    mixer, x = build("rwkv6", num_heads=2, mix_rank=3, decay_rank=5), inputs(40)
    before = F.pad(x, (0, 0, 1, -1))

    def low_rank(maps: Any, m: Tensor) -> Tensor:
        return torch.tanh(m @ maps[0].weight.T) @ maps[2].weight.T + maps[2].bias

    mixture = x + (before - x) * mixer.share
    xr, xw, xk, xv, xg = (x + (before - x) * low_rank(maps, mixture) for maps in mixer.shares)
    pairs = ((mixer.receptance, xr), (mixer.key, xk), (mixer.value, xv))
    r, k, v = ((m @ linear.weight.T).unflatten(-1, (2, 16)) for linear, m in pairs)
    w = torch.exp(-torch.exp(low_rank(mixer.decay, xw))).unflatten(-1, (2, 16))
    state, outputs = torch.zeros(2, 2, 16, 16, dtype=torch.float64), []
    for t in range(40):
        now = k[:, t, ..., None] * v[:, t, :, None]
        outputs.append((r[:, t, ..., None] * (state + mixer.bonus[..., None] * now)).sum(-2))
        state = w[:, t, ..., None] * state + now
    o = F.layer_norm(torch.stack(outputs, dim=1), (16,), eps=64e-5).flatten(-2)
    o = (o * mixer.norm.weight + mixer.norm.bias) * F.silu(xg @ mixer.gate.weight.T)
    y, after = mixer(x)
    assert_close(y, o @ mixer.out_proj.weight.T, EXACT)
    assert_close(after.recurrent, state, EXACT, "the state holds the last token too")


def recurrence(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence on decays themselves, ``[B, T, H]`` or ``[B, T, H, K]``, from a state on."""
    decay, outputs = decay if decay.ndim == 4 else decay[..., None], []
    for t in range(q.shape[1]):
        state = decay[:, t, ..., None] * state + k[:, t, ..., None] * v[:, t, :, None]
        outputs.append((q[:, t, ..., None] * state).sum(-2))
    return torch.stack(outputs, dim=1) if outputs else v, state


@pytest.mark.parametrize("shape", [(), (5,)])
def test_signed_decays_are_the_recurrence_with_them(shape: tuple[int, ...]):
    """From a state, in packed sequences (an empty one among them) and through a decay of 0."""
    torch.manual_seed(0)
    lengths = (40, 0, 1, 29)
    q, k = torch.randn(2, 1, 70, 2, 5, dtype=torch.float64).unbind()
    v, state = torch.randn(1, 70, 2, 3, dtype=torch.float64), torch.randn(4, 2, 5, 3, dtype=torch.float64)
    log_decay = torch.rand(1, 70, 2, *shape, dtype=torch.float64).log()
    log_decay[:, 50] = math.log(0.5)
    inputs = [m.requires_grad_() for m in (q, k, v, log_decay, state)]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    o, last = signed_linear_attention(q, k, v, log_decay, scale=1.0, state=state, cu_seqlens=offsets)
    pieces = zip(*(m.split(lengths, 1) for m in (q, k, v, 2 * log_decay.exp() - 1)), state.split(1), strict=True)
    outputs, states = zip(*(recurrence(*piece) for piece in pieces), strict=True)
    expected, expected_last = torch.cat(outputs, 1), torch.cat(states)
    assert_close(o, expected, 1e-10, "outputs")
    assert_close(last, expected_last, 1e-10, "states")
    got = torch.autograd.grad(o.cos().sum() + last.sin().sum(), inputs)
    wanted = torch.autograd.grad(expected.cos().sum() + expected_last.sin().sum(), inputs)
    for name, a, b in zip(("q", "k", "v", "log_decay", "state"), got, wanted, strict=True):
        if name == "log_decay":  # at a decay of 0 the sign is a choice, and its gradient with it
            a, b = (torch.cat([m[:, :50], m[:, 51:]], 1) for m in (a, b))
        assert_close(a, b, 1e-9, name)


def counter_of_ones(negative: bool) -> Any:
    """A Mamba-2 of one head whose state flips between 0 and 1 at each token 1, if its decay there may be -1."""
    mixer = build_mixer("mamba2", d_model=32, d_state=1, expand=1, head_dim=32, negative_eigenvalues=negative)
    for parameter in mixer.parameters():
        parameter.data.zero_()
    z, u, B, C, dt = mixer.in_proj.weight.data.split([32, 32, 1, 1, 1])
    for part in (z, u, B, C):
        part[:, :2] = 1
    mixer.conv.weight.data[:, -1] = 1
    dt[:, 0], dt[:, 1] = -40, 40
    mixer.norm.weight.data.fill_(1)
    mixer.out_proj.weight.data.fill_(1)
    return mixer


def test_the_constants_of_mamba2_multiply_its_first_projection():
    factors, options = [0.5, 1.1, 0.9, 1.3, 0.7], {"d_model": 32, "d_state": 8, "head_dim": 16, "n_groups": 2}
    scaled = build_mixer("mamba2", in_factors=factors, **options).double()
    plain = build_mixer("mamba2", **options).double()
    plain.load_state_dict(scaled.state_dict())
    rows = plain.in_proj.weight.data.split([64, 64, 16, 16, 4])
    for factor, part in zip(factors, rows, strict=True):
        part *= factor
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    torch.testing.assert_close(scaled(x)[0], plain(x)[0])
    assert scaled.flops(9) == plain.flops(9)


def test_mamba2_with_negative_eigenvalues_expresses_parity():
    """``h = -h + w`` at a 1, ``h = h`` at a 0: over 2,000 tokens, also in two calls."""
    bits = torch.randint(2, (4, 2000), generator=torch.Generator().manual_seed(0))
    parity = bits.cumsum(1) % 2 == 1
    x = F.pad(F.one_hot(bits, 2).float(), (0, 30))
    mixer = counter_of_ones(negative=True)
    first, state = mixer(x[:, :777])
    y = torch.cat([first, mixer(x[:, 777:], state)[0]], 1).sum(-1)
    assert ((y > y.max() / 2) == parity).all()
    y = counter_of_ones(negative=False)(x)[0].sum(-1)
    assert ((y > y.max() / 2) == parity).float().mean() < 0.6, "decays in (0, 1) cannot do it with these weights"


@pytest.mark.parametrize("negative", [False, True])
def test_mamba_is_its_equation(negative: bool):
    torch.manual_seed(0)
    mixer, x = build_mixer("mamba", d_model=32, d_state=3, negative_eigenvalues=negative).double(), inputs(20)
    for parameter in mixer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    u, z = mixer.in_proj(x).chunk(2, dim=-1)
    u = F.silu(F.conv1d(F.pad(u.mT, (3, 0)), mixer.conv.weight.unsqueeze(1), mixer.conv.bias, groups=64).mT)
    dt, B, C = mixer.select(u).split(mixer.sizes, dim=-1)
    dt = torch.log1p(mixer.dt(dt).exp()).unsqueeze(-1)
    decay = torch.exp(-dt * mixer.A_log.exp())
    decay = 2 * decay - 1 if negative else decay
    assert (decay < 0).any() == negative
    h, outputs = torch.zeros(2, 64, 3).double(), []
    for t in range(20):
        h = decay[:, t] * h + dt[:, t] * u[:, t, :, None] * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1) + mixer.D * u[:, t])
    assert_close(mixer(x)[0], mixer.out_proj(torch.stack(outputs, 1) * F.silu(z)), 1e-12)
