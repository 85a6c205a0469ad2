"""PaTH attention against its equations, and its cache in few bits and little precision."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers import build_mixer
from seqarch.layers.attention.path_attention import PathAttention
from seqarch.models import Stack, quantize_state
from seqarch.testing import assert_close, inputs


@pytest.mark.parametrize("gated", [False, True])
def test_factors_come_of_a_convolution_and_gates_of_each_query_head(gated: bool):
    torch.manual_seed(0)
    options = {"num_heads": 4, "num_kv_heads": 2, "forget_gate": gated, "w_rank": 5}
    mixer, x = build_mixer("path_attention", d_model=32, **options).double(), inputs(12)
    assert isinstance(mixer, PathAttention)
    assert isinstance(mixer.w_low, torch.nn.Linear)
    with ops.record_calls() as calls:
        y, _ = mixer(x)
    (call,) = [call for call in calls if call.op == "path_attention"]
    conv, low = mixer.w_proj.conv, x @ mixer.w_low.weight.T @ mixer.w_proj.linear.weight.T
    assert conv is not None
    weight = conv.weight.squeeze(1)  # [channels, 3]
    taps = [F.pad(low, (0, 0, 2 - tap, 0))[:, :12] * weight[:, tap] for tap in range(3)]
    w = F.silu(torch.stack(taps).sum(0)).unflatten(-1, (2, 8))
    w = w / (w.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(call.inputs.w, w, rtol=0, atol=1e-12)
    beta = 2 * torch.sigmoid(x @ mixer.rate.weight.T + mixer.rate.bias)
    torch.testing.assert_close(call.inputs.beta, beta, rtol=0, atol=1e-12)
    q, k, v = (x @ mixer.qkv_proj.linear.weight.T).split((32, 16, 16), dim=-1)
    q, k, v = q.unflatten(-1, (4, 8)), k.unflatten(-1, (2, 8)), v.unflatten(-1, (2, 8))
    bias = None
    if mixer.forget is not None:
        bias = -F.logsigmoid(mixer.forget(x)).cumsum(1)
    o, _ = ops.path_attention(q, k, v, w, beta, key_bias=bias, backend="recurrent_torch")
    torch.testing.assert_close(y, o.flatten(2) @ mixer.out_proj.weight.T, rtol=0, atol=1e-12)


@torch.no_grad()
def test_keys_that_every_token_changes_are_float32_in_a_module_of_bfloat16():
    """Rounded to bfloat16 at each of 300 steps, they would be far from those of one call."""
    torch.manual_seed(0)
    mixer = build_mixer("path_attention", d_model=64, num_heads=2).bfloat16()
    x = inputs(300, dtype=torch.bfloat16, d_model=64)
    whole, _ = mixer(x)
    state, outputs = mixer.init_state(2, 300), []
    assert state.turned.keys.dtype == torch.float32
    assert state.turned.values.dtype == torch.bfloat16
    for token in x.split(1, dim=1):
        y, state = mixer(token, state)
        outputs.append(y)
    assert_close(torch.cat(outputs, dim=1)[:, 200:].float(), whole[:, 200:].float(), 0.02)


@torch.no_grad()
def test_states_of_few_bits_leave_these_keys_as_they_are():
    torch.manual_seed(0)
    stack = Stack(d_model=32, pattern="path_attention", depth=1, channel="none").double()
    x = inputs(20)
    expected, _ = stack(x)
    y, ((state,),) = quantize_state(stack, "int4")(x)
    assert torch.equal(y, expected)
    assert state.turned.keys.dtype == torch.float64
    assert not isinstance(state.conv, torch.Tensor)  # codes
