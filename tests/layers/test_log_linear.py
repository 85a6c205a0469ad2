"""Mixers on log-linear attention: their base mixers where all levels count one, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers import Mixer, build_mixer, measured_state_bytes, state_rows
from seqarch.layers.rows import join_rows
from seqarch.testing import assert_close, inputs

BASES = {"log_linear_mamba2": "mamba2", "log_linear_gated_delta_net": "gated_delta_net"}


def build(name: str, **options) -> Mixer:
    torch.manual_seed(0)
    return build_mixer(name, d_model=32, **options).double()


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_where_all_levels_count_one_it_is_the_base_mixer(name: str, negative: bool):
    mixer, x = build(name, negative_eigenvalues=negative), inputs(150)
    own = {key: x for key, x in mixer.state_dict().items() if not key.startswith("level_")}
    base = build(BASES[name], negative_eigenvalues=negative)
    base.load_state_dict(own)
    heads = mixer.state_shape[0]  # pyright: ignore[reportIndexIssue]
    mixer.level_weight = lambda x: torch.ones(*x.shape[:2], heads, 19, dtype=x.dtype)
    (y, state), (expected, whole) = mixer(x), base(x)
    assert_close(y, expected, 1e-11)
    assert_close(state.recurrent.sum(2), whole.recurrent, 1e-11, "the sum of the states")
    assert state.lengths == (150, 150)


@pytest.mark.parametrize("name", BASES)
def test_levels_are_weighted_as_released(name: str):
    """``softplus(L (W x))`` with L of ones at first."""
    mixer, x = build(name, levels=8), inputs(20)
    with ops.record_calls() as calls:
        mixer(x)
    (call,) = [call for call in calls if call.op == "log_linear_attention"]
    heads = call.inputs.v.shape[2]
    assert (mixer.level_scale == 1).all()
    assert mixer.level_scale.shape == (heads, 8)
    weight = F.softplus(x @ mixer.level_proj.weight.T).unflatten(-1, (heads, 8))  # pyright: ignore
    assert_close(call.inputs.level_weight, weight, 1e-14)


@pytest.mark.parametrize("name", BASES)
def test_tokens_beyond_the_levels_are_refused(name: str):
    mixer, x = build(name, levels=4), inputs(9)
    message = "log_linear_attention: a row has 9 tokens, expected at most 8: level_weight has 4 levels"
    with pytest.raises(ValueError, match=message):
        mixer(x)
    _, state = mixer(x[:, :8])
    with pytest.raises(ValueError, match=message):
        mixer(x[:, 8:], state)
    for levels in (1, 33):
        with pytest.raises(ValueError, match=rf"levels must be .*, got {levels}"):
            build(name, levels=levels)


@torch.no_grad()
@pytest.mark.parametrize("name", BASES)
def test_rows_of_different_lengths_go_on_together(name: str):
    mixer, x = build(name, levels=8), inputs(60)
    states = [mixer(x[:1, :length])[1] for length in (3, 40, 16)]
    joined = join_rows(states)
    assert joined.lengths == (3, 40, 16)
    more = inputs(5, batch=3, seed=2)
    y, after = mixer(more, state_rows(joined, [0, 1, 2]))
    for row, state in enumerate(states):
        assert_close(y[row : row + 1], mixer(more[row : row + 1], state)[0], 1e-11, f"row {row}")
    assert after.lengths == (8, 45, 21)
    assert state_rows(after, [2, 0]).lengths == (21, 8)


@pytest.mark.parametrize("name", BASES)
def test_the_state_is_as_large_as_the_levels_say(name: str):
    mixer, base = build(name, levels=10).float(), build(BASES[name]).float()
    sizes = [measured_state_bytes(state.recurrent) for state in (mixer.init_state(1), base.init_state(1))]
    assert sizes[0] == 9 * sizes[1]
