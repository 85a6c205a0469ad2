"""The bidirectional wrapper: the laws of mixers but for causality, on some mixers of each kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seqarch.layers import Attention, Bidirectional, build_mixer
from seqarch.testing import assert_close

CHOSEN = {"mamba2": {"d_state": 4, "head_dim": 8}, "gated_delta_net": {"num_heads": 2}, "slstm": {"recurrent_std": 0.3},
          "forgetting_attention": {"num_heads": 2}}  # fmt: skip


def build(name: str, shared: bool = False, **options: Any) -> Bidirectional:
    torch.manual_seed(0)
    mixers = [build_mixer(name, d_model=16, **CHOSEN[name]) for _ in range(1 if shared else 2)]
    return Bidirectional(*mixers, **options).double()


def inputs(batch: int = 2, length: int = 20) -> Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", CHOSEN)
def test_it_reads_each_sequence_both_ways(name):
    both, x = build(name), inputs()
    y = both(x)
    assert_close(y, both.ahead(x)[0] + both.behind(x.flip(1))[0].flip(1), 1e-12, "sum")
    # every output sees every token
    changed = x.clone()
    changed[:, 11] += 1
    assert (both(changed) - y).abs().amax(-1).min() > 1e-12
    # packed, and padded
    packed = both(x[:1], cu_seqlens=[0, 5, 5, 6, 20])
    padded = both(x, lengths=[5, 20])
    for start, end in ((0, 5), (5, 6), (6, 20)):
        assert_close(packed[:, start:end], both(x[:1, start:end]), 1e-10, f"{start} to {end}")
    assert_close(padded[:1, :5], both(x[:1, :5]), 1e-10, "padded")
    assert_close(padded[1:], y[1:], 1e-10, "whole")
    # gradients reach both
    y.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in both.parameters() if p.numel() > 1)
    assert both.flops(20, 2) == 2 * both.ahead.flops(20, 2)


def test_shared_weights_and_combinations():
    both, x = build("mamba2", shared=True), inputs()
    assert both.ahead is both.behind
    assert len(list(both.parameters())) == len(list(both.ahead.parameters()))
    assert_close(both(x.flip(1)), both(x).flip(1), 1e-12, "reversed")
    mean, wide = (Bidirectional(both.ahead, combine=combine) for combine in ("mean", "concatenate"))
    assert_close(mean(x), both(x) / 2, 1e-12, "mean")
    assert_close(wide(x)[..., :16] + wide(x)[..., 16:], both(x), 1e-12, "concatenate")
    assert_close(both.float()(x.float()), both(x.float()), 1e-6, "float32")
    assert both(x[:, :0].float()).shape == (2, 0, 16)


def test_wrong_arguments_are_named():
    both, x = build("mamba2"), inputs()
    other = build_mixer("mamba2", d_model=32)
    for wrong, message in (
        (lambda: Bidirectional(torch.nn.Linear(3, 3)), "expected a mixer"),  # type: ignore[arg-type]
        (lambda: Bidirectional(both.ahead, other), "mixers of widths 16 and 32, expected one width"),
        (lambda: Bidirectional(both.ahead, combine="add"), "combine of Bidirectional"),
        (lambda: Bidirectional(Attention(d_model=16, give_kv="a")), "exchanges tensors with other layers"),
        (lambda: both(x, lengths=[5, 21]), "lengths is .*expected 2 whole numbers from 0 to 20"),
        (lambda: both(x, lengths=[5]), "lengths is"),
        (lambda: both(x[:1], lengths=[5], cu_seqlens=[0, 20]), "expected one of them"),
        (lambda: both(x[..., :3]), "x is"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
