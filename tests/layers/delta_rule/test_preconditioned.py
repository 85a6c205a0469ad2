"""Preconditioned delta rules against their equations, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers import build_mixer
from seqarch.layers.delta_rule.preconditioning import Preconditioned
from seqarch.testing import inputs


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("preconditioned_gated_delta_net", {"num_heads": 2, "num_key_heads": 1, "key_width": 6, "squash": 2.0}),
        ("preconditioned_kda", {"num_heads": 2, "key_width": 6}),
    ],
)
def test_keys_are_written_less_where_much_was_written(name: str, options: dict[str, Any]):
    torch.manual_seed(0)
    mixer, x = build_mixer(name, d_model=32, **options).double(), inputs(9)
    assert isinstance(mixer, Preconditioned)
    unit = mixer.preconditioner
    for parameter in (unit.A_log, unit.dt_bias, unit.center):
        torch.nn.init.normal_(parameter)
    with ops.record_calls() as calls:
        mixer(x)
    (call,) = [call for call in calls if call.op == "delta_rule"]
    k, squash = call.inputs.read, options.get("squash", 1.5)
    assert ((k.square().sum(-1) - 1).abs() < 1e-3).all()
    a, b = (x @ unit.rates.weight.T).chunk(2, dim=-1)
    decay = torch.exp(-unit.A_log.exp() * F.softplus(a + unit.dt_bias))
    curvature, state = torch.zeros_like(k[:, 0]), 0
    heads = call.inputs.v.shape[2]
    for t in range(9):
        curvature = decay[:, t, :, None] * curvature + torch.sigmoid(b[:, t, :, None]) * k[:, t] ** 2
        r = torch.log(curvature + 1e-6) - unit.center[:, None]
        written = k[:, t] * squash ** (-r / (1 + r.abs()))
        torch.testing.assert_close(call.inputs.k[:, t], written, rtol=0, atol=1e-12)
        # S = P + beta p^T (v - k P), a row per head of values
        q, read, p = (
            m.repeat_interleave(heads // m.shape[1], dim=1).unsqueeze(-2)
            for m in (call.inputs.q[:, t], k[:, t], written)
        )
        kept = call.inputs.log_decay[:, t].exp()
        state = (kept[..., None, None] if kept.ndim == 2 else kept.unsqueeze(-1)) * state
        error = call.inputs.v[:, t].unsqueeze(-2) - read @ (state if t else torch.zeros(2, heads, 6, 1).double())
        state = state + call.inputs.beta[:, t, :, None, None] * p.mT @ error
        o = 6**-0.5 * (q @ state).squeeze(-2)
        torch.testing.assert_close(call.result[0][:, t], o, rtol=0, atol=1e-12)


def test_steps_that_would_make_the_state_grow_are_refused():
    with pytest.raises(ValueError, match="negative_eigenvalues with keys times up to squash"):
        build_mixer("preconditioned_kda", d_model=32, negative_eigenvalues=True)


def test_wrong_options_are_named():
    for squash in (1.0, 2.5):
        with pytest.raises(ValueError, match=f"squash must be above 1 and at most 2, got {squash}"):
            build_mixer("preconditioned_kda", d_model=32, squash=squash)
