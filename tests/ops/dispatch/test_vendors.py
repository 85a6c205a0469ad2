"""What the backends hand to vendors' packages, on stand-ins: plain functions with their signatures, here on a CPU.

A stand-in takes what the package's function takes, in its layout, refuses what that asserts against, and computes it
step by step. So the mapping of arguments, states and gradients is tested, not the package.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch import ops
from seqarch.ops import OPS
from seqarch.ops.dispatch import vendors
from seqarch.ops.dispatch.checks import BackendError
from seqarch.testing import assert_close
from tests.ops.causal_conv1d import test_causal_conv1d as conv
from tests.ops.selective_scan import test_selective_scan as scans


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """``u, delta, z [B, D, L]``, ``A [D, N]``, ``B, C [B, G, N, L]``, to y and the last state ``[B, D, N]``."""
    assert A.dtype == torch.float32
    assert all(m is None or m.dtype == torch.float32 for m in (D, delta_bias))
    assert all(m is None or m.dtype == u.dtype for m in (delta, B, C, z))
    step = delta.float() if delta_bias is None else delta.float() + delta_bias[:, None]
    step = F.softplus(step) if delta_softplus else step
    B, C = (m.float().repeat_interleave(u.shape[1] // m.shape[1], 1) for m in (B, C))
    h, outputs = A.new_zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[2]):
        write = step[:, :, t, None] * B[..., t] * u[:, :, t, None].float()
        h = (step[:, :, t, None] * A).exp() * h + write
        outputs.append((C[..., t] * h).sum(-1))
    y = torch.stack(outputs, -1)
    y = y if D is None else y + D[:, None] * u.float()
    y = (y if z is None else y * F.silu(z.float())).to(u.dtype)
    return (y, h) if return_last_state else y


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
):  # fmt: skip
    """``x [B, L, H, P]``, ``dt [B, L, H]``, ``A [H]``, ``B, C [B, L, G, N]``, states ``[B, H, P, N]``."""
    assert chunk_size & (chunk_size - 1) == 0
    assert A.shape == (x.shape[2],)
    assert B.dtype == C.dtype == x.dtype
    h = initial_states.float()
    B, C = (m.repeat_interleave(x.shape[2] // m.shape[2], 2).float() for m in (B, C))
    outputs = []
    for t in range(x.shape[1]):
        h = (dt[:, t] * A).exp()[..., None, None] * h
        h = h + (dt[:, t, :, None] * x[:, t].float())[..., None] * B[:, t, :, None]
        outputs.append((h * C[:, t, :, None]).sum(-1))
    y = torch.stack(outputs, 1).to(x.dtype)
    return (y, h) if return_final_states else y


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None,
    activation=None,
):  # fmt: skip
    """``x [B, D, L]``, ``weight [D, W]``, ``initial_states [B, D, W - 1]``, ``seq_idx [B, L]``."""
    assert x.stride(1) == 1, "channels side by side"
    assert x.shape[1] % 8 == x.stride(0) % 8 == x.stride(2) % 8 == 0
    assert initial_states is None or (seq_idx is None and initial_states.stride(1) == 1)
    assert seq_idx is None or seq_idx.dtype == torch.int32
    width = weight.shape[1]
    first = x.new_zeros(*x.shape[:2], width - 1) if initial_states is None else initial_states
    history = torch.cat([first, x], -1).to(weight.dtype)
    out = torch.zeros_like(x, dtype=weight.dtype) if bias is None else bias[:, None].expand(x.shape).clone()
    number = None if seq_idx is None else F.pad(seq_idx, (width - 1, 0), value=-1)
    for w in range(width):
        part = history[..., w : w + x.shape[2]]
        if number is not None:
            part = part * (number[:, None, w : w + x.shape[2]] == seq_idx[:, None])
        out = out + weight[:, w, None] * part
    return (F.silu(out) if activation in ("silu", "swish") else out).to(x.dtype)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """``q [B, Lq, H, D]``, ``k, v [B, Lk, G, D]``; masks aligned with the last key; rows that see nothing are 0."""
    assert q.dtype in (torch.float16, torch.bfloat16)
    k, v = (m.repeat_interleave(q.shape[2] // k.shape[2], 2).float() for m in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q.float(), k) * (softmax_scale or q.shape[-1] ** -0.5)
    i = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    j, (left, right) = torch.arange(k.shape[1]), window_size
    right = 0 if causal else right
    seen = ((j >= i - left) | (left < 0)) & ((j <= i + right) | (right < 0))
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0).nan_to_num()
    return torch.einsum("bhij,bjhd->bihd", weights, v).to(q.dtype)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """The same on sequences one after the other, ``[total, H, D]``."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    lengths = cu_seqlens_q.diff().tolist()
    assert max_seqlen_q == max_seqlen_k == max(lengths)
    pieces = zip(*(m[None].split(lengths, 1) for m in (q, k, v)), strict=True)
    options = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size}
    return torch.cat([flash_attn_func(*piece, **options) for piece in pieces if piece[0].shape[1]], 1)[0]


STAND_INS = {
    "mamba_ssm": (),
    "mamba_ssm.ops": (),
    "mamba_ssm.ops.selective_scan_interface": (selective_scan_fn,),
    "mamba_ssm.ops.triton": (),
    "mamba_ssm.ops.triton.ssd_combined": (mamba_chunk_scan_combined,),
    "causal_conv1d": (causal_conv1d_fn,),
    "flash_attn": (flash_attn_func, flash_attn_varlen_func),
}


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, functions in STAND_INS.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        for function in functions:
            setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vendors, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def refusal(op: str, backend: str, **inputs: Any) -> str | None:
    return OPS[op].backends[backend].unsupported(OPS[op].inputs(**inputs))


SCANS: dict[str, dict[str, Any]] = {"everything": {}, "bare": {"full": False}, "groups": {"G": 4, "D": 12}}


@pytest.mark.parametrize("case", SCANS)
def test_selective_scan(case: str):
    inputs = scans.make(T=9, dtype=torch.float32, **SCANS[case])
    inputs.pop("state", None)
    weights = torch.randn(2, 9, inputs["x"].shape[2])
    found, expected = [], []
    for backend, into in (("chunk_mamba_ssm", found), ("recurrent_torch", expected)):
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items() if isinstance(v, Tensor)}
        y, last = ops.selective_scan(**(inputs | leaves), backend=backend)
        into += [y.detach(), last.detach(), *torch.autograd.grad((y * weights).sum(), list(leaves.values()))]
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 2e-6)


def test_selective_scan_in_bfloat16_keeps_its_parameters_wide():
    inputs = scans.make(T=9, dtype=torch.bfloat16)
    inputs.pop("state")
    (y, last), (expected, state) = (ops.selective_scan(**inputs, backend=name) for name in ("chunk_mamba_ssm", "auto"))
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    assert_close(y, expected, 5e-3)
    assert_close(last, state, 1e-5)


def test_selective_scan_raises_where_a_gradient_would_be_lost():
    inputs = scans.make(T=3, full=False, dtype=torch.float32)
    _, last = ops.selective_scan(**inputs | {"x": inputs["x"].requires_grad_()}, backend="chunk_mamba_ssm")
    with pytest.raises(RuntimeError, match="no gradient through the last state"):
        last.sum().backward()


def test_selective_scan_refuses_what_the_package_cannot():
    plain = scans.make(T=3, N=4, full=False, dtype=torch.float32)
    reasons = {
        "cu_seqlens is given": {"cu_seqlens": [0, 1, 3], **{n: plain[n][:1] for n in ("x", "dt", "B", "C")}},
        "scale_input is False": {"scale_input": False},
        "state is given": {"state": torch.ones(2, 20, 4)},
        "N is 257, expected 1 to 256": scans.make(T=3, N=257, full=False, dtype=torch.float32),
        "dt has dtype torch.bfloat16, expected torch.float32 as x": {"dt": plain["dt"].bfloat16()},
        "x has dtype torch.float64": {"x": plain["x"].double()},
        "there are no tokens": scans.make(T=0, full=False, dtype=torch.float32),
    }
    assert refusal("selective_scan", "chunk_mamba_ssm", **plain, state=torch.zeros(2, 20, 4)) is None
    for reason, changes in reasons.items():
        assert reason in str(refusal("selective_scan", "chunk_mamba_ssm", **plain | changes))


CONVOLUTIONS: dict[str, tuple[dict[str, Any], list[int] | None]] = {
    "plain": ({}, None),
    "no_state": ({"state": False, "bias": False}, None),
    "width_2": ({"W": 2}, None),
    "shorter_than_the_window": ({"T": 2}, None),
    "packed": ({"B": 1, "state": False}, [0, 1, 1, 7]),
}


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_causal_conv1d(case: str, activation: str | None):
    shape, offsets = CONVOLUTIONS[case]
    inputs = conv.make(**{"D": 8} | shape, dtype=torch.float32)
    options = {"activation": activation, "cu_seqlens": offsets}
    for view in (lambda x: x, lambda x: torch.cat([x, x[..., :3]], 2)[..., :8], lambda x: x.transpose(1, 2).clone().mT):
        viewed = inputs | {"x": view(inputs["x"])}
        found, expected = (
            conv.gradients(lambda leaves, b=backend: conv.convolve(b, leaves, **options), viewed)
            for backend in ("parallel_causal_conv1d", "parallel_torch")
        )
        for name, value in expected.items():
            assert_close(found[name], value, 1e-6, name)


def test_causal_conv1d_refuses_what_the_package_cannot():
    reasons = {
        "cu_seqlens and state are given": {**conv.make(B=1, D=8, sequences=2), "cu_seqlens": [0, 3, 7]},
        "W is 5, expected 2 to 4": conv.make(D=8, W=5),
        "D is 9, expected a multiple of 8": conv.make(D=9),
        "x has dtype torch.float64": conv.make(D=8),
        "there are no tokens": conv.make(D=8, T=0, dtype=torch.float32),
    }
    for reason, inputs in reasons.items():
        assert reason in str(refusal("causal_conv1d", "parallel_causal_conv1d", **inputs))


def heads(decay: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    q, k = torch.randn(2, 2, 9, 2, 5).to(dtype)
    log_decay = {"none": None, "head": -torch.rand(4), "step": -torch.rand(2, 9, 4)}[decay]
    return {
        "q": q,
        "k": k,
        "v": torch.randn(2, 9, 4, 3).to(dtype),
        "log_decay": log_decay,
        "state": torch.randn(2, 4, 5, 3),
    }


def linear(backend: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {k: None if v is None else v.clone().requires_grad_() for k, v in inputs.items()}
    o, state = ops.linear_attention(**leaves, backend=backend)
    weights = [torch.linspace(-1, 2, m.numel()).cos().view_as(m) for m in (o, state)]
    ((o * weights[0]).sum() + (state * weights[1]).sum()).backward()
    return {"o": o.detach(), "state": state.detach()} | {f"d{k}": v.grad for k, v in leaves.items() if v is not None}


@pytest.mark.parametrize("decay", ["none", "head", "step"])
def test_linear_attention(decay: str):
    inputs = heads(decay)
    found = linear("chunk_mamba_ssm", inputs)
    for name, expected in linear("recurrent_torch", inputs).items():
        assert found[name].dtype == expected.dtype
        assert_close(found[name], expected, 5e-6, name)


def test_linear_attention_with_decays_of_1_and_0():
    inputs = heads("step")
    inputs["log_decay"][:, 3] = 0
    inputs["log_decay"][:, 6] = -torch.inf
    found = linear("chunk_mamba_ssm", inputs)
    for name, expected in linear("recurrent_torch", inputs).items():
        if name != "dlog_decay":  # of -inf the reference has none
            assert_close(found[name], expected, 5e-6, name)
    assert found["dlog_decay"].isfinite().all()


def test_linear_attention_refuses_what_the_package_cannot():
    plain = heads("step")
    reasons = {
        "cu_seqlens is given": {n: m[:1] for n, m in plain.items()} | {"cu_seqlens": [0, 9]},
        "log_decay is one per key dimension": plain | {"log_decay": -torch.rand(2, 9, 4, 5)},
        "log_decay is one per step and v float16": plain | {n: plain[n].half() for n in ("q", "k", "v")},
        "v has dtype torch.float64": plain | {"v": plain["v"].double()},
        "q has dtype torch.bfloat16, expected torch.float32 as v": plain | {"q": plain["q"].bfloat16()},
        "K is 257": plain | {"q": torch.ones(2, 9, 2, 257), "k": torch.ones(2, 9, 2, 257), "state": None},
    }
    for reason, inputs in reasons.items():
        assert reason in str(refusal("linear_attention", "chunk_mamba_ssm", **inputs))


ATTENTIONS: dict[str, tuple[dict[str, Any], int, int]] = {
    "causal": ({}, 7, 7),
    "all": ({"causal": False}, 7, 7),
    "window": ({"window": 3}, 9, 9),
    "later_queries": ({"window": 2}, 2, 7),
    "earlier_queries": ({}, 5, 3),
    "scaled": ({"scale": 0.1, "causal": False}, 3, 8),
    "packed": ({"cu_seqlens": [0, 0, 4, 5, 9]}, 9, 9),
    "packed_window": ({"cu_seqlens": [0, 6, 9], "window": 2}, 9, 9),
}


@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention(case: str):
    options, queries, keys = ATTENTIONS[case]
    batch = 1 if "cu_seqlens" in options else 2
    inputs = [torch.randn(batch, queries, 4, 8), *torch.randn(2, batch, keys, 2, 8)]
    results = []
    for backend in ("chunk_flash_attn", "recurrent_torch"):
        leaves = [m.bfloat16().requires_grad_() for m in inputs]
        o = ops.attention(*leaves, **options, backend=backend)
        results.append([o.detach(), *torch.autograd.grad(o.square().sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        assert found.dtype == torch.bfloat16
        assert_close(found, expected, 1e-2, case)


def test_attention_refuses_what_the_package_cannot():
    q, k, v = torch.ones(3, 1, 4, 2, 8).bfloat16()
    reasons = {
        "key_start is given": {"k": k, "v": v, "key_start": torch.zeros(1, dtype=torch.int64)},
        "keys are 8 wide and values 4": {"k": k, "v": v[..., :4]},
        "q has dtype torch.float32": {"q": q.float(), "k": k.float(), "v": v.float()},
        "v has dtype torch.float16, expected torch.bfloat16 as q": {"k": k, "v": v.half()},
    }
    for reason, inputs in reasons.items():
        assert reason in str(refusal("attention", "chunk_flash_attn", **{"q": q} | inputs))
    wide = torch.ones(1, 4, 2, 257).bfloat16()
    assert "K is 257, expected 1 to 256" in str(refusal("attention", "chunk_flash_attn", q=wide, k=wide, v=wide))


def test_second_derivatives_are_refused():
    """Kernels outside of torch would be constants in them."""
    q, k, v = torch.randn(3, 1, 5, 2, 8).bfloat16()
    scan = scans.make(T=5, full=False, dtype=torch.float32)
    calls = {
        "chunk_flash_attn": (ops.attention, {"q": q, "k": k, "v": v}),
        "parallel_causal_conv1d": (ops.causal_conv1d, {"x": torch.randn(1, 5, 8), "weight": torch.randn(8, 4)}),
        "chunk_mamba_ssm": (ops.selective_scan, scan),
        "chunk_mamba_ssm of heads": (ops.linear_attention, heads("head")),
        "chunk_mamba_ssm of steps": (ops.linear_attention, heads("step")),
    }
    for name, (op, inputs) in calls.items():
        leaves = {k: v.clone().requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        found = op(**leaves, backend=name.partition(" ")[0])
        o = found[0] if isinstance(found, tuple) else found
        with pytest.raises(BackendError, match=rf"backend '{name.partition(' ')[0]}' has first derivatives only"):
            torch.autograd.grad(o.sum(), [v for v in leaves.values() if isinstance(v, Tensor)], create_graph=True)


OPT_IN = [(name, backend) for name, op in OPS.items() for backend in op.opt_in]


@pytest.mark.parametrize(("name", "backend"), OPT_IN)
def test_auto_never_takes_a_vendors_package(name: str, backend: str):
    assert backend not in OPS[name].order + OPS[name].step_order
    module = OPS[name].backends[backend].module
    assert module.unavailable() is None


def test_a_machine_without_the_package_or_a_device_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vendors, "DEVICE", "cuda")
    assert refusal("selective_scan", "chunk_mamba_ssm", **scans.make(T=2, full=False, dtype=torch.float32)) == (
        "x is on cpu, expected cuda"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert vendors.unavailable("mamba_ssm") == "there is no CUDA device"
    assert vendors.unavailable("no_such_package") == "the package no-such-package is not installed"
