"""Every mixer trains under autocast, and what a recurrence adds up stays in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seqarch import ops
from seqarch.layers import MIXERS, build_mixer
from seqarch.layers.mixer import Mixer
from seqarch.layers.recurrent_mixer import RecurrentMixer
from seqarch.testing import D_MODEL, assert_close, inputs
from seqarch.testing.laws import BFLOAT16_ERROR
from tests.support.backends import available
from tests.support.variants import VARIANTS

CASES = [(name, options) for name in MIXERS for options in ({}, *VARIANTS.get(name, []))]


def run(mixer: Mixer, autocast: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the gradients of the input and all parameters in one vector."""
    x = inputs(70, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y, state = mixer(x)
        loss = mixer.auxiliary_loss()
        more, _ = mixer(x[:, :1], state)
    if isinstance(mixer, RecurrentMixer):
        assert state.recurrent.dtype == torch.float32
    total = (
        (y.float() * inputs(70, dtype=torch.float32, seed=2)).sum() + more.float().sum() + (0 if loss is None else loss)
    )
    gradients = torch.autograd.grad(total, [x, *mixer.parameters()])
    return y, torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_mixer_trains_within_the_rounding_of_its_projections(name: str, options: dict[str, Any]):
    mixer = build_mixer(name, d_model=D_MODEL, **options)
    for found, expected in zip(run(mixer, True), run(mixer, False), strict=True):
        assert_close(found, expected, BFLOAT16_ERROR)


@pytest.mark.parametrize("backend", available("linear_attention"))
def test_a_recurrence_is_the_same_under_autocast(backend: str):
    q, k, v = torch.randn(3, 1, 70, 2, 8)
    expected = ops.linear_attention(q, k, v, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.linear_attention(q, k, v, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


CACHED: dict[str, dict[str, Any]] = {
    "attention": {},
    "based": {"window": 6},
    "lolcats": {"window": 6},
    "moba": {"block_size": 4},
    "dsa": {"top_k": 5},
    "sparse_mla": {"top_k": 5},
    "mla": {},
    "longformer": {"window": 6, "global_tokens": 4, "block_size": 2},
    "nsa": {"compressed_length": 4, "compressed_stride": 2, "block_size": 4, "window": 6},
}


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", CACHED)
def test_a_cache_may_have_another_dtype_than_the_module(name: str, packed: bool):
    mixer, x = build_mixer(name, d_model=D_MODEL, **CACHED[name]), inputs(12, dtype=torch.float32)
    with torch.no_grad():
        expected = mixer(x)[0]
        for reserved in (0, 5, 20):
            for dtype in (torch.bfloat16, torch.float64):
                state = mixer.init_state(2, reserved, dtype=dtype)
                part, offsets = x[:, :9], [0, 9, 18] if packed else None
                y, state = mixer(part.reshape(1, 18, -1) if packed else part, state, offsets)
                steps = [y.reshape(part.shape)]
                for t in range(9, 12):
                    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=t == 10):
                        y, state = mixer(x[:, t : t + 1], state)
                    steps.append(y.float())
                assert_close(torch.cat(steps, dim=1), expected, BFLOAT16_ERROR, f"{reserved} {dtype}")
