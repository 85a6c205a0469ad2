"""Attention as a mixer: its equation, its positions and its cache. The laws of every mixer are in ``test_laws``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers import build_mixer, clone_state, measured_state_bytes
from seqarch.layers.attention.attention import Attention
from seqarch.layers.modules.kv_cache import KVCache, PackedKV
from seqarch.layers.modules.rotary import apply_rotary

OPTIONS = {
    "default": {},
    "grouped": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True},
    "no_position": {"position": "none", "head_dim": 8, "num_heads": 3},
    "convolution": {"conv_width": 3},
    "window": {"window": 5, "num_heads": 4, "num_kv_heads": 1},
    "window_of_one": {"window": 1},
    "window_and_convolution": {"window": 3, "conv_width": 4},
}
options = pytest.mark.parametrize("chosen", list(OPTIONS.values()), ids=list(OPTIONS))


def build(**chosen) -> Attention:
    mixer = build_mixer("attention", d_model=32, **chosen).double()
    assert isinstance(mixer, Attention)
    return mixer


def inputs(length: int, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_pieces(mixer: Attention, x: Tensor, sizes: list[int], state=None) -> tuple[Tensor, object]:
    outputs = []
    for piece in x.split(sizes, dim=1):
        y, state = mixer(piece, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_rotation_is_a_complex_product_of_the_two_halves():
    x, positions = torch.randn(2, 5, 3, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 7, 100])
    turn = torch.polar(torch.ones(5, 4).double(), positions[:, None].double() * 50.0 ** (-torch.arange(4).double() / 4))
    turned = torch.complex(x[..., :4], x[..., 4:]) * turn[None, :, None]
    same(apply_rotary(x, positions, base=50.0), torch.cat([turned.real, turned.imag], dim=-1))
    each_row = torch.stack([positions, positions + 3])
    same(apply_rotary(x, each_row)[1], apply_rotary(x[1:], positions + 3)[0])


def test_rotated_products_know_only_the_distance():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    at = lambda i, j: (apply_rotary(q, torch.tensor([i])) * apply_rotary(k, torch.tensor([j]))).sum()  # noqa: E731
    torch.testing.assert_close(at(5, 3), at(1_000_005, 1_000_003), rtol=1e-8, atol=1e-8)
    assert abs(at(5, 3) - at(5, 4)) > 1e-3


def test_rotation_keeps_the_dtype_and_refuses_odd_widths():
    assert apply_rotary(torch.randn(1, 2, 1, 4).bfloat16(), torch.arange(2)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="even head width, got 5"):
        apply_rotary(torch.randn(1, 2, 1, 5), torch.arange(2))


def test_a_scale_of_the_scores_is_one_of_the_keys():
    x = inputs(9)
    for chosen in ({}, {"window": 4, "num_kv_heads": 2, "num_heads": 4}):
        scaled, plain = build(scale=0.1, **chosen), build(**chosen)
        plain.load_state_dict(scaled.state_dict())
        width, groups = scaled.config.head_width, scaled.config.kv_heads
        keys = plain.qkv_proj.linear.weight.data.split([32, groups * width, groups * width])[1]
        keys *= 0.1 * width**0.5
        same(scaled(x)[0], plain(x)[0])
        same(in_pieces(scaled, x, [4, 1, 4])[0], plain(x)[0])


def test_the_layer_is_its_equation():
    mixer, x = build(num_heads=4, num_kv_heads=2, qk_norm=True, window=6), inputs(9)
    torch.nn.init.uniform_(mixer.query_norm.weight, 0.5, 2)
    q, k, v = (x @ mixer.qkv_proj.linear.weight.T).split([32, 16, 16], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, 8)) for part in (q, k, v))
    normed = [m * (m.square().mean(-1, keepdim=True) + 1e-6).rsqrt() for m in (q, k)]
    q, k = (apply_rotary(m, torch.arange(9)) for m in (normed[0] * mixer.query_norm.weight, normed[1]))
    seen = torch.ones(9, 9).tril() * torch.ones(9, 9).triu(-5)
    heads = []
    for h in range(4):
        scores = q[:, :, h] @ k[:, :, h // 2].transpose(1, 2) / 8**0.5
        heads.append(F.softmax(scores.masked_fill(seen == 0, -torch.inf), dim=-1) @ v[:, :, h // 2])
    same(mixer(x)[0], torch.cat(heads, dim=-1) @ mixer.out_proj.weight.T)


def test_the_gate_the_bias_and_the_channels_that_do_not_turn():
    mixer, x = build(num_heads=2, rotary_fraction=0.25, output_gate=True, output_bias=True), inputs(9)
    q, k, v = (part.unflatten(-1, (2, 16)) for part in (x @ mixer.qkv_proj.linear.weight.T).chunk(3, dim=-1))
    q, k = (torch.cat([apply_rotary(m[..., :4], torch.arange(9)), m[..., 4:]], dim=-1) for m in (q, k))
    q, k, v = (m.transpose(1, 2) for m in (q, k, v))
    scores = (q @ k.transpose(2, 3) / 4).masked_fill(torch.ones(9, 9).tril() == 0, -torch.inf)
    o = (F.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)
    gated = o / (1 + (-x @ mixer.gate.weight.T).exp())
    same(mixer(x)[0], gated @ mixer.out_proj.weight.T + mixer.out_proj.bias)


def test_biases_a_norm_over_all_heads_and_a_gate_for_each():
    chosen = {"qkv_bias": True, "qk_norm": True, "qk_norm_scope": "all", "output_gate": True, "qkv_clip": 0.6}
    mixer, x = build(num_heads=4, num_kv_heads=2, position="none", output_gate_scope="head", **chosen), inputs(9)
    for norm in (mixer.query_norm, mixer.key_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
    linear = mixer.qkv_proj.linear
    q, k, v = (x @ linear.weight.T + linear.bias).split([32, 16, 16], dim=-1)
    q = q * (q.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * mixer.query_norm.weight
    k = k * (k.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * mixer.key_norm.weight
    assert all((m.abs() > 0.6).any() for m in (q, k, v))
    q, k, v = (m.clip(-0.6, 0.6).unflatten(-1, (-1, 8)).transpose(1, 2) for m in (q, k, v))
    k, v = (m.repeat_interleave(2, dim=1) for m in (k, v))
    scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(torch.ones(9, 9).tril() == 0, -torch.inf)
    gates = (x @ mixer.gate.weight.T).sigmoid()
    assert gates.shape == (2, 9, 4)
    o = (F.softmax(scores, dim=-1) @ v).transpose(1, 2) * gates.unsqueeze(-1)
    same(mixer(x)[0], o.flatten(2) @ mixer.out_proj.weight.T)


def test_scores_are_bounded_softly():
    mixer, x = build(num_heads=2, position="none", logit_cap=0.25), inputs(9)
    q, k, v = (m.unflatten(-1, (2, 16)).transpose(1, 2) for m in (x @ mixer.qkv_proj.linear.weight.T).chunk(3, dim=-1))
    scores = 0.25 * torch.tanh(q @ k.transpose(2, 3) / 4 / 0.25)
    o = F.softmax(scores.masked_fill(torch.ones(9, 9).tril() == 0, -torch.inf), dim=-1) @ v
    same(mixer(x)[0], o.transpose(1, 2).flatten(2) @ mixer.out_proj.weight.T)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"logit_cap": 0.0}, "logit_cap must be positive, got 0.0"),
        ({"qk_norm": True, "qk_norm_scope": "heads"}, "unknown qk_norm_scope 'heads'.*Did you mean 'head'"),
        ({"qk_norm_scope": "all"}, "qk_norm_scope='all' needs qk_norm=True, got qk_norm=False"),
        ({"output_gate_scope": "head"}, "output_gate_scope='head' needs output_gate=True"),
    ],
)
def test_a_scope_of_nothing_is_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        build(**chosen)


@options
@pytest.mark.parametrize("sizes", [[1, 12], [4, 0, 1, 8], [1] * 13, [6, 7]])
def test_split_anywhere_with_gradients_through_the_state(chosen, sizes):
    mixer = build(**chosen)
    found = []
    for run in (lambda x: mixer(x)[0], lambda x: in_pieces(mixer, x, sizes)[0]):
        x = inputs(13).requires_grad_()
        y = run(x)
        found.append([y, *torch.autograd.grad((y * inputs(13, seed=2)).sum(), [x, *mixer.parameters()])])
    for a, b in zip(*found, strict=True):
        same(a, b)


@options
def test_a_reserved_state_gives_what_a_growing_one_gives(chosen):
    mixer, x = build(**chosen), inputs(13)
    with torch.no_grad():
        y, _ = mixer(x)
        for reserved in (13, 20, 4):  # 4 is too few: the state grows
            state = mixer.init_state(2, max_length=reserved)
            same(in_pieces(mixer, x, [5, 1, 1, 6], state)[0], y)


def test_a_reserved_state_is_written_in_place():
    mixer, x = build(), inputs(13)
    with torch.no_grad():
        state = mixer.init_state(2, max_length=13)
        place = state.cache.keys.data_ptr()
        _, state = in_pieces(mixer, x, [5, 1, 7], state)
    assert state.cache.keys.data_ptr() == place
    assert state.cache.length == 13


def test_gradients_flow_through_a_reserved_state():
    mixer, x = build(), inputs(9).requires_grad_()
    weights = inputs(9, seed=2)
    y = in_pieces(mixer, x, [4, 1, 4], mixer.init_state(2, max_length=12))[0]
    same(torch.autograd.grad((y * weights).sum(), x)[0], torch.autograd.grad((mixer(x)[0] * weights).sum(), x)[0])


@options
@pytest.mark.parametrize("reserved", [None, 30])
def test_prompts_of_different_lengths_then_steps_for_all(chosen, reserved):
    """What ``generate`` does: a packed call, then unpacked ones for all rows, then a packed one again."""
    mixer, lengths, more = build(**chosen), [4, 1, 9, 0], [2, 0, 3, 1]
    prompts = [inputs(n, 1, seed=n) for n in lengths]
    steps, last = inputs(6, 4, seed=20), [inputs(n, 1, seed=30 + n) for n in more]
    with torch.no_grad():
        state = None if reserved is None else mixer.init_state(4, max_length=reserved)
        y, state = mixer(torch.cat(prompts, 1), state, torch.tensor([0, 4, 5, 14, 14]))
        stepped, state = in_pieces(mixer, steps, [1, 1, 3, 1], state)
        z, state = mixer(torch.cat(last, 1), state, [0, 2, 2, 5, 6])
        final, _ = mixer(steps[:, :1], state)
        for row in range(4):
            alone = torch.cat([prompts[row], steps[row : row + 1], last[row], steps[row : row + 1, :1]], dim=1)
            parts = [part.split(sizes, dim=1)[row] for part, sizes in ((y, lengths), (z, more))]
            found = torch.cat([parts[0], stepped[row : row + 1], parts[1], final[row : row + 1]], dim=1)
            same(found, mixer(alone)[0])


def test_gradients_flow_through_packed_calls():
    mixer, x = build(window=4), inputs(10, 1).requires_grad_()
    _, state = mixer(x[:, :6], None, [0, 2, 6])
    y, _ = mixer(x[:, 6:].reshape(2, 2, 32), state)
    rows = [torch.cat([x[:, :2], x[:, 6:8]], 1), torch.cat([x[:, 2:6], x[:, 8:]], 1)]
    expected = torch.cat([mixer(row)[0][:, -2:] for row in rows])
    same(y, expected)
    weights = inputs(2, seed=3)
    same(*(torch.autograd.grad((o * weights).sum(), x, retain_graph=True)[0] for o in (y, expected)))


def test_a_packed_call_in_training_copies_nothing_for_its_state():
    _, state = build()(inputs(10, 1), None, [0, 3, 10])
    assert isinstance(state.cache, PackedKV)
    assert state.cache.keys.shape == (1, 10, 1, 32)


@options
def test_state_bytes_equal_the_tensors(chosen):
    mixer = build(**chosen)
    with torch.no_grad():
        for length in (1, 4, 13):
            _, state = mixer(inputs(length))
            _, stepped = in_pieces(mixer, inputs(length), [1] * length)
            reserved = mixer.init_state(2, max_length=length)
            for each in (state, stepped, reserved):
                assert measured_state_bytes(each) == mixer.state_bytes(length, 2)
            used = in_pieces(mixer, inputs(length), [1] * length, reserved)[1]
            assert measured_state_bytes(used) == mixer.state_bytes(length, 2)
    assert measured_state_bytes(mixer.init_state(2)) == mixer.state_bytes(0, 2)
    assert mixer.init_state(1, dtype=torch.bfloat16).cache.keys.dtype == torch.bfloat16


def test_a_window_holds_no_memory_beyond_itself():
    mixer = build(window=5)
    with torch.no_grad():
        _, state = mixer(inputs(100))
    assert state.cache.keys.untyped_storage().nbytes() == 2 * 4 * 32 * 8
    assert mixer.state_bytes(100, 2) == mixer.state_bytes(4, 2) == 2 * 2 * 4 * 32 * 8


def test_a_clone_branches():
    mixer, x = build(), inputs(8)
    with torch.no_grad():
        _, state = mixer(x[:, :5], mixer.init_state(2, max_length=8))
        branch = clone_state(state)
        first = in_pieces(mixer, x[:, 5:], [1, 2], state)[0]
        in_pieces(mixer, inputs(3, seed=9), [3], state)
        same(in_pieces(mixer, x[:, 5:], [1, 2], branch)[0], first)


def test_blocks_serve_a_long_sliding_window():
    mixer, x = (
        build_mixer("sliding_window", d_model=32, window=40, num_heads=4, num_kv_heads=2).double(),
        inputs(500, 1),
    )
    with ops.use_backends(attention="chunk_sdpa"):
        y, _ = mixer(x, None, [0, 400, 500])
    with ops.use_backends(attention="parallel_sdpa"):
        same(y, mixer(x, None, [0, 400, 500])[0])


def test_autocast_and_a_module_that_can_be_copied():
    mixer, x = build_mixer("attention", d_model=32, qk_norm=True), inputs(9).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = mixer(x)
        step, _ = mixer(x[:, :1], state)
    assert y.dtype == step.dtype == torch.bfloat16
    assert (y.float() - mixer(x)[0]).abs().max() < 0.02
    same(copy.deepcopy(mixer)(x)[0], mixer(x)[0])


def test_defaults_of_heads():
    config = lambda **given: build(**given).config  # noqa: E731
    assert (config().heads, config().kv_heads, config().head_width) == (1, 1, 32)
    wide = build_mixer("attention", d_model=128).config
    assert (wide.heads, wide.head_width) == (2, 64)
    assert (config(head_dim=8).heads, config(head_dim=8).head_width) == (4, 8)
    assert build_mixer("sliding_window", d_model=32).config.window == 128


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"window": 0}, "mixer 'attention': window must be at least 1, got 0"),
        ({"num_heads": 3}, r"num_heads \(3\) must divide d_model \(32\)"),
        ({"num_heads": 4, "num_kv_heads": 3}, r"num_kv_heads \(3\) must divide num_heads \(4\)"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"head_dim": 64}, "num_heads must be positive, got 0"),
        ({"head_dim": 5, "num_heads": 2}, "an even number of channels, got 5 of 5"),
        ({"rotary_fraction": 0.01}, "an even number of channels, got 0 of 32"),
        ({"rotary_fraction": 2}, "rotary_fraction must be at most 1, got 2"),
        ({"position": "rotery"}, "Did you mean 'rotary'"),
        ({"windw": 3}, "Did you mean 'window'"),
        ({"conv_width": 9}, "conv_width: .* width of 2 to 8, got 9"),
    ],
)
def test_wrong_options_are_named(chosen, message):
    with pytest.raises(ValueError, match=message):
        build(**chosen)


@pytest.mark.parametrize("window", [None, 3])
def test_sinks_are_one_more_score_of_each_head(window):
    mixer, x = (
        build(window=window, num_heads=4, num_kv_heads=2, position="none", sinks=True).double(),
        inputs(7).double(),
    )
    torch.nn.init.normal_(mixer.sinks)
    (q, k, v), _ = mixer.qkv_proj(x)
    k, v = k.repeat_interleave(2, dim=2), v.repeat_interleave(2, dim=2)
    at = torch.arange(7)
    hidden = (at > at[:, None]) | (at[:, None] - at >= (window or 7))
    scores = (torch.einsum("bqhk,bshk->bhqs", q, k) / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
    scores = torch.cat([scores, mixer.sinks[:, None, None].expand(2, 4, 7, 1)], dim=-1)
    o = torch.einsum("bhqs,bshv->bqhv", scores.softmax(-1)[..., :-1], v)
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(o.flatten(2)), rtol=0, atol=1e-12)


def test_a_sliding_window_needs_a_window():
    with pytest.raises(ValueError, match="got None: that is the mixer 'attention'"):
        build_mixer("sliding_window", d_model=32, window=None)


def test_wrong_calls_are_named():
    mixer = build()
    state = mixer(inputs(4))[1]
    assert isinstance(state.cache, KVCache)
    with pytest.raises(ValueError, match="the state has 2 rows, the call 3 sequences"):
        mixer(inputs(1, 3), clone_state(state))
    with pytest.raises(ValueError, match="the state has 2 rows, the call 1 sequences"):
        mixer(inputs(2, 1), clone_state(state), [0, 2])
    with pytest.raises(ValueError, match="cu_seqlens must end at the length 4, got 3"):
        mixer(inputs(4, 1), None, [0, 3])
    with pytest.raises(ValueError, match="cu_seqlens: expected offsets from 0 to T, got 3"):
        mixer(inputs(4, 1), None, 3)  # pyright: ignore[reportArgumentType]
