"""What every mixer says of what it is given."""

from __future__ import annotations

import pytest
import torch

from seqarch.layers import MIXERS, build_mixer


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize(
    ("x", "given"),
    [
        (torch.zeros(4, 32), r"torch.float32 of shape \[4, 32\]"),
        (torch.zeros(1, 4, 33), r"torch.float32 of shape \[1, 4, 33\]"),
        (torch.zeros(1, 4, 32, dtype=torch.int64), r"torch.int64 of shape \[1, 4, 32\]"),
        ([[0.0] * 32], "list"),
    ],
    ids=["two_dimensions", "width", "integers", "list"],
)
def test_inputs_of_another_kind_are_refused(name, x, given):
    with pytest.raises(ValueError, match=rf"x is {given}, expected floating point \[B, T, 32\]"):
        build_mixer(name, d_model=32)(x)


@pytest.mark.parametrize("width", [32, 96, 160, 256])
@pytest.mark.parametrize("name", MIXERS)
def test_defaults_fit_every_multiple_of_32(name, width):
    mixer = build_mixer(name, d_model=width)
    with torch.no_grad():
        y, state = mixer(torch.randn(1, 3, width))
        y, _ = mixer(torch.randn(1, 1, width), state)
    assert y.shape == (1, 1, width)
    assert y.isfinite().all()
