"""LoLCATs' mixer against the sums that its paper writes, over all pairs of tokens, and against attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from seqarch import LanguageModel, ops
from seqarch.convert import convert
from seqarch.layers import build_mixer
from seqarch.layers.linear_attention.largest_scores import flops, largest_scores
from seqarch.layers.linear_attention.lolcats import LoLCATs
from seqarch.layers.modules.rotary import apply_rotary
from seqarch.testing import assert_close, inputs
from seqarch.testing.laws import flop_counter

EXACT = 1e-12


def build(**options: Any) -> Any:
    """In float64, with features far from uniform, a window factor of each head and, so that they count, more in the
    window's sum than the default has."""
    torch.manual_seed(0)
    options = {"num_heads": 2, "window": 5, "feature_width": 6, **options}
    mixer: Any = build_mixer("lolcats", d_model=32, **options).double()
    for parameter in (mixer.query_map.weight, mixer.key_map.weight, mixer.window_factor):
        parameter.data += torch.randn_like(parameter)
    return mixer


def features(x: Tensor, weight: Tensor) -> Tensor:
    """``[B, H, T, K]`` to ``[B, H, T, 2 F]``."""
    logits = x @ weight
    return torch.cat([logits.softmax(-1), (-logits).softmax(-1)], dim=-1)


def by_pairs(mixer: LoLCATs, x: Tensor) -> Tensor:
    """The weights of all pairs, near and far, as two T x T matrices with zeros."""
    config, length = mixer.config, x.shape[1]
    parts = (x @ mixer.qkv_proj.linear.weight.T).split(mixer.qkv_proj.sizes, dim=-1)
    q, k, v = (part.unflatten(-1, (-1, config.head_width)) for part in parts)
    if config.position == "rotary":
        q, k = (apply_rotary(each, torch.arange(length)) for each in (q, k))
    q, k, v = (each.repeat_interleave(config.heads // each.shape[2], dim=2).transpose(1, 2) for each in (q, k, v))
    steps = torch.arange(length)
    back = steps[:, None] - steps
    near, far = (back >= 0) & (back < config.window), back >= config.window
    scores = q @ k.mT * (config.head_width**-0.5 if config.scale is None else config.scale)
    largest = torch.where(near, scores, -torch.inf).amax(-1, keepdim=True)
    a = torch.where(near, (scores - largest).exp(), 0) * mixer.window_factor.sigmoid()[:, None, None]
    b = torch.where(far, features(q, mixer.query_map.weight) @ features(k, mixer.key_map.weight).mT, 0)
    y = ((a + b) / (a + b).sum(-1, keepdim=True)) @ v
    return rearrange(y, "b h t v -> b t (h v)") @ mixer.out_proj.weight.T


def weighed_gradients(mixer: Any, y: Tensor, x: Tensor) -> dict[str, Tensor]:
    named = {"x": x, **dict(mixer.named_parameters())}
    total = (y * inputs(y.shape[1], seed=3)).sum()
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_heads": 4, "num_kv_heads": 2, "window": 1, "scale": 0.7},
    {"window": 70, "feature_width": 3, "position": "none"},
    {"window": 66},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_its_equation_and_so_are_its_gradients(options: dict[str, Any]):
    mixer, x = build(**options), inputs(140).requires_grad_()
    y, expected = mixer(x)[0], by_pairs(mixer, x)
    assert_close(y, expected, EXACT)
    wanted = weighed_gradients(mixer, expected, x)
    for name, gradient in weighed_gradients(mixer, y, x).items():
        assert gradient.abs().max() > 0, name
        assert_close(gradient, wanted[name], 1e-10, name)


def test_a_transformer_is_converted_exactly_within_the_window():
    """And no longer beyond it."""
    torch.manual_seed(0)
    heads = {"attention": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "scale": 0.4}}
    teacher = LanguageModel(vocab_size=19, d_model=32, pattern="attention", depth=2, mixers=heads).double()
    student, report = convert(teacher, "lolcats(window=9)")
    assert {role for mixer in report.mixers for role in mixer.copied} == set("qkvo")
    assert not any(mixer.refused for mixer in report.mixers)
    tokens = torch.randint(19, (2, 12))
    expected, y = teacher(tokens)[0], student(tokens)[0]
    assert_close(y[:, :9], expected[:, :9], EXACT)
    assert (y[:, 9:] - expected[:, 9:]).abs().amax(-1).min() > 1e-4


def test_the_state_is_the_window_and_the_sums_of_what_has_left_it():
    mixer, x = build(), inputs(12)
    _, state = mixer(x)
    _, short = mixer(x[:, :5])
    assert state.cache.keys.shape == (2, 5, 2, 16)
    assert not short.recurrent.any()
    _, k, v = mixer.project(x, None, mixer.place(mixer.init_state(2).cache, x, None)[1])[0]
    assert torch.equal(state.cache.keys, k[:, 7:])
    phi = features(k.transpose(1, 2), mixer.key_map.weight)[:, :, :7]
    ones = torch.ones(2, 2, 7, 1, dtype=torch.float64)
    assert_close(state.recurrent, phi.mT @ torch.cat([v.transpose(1, 2)[:, :, :7], ones], dim=-1), EXACT)


@pytest.mark.parametrize("queries", [1, 2, 64, 65, 200])
def test_the_largest_score_is_that_of_attentions_window(queries: int):
    """Of rows that begin at different keys, with a gradient at the largest alone."""
    torch.manual_seed(0)
    keys, window = queries + 7, 8
    q, k = torch.randn(2, queries, 4, 3, dtype=torch.float64), torch.randn(2, keys, 2, 3, dtype=torch.float64)
    q.requires_grad_()
    k.requires_grad_()
    start = torch.tensor([0, 5])
    positions = torch.arange(keys - queries, keys) - start[:, None]
    found = largest_scores(q, k, positions, window, 0.6)
    steps = torch.arange(keys)
    back = torch.arange(keys - queries, keys)[:, None] - steps
    seen = (back >= 0) & (back < window) & (steps >= start[:, None, None])
    scores = torch.einsum("bthk,bshk->bths", q, k.repeat_interleave(2, dim=2)) * 0.6
    expected = torch.where(seen[:, :, None], scores, -torch.inf).amax(-1)
    assert_close(found, expected, EXACT)
    with torch.no_grad():
        assert_close(largest_scores(q, k, positions, window, 0.6), expected, EXACT)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), (q, k))
    for gradient, other in zip(torch.autograd.grad((found * weights).sum(), (q, k)), wanted, strict=True):
        assert_close(gradient, other, EXACT)
    with flop_counter() as counter, torch.no_grad():
        largest_scores(q, k, positions, window)
    assert counter.get_total_flops() == flops(queries, keys, 4, 3, window, batch_size=2)


def test_large_scores_leave_the_sums_finite():
    """Scores near 10,000, in float32: weights are relative to the largest, whose logarithm is not taken."""
    mixer, x = build().float(), inputs(40, dtype=torch.float32)
    with torch.no_grad():
        mixer.qkv_proj.linear.weight[:64] *= 100
        found, exact = mixer(x)[0], by_pairs(mixer.double(), x.double())
    assert found.isfinite().all()
    assert_close(found.double(), exact, 0.01)


def test_what_is_no_share_is_refused():
    with pytest.raises(ValueError, match=r"first_window_factor is 1\.0, expected a number between 0 and 1"):
        build_mixer("lolcats", d_model=32, first_window_factor=1.0)


def test_one_kernel_serves_each_part():
    with ops.record_calls() as calls:
        build()(inputs(20))
    assert [call.op for call in calls] == ["attention", "linear_attention"]
