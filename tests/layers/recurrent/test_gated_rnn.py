"""sLSTM, LSTM and GRU as mixers, against loops over their equations, and what only such recurrences can do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch.layers import build_mixer


def build(name: str, **options) -> Any:
    torch.manual_seed(0)
    return build_mixer(name, d_model=12, **options).double()


def inputs(length: int = 9) -> Tensor:
    return torch.randn(2, length, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_with_one_head_it_is_torchs_own(name):
    mixer, x = build(name, head_dim=7), inputs()
    theirs = (nn.LSTM if name == "lstm" else nn.GRU)(12, 7, batch_first=True).double()
    state = {
        "weight_ih_l0": mixer.in_proj.weight,
        "bias_ih_l0": mixer.in_proj.bias,
        "weight_hh_l0": mixer.recurrent_weight.flatten(0, 2),
        "bias_hh_l0": torch.zeros_like(mixer.in_proj.bias),
    }
    if name == "gru":
        torch.nn.init.normal_(mixer.candidate_bias)
        state["bias_hh_l0"] = F.pad(mixer.candidate_bias.flatten(), (14, 0))
    else:
        assert (mixer.in_proj.bias[7:14] == 1).all()
    theirs.load_state_dict(state)
    same(mixer(x)[0], theirs(x)[0] @ mixer.out_proj.weight.T)


def test_slstm_is_its_equations():
    mixer, x = build("slstm", num_heads=3, recurrent_std=0.5), inputs()
    torch.nn.init.uniform_(mixer.norm_weight, 0.5, 2)
    u = F.silu(sum(F.pad(x, (0, 0, 3 - i, 0))[:, : x.shape[1]] * mixer.conv.weight[:, i] for i in range(4)))
    (z, o), (i, f) = (
        (y @ weight.T).unflatten(-1, (3, 2, 4)).unbind(3)
        for y, weight in ((x, mixer.in_proj.weight), (u, mixer.gates.weight))
    )
    outputs = []
    h, c, n = (torch.zeros(2, 3, 4, dtype=torch.float64) for _ in range(3))
    for t in range(x.shape[1]):
        r = torch.einsum("hgij,bhj->bghi", mixer.recurrent_weight, h) + mixer.bias.transpose(0, 1)
        write, keep = torch.exp(i[:, t] + r[:, 1]), torch.sigmoid(f[:, t] + r[:, 2])
        c, n = keep * c + write * torch.tanh(z[:, t] + r[:, 0]), keep * n + write
        h = torch.sigmoid(o[:, t] + r[:, 3]) * c / n
        outputs.append(h)
    h = torch.stack(outputs, dim=1)
    normed = (h - h.mean(-1, keepdim=True)) * (h.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    same(mixer(x)[0], (normed.flatten(2) * mixer.norm_weight) @ mixer.out_proj.weight.T)


def test_gates_start_as_released():
    bias = build("slstm", num_heads=2, forget_power=0.3).bias
    assert (bias[:, [0, 1, 3]] == 0).all()
    same(bias[1, 2, [0, -1]], torch.tensor([5.0, -7.0], dtype=torch.float64))
    assert (build("slstm").recurrent_weight == 0).all()
    assert (build("lstm", forget_bias=3.0).in_proj.bias[12:24] == 3).all()


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match=r"num_heads \(5\) must divide d_model \(12\)"):
        build("gru", num_heads=5)
