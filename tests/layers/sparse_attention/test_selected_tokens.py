"""Attentions whose queries choose what they read, native and DeepSeek's: equations, choices, caches and losses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from seqarch.layers import build_mixer, clone_state, measured_state_bytes
from seqarch.layers.modules.rotary import apply_rotary
from seqarch.layers.sparse_attention.dsa import DSA
from seqarch.layers.sparse_attention.nsa import NSA
from seqarch.models import LanguageModel, LMConfig
from seqarch.ops.compressed_attention import Blocks
from seqarch.testing import assert_close, inputs
from tests.support.largest import LargestTensor

SMALL = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "compressed_length": 6,
    "compressed_stride": 2,
    "block_size": 4,
    "selected_blocks": 4,
    "window": 7,
}


LATENT = {"top_k": 5, "num_heads": 2, "q_lora_rank": 8}


def native(**options) -> NSA:
    mixer = build_mixer("nsa", d_model=32, **{**SMALL, **options}).double()
    assert isinstance(mixer, NSA)
    return mixer


def deepseek(**options) -> DSA:
    mixer = build_mixer("dsa", d_model=32, **{"num_heads": 4, "num_kv_heads": 2, **options}).double()
    assert isinstance(mixer, DSA)
    return mixer


def loss_of(mixer: DSA) -> Tensor:
    loss = mixer.auxiliary_loss()
    assert loss is not None
    return loss


def softmax_read(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """What one query of one head reads; nothing to see gives 0."""
    if not keys:
        return torch.zeros_like(q)
    weights = (torch.stack(keys) @ q / math.sqrt(len(q))).softmax(0)
    return weights @ torch.stack(values)


def test_a_compressed_block_may_be_longer_than_all_tokens():
    # longer than a block to select by two strides or more, so that blocks begin before any is compressed
    chosen, x = {"compressed_length": 12, "compressed_stride": 2, "block_size": 2}, inputs(15)
    mixer = native(**chosen)
    with torch.no_grad():
        assert_close(mixer(x)[0][1], native_by_loop(mixer, x[1]), 1e-12)
        for length in (1, 5, 11):
            assert_close(mixer(x[:, :length])[0][1], native_by_loop(mixer, x[1, :length]), 1e-12)


# native sparse attention


def native_by_loop(mixer: NSA, x: Tensor) -> Tensor:
    """One sequence ``[T, D]``, token by token and head by head, as sections 3.2 and 3.3 of the paper have it."""
    c, tokens = mixer.config, range(len(x))
    heads, groups, width = c.heads, c.kv_heads, c.head_width
    length, stride, size = c.compressed_length, c.compressed_stride, c.block_size
    parts = (x @ mixer.qkv_proj.linear.weight.T).split(mixer.qkv_proj.sizes, dim=-1)
    q, *kv = (part.unflatten(-1, (-1, width)) for part in parts)
    turn = lambda m: apply_rotary(m[None], torch.arange(len(m)))[0]  # noqa: E731
    q, k_selected, k_near = turn(q), turn(kv[2]), turn(kv[4])
    v_selected, v_near = kv[3], kv[5]

    def compress(module, raw: Tensor, i: int) -> Tensor:
        block = (raw[i * stride : i * stride + length] + module.place).flatten()
        return module.w_out @ torch.nn.functional.silu(module.w_in @ block)

    count = max(0, (len(x) - length) // stride + 1)
    ck = [[compress(mixer.compress_key, kv[0][:, g], i) for i in range(count)] for g in range(groups)]
    ck = [[apply_rotary(k[None, None, None], torch.tensor([i * stride]))[0, 0, 0] for i, k in enumerate(g)] for g in ck]
    cv = [[compress(mixer.compress_value, kv[1][:, g], i) for i in range(count)] for g in range(groups)]
    gates = (x @ mixer.gate.weight.T).sigmoid().unflatten(-1, (3, heads))
    rows = []
    for t in tokens:
        seen = [i for i in range(count) if i * stride + length - 1 <= t]
        o = torch.zeros(heads, width, dtype=x.dtype)
        for g in range(groups):
            members = range(g * heads // groups, (g + 1) * heads // groups)
            weight = torch.zeros(len(x) // size + 1, dtype=x.dtype)
            for h in members:
                o[h] += gates[t, 0, h] * softmax_read(q[t, h], [ck[g][i] for i in seen], [cv[g][i] for i in seen])
                scores = torch.stack([ck[g][i] @ q[t, h] for i in seen]) if seen else torch.zeros(0)
                for i, p in zip(seen, (scores / math.sqrt(width)).softmax(0), strict=True):
                    for j in range(i * stride, i * stride + length):
                        weight[j // size] += p
            own = t // size
            forced = {*range(c.initial_blocks), *range(own - c.local_blocks + 1, own + 1)} & set(range(own + 1))
            others = sorted(set(range(own + 1)) - forced, key=lambda j: -float(weight[j]))
            chosen = forced | set(others[: c.selected_blocks - len(forced)])
            near = range(max(0, t - c.window + 1), t + 1)
            for h in members:
                read = [j for j in range(t + 1) if j // size in chosen]
                o[h] += gates[t, 1, h] * softmax_read(q[t, h], list(k_selected[read, g]), list(v_selected[read, g]))
                o[h] += gates[t, 2, h] * softmax_read(q[t, h], list(k_near[near, g]), list(v_near[near, g]))
        rows.append(mixer.out_proj.weight @ o.flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("chosen", [{}, {"initial_blocks": 0, "local_blocks": 1, "compressed_length": 2}], ids=str)
def test_nsa_is_its_equation(chosen):
    mixer, x = native(**chosen), inputs(45)
    with torch.no_grad():
        assert_close(mixer(x)[0][1], native_by_loop(mixer, x[1]), 1e-12)


def test_nsa_defaults_are_the_papers():
    config = build_mixer("nsa", d_model=64).config
    assert config.blocks == Blocks(length=32, stride=16, size=64, count=16, initial=1, local=2)
    assert config.window == 512


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"compressed_length": 9}, "compressed_length .9. must be a multiple of compressed_stride .2."),
        ({"block_size": 5}, "block_size .5. must be a multiple"),
        ({"selected_blocks": 2}, "selected_blocks .2. must hold the forced ones, 1 initial and 2 local"),
        ({"local_blocks": 0}, "local_blocks must be at least 1"),
    ],
)
def test_nsa_options_are_checked(chosen, message):
    with pytest.raises(ValueError, match=message):
        native(**chosen)


def test_room_is_written_in_place_also_after_packed_prompts():
    mixer, x = native(), inputs(30, batch=1)
    with torch.no_grad():
        state = mixer.init_state(2, max_length=40)
        _, state = mixer(x, state, [0, 13, 30])
        _, state = mixer(inputs(1), state)
        buffers = [cache.keys.data_ptr() for cache in (state.selected,)]
        for step in range(3):
            _, state = mixer(inputs(1, seed=step), state)
        assert [cache.keys.data_ptr() for cache in (state.selected,)] == buffers
        state = mixer.init_state(2, max_length=40)
        room = [cache.keys.data_ptr() for cache in (state.selected, state.compressed)]
        for step in range(40):
            _, state = mixer(inputs(1, seed=step), state)
        assert [cache.keys.data_ptr() for cache in (state.selected, state.compressed)] == room
        assert measured_state_bytes(state) == mixer.state_bytes(40, 2)


@pytest.mark.parametrize(
    ("name", "chosen"),
    [pytest.param("nsa", SMALL, marks=pytest.mark.slow), ("dsa", {"top_k": 5, "num_heads": 2}), ("sparse_mla", LATENT)],
)
def test_prompts_of_different_lengths_continue_as_they_do_alone(name, chosen):
    config = LMConfig(vocab_size=31, d_model=32, pattern=name, depth=2, mixers={name: chosen})
    model = LanguageModel(config).double()
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9], [2, 7], [1, 6, 1, 8, 0, 3, 3]]
    together = model.generate(prompts, 25)
    for prompt, row in zip(prompts, together, strict=True):
        assert torch.equal(row, model.generate(prompt, 25)[0])


def test_a_state_of_other_rows_is_an_error():
    mixer, state = native(), native().init_state(3)
    with pytest.raises(ValueError, match="the state has 3 rows, the call 2 sequences"):
        mixer(inputs(4), state)


# DeepSeek sparse attention


def deepseek_by_loop(mixer: DSA, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of one sequence ``[T, D]`` and the sum of the indexer's divergences, token by token."""
    c = mixer.config
    turn = lambda m: apply_rotary(m[None], torch.arange(len(m)))[0]  # noqa: E731
    q, k, v = (
        part.unflatten(-1, (-1, c.head_width)) for part in mixer.qkv_proj.linear(x).split(mixer.qkv_proj.sizes, -1)
    )
    q, k = turn(q), turn(k)
    index_q = turn(mixer.index_query(x).unflatten(-1, (c.index_heads, c.index_width)))
    index_k = turn(mixer.index_norm(mixer.index_key(x)).unsqueeze(1))[:, 0]
    weight = mixer.index_weight(x) / math.sqrt(c.index_heads * c.index_width)
    rows, divergence = [], torch.zeros((), dtype=x.dtype)
    for t in range(len(x)):
        scores = torch.stack([(weight[t] * (index_q[t] @ index_k[s]).relu()).sum() for s in range(t + 1)])
        chosen = sorted(range(t + 1), key=(-scores).tolist().__getitem__)[: c.top_k]
        o, target = [], torch.zeros(len(chosen), dtype=x.dtype)
        for h in range(c.heads):
            g = h * c.kv_heads // c.heads
            p = (k[chosen, g] @ q[t, h] / math.sqrt(c.head_width)).softmax(0)
            o.append(p @ v[chosen, g])
            target = target + p.detach() / c.heads
        guess = scores[chosen].log_softmax(0)
        divergence = divergence + (target * (target.log() - guess)).sum()
        rows.append(mixer.out_proj(torch.cat(o)))
    return torch.stack(rows), divergence


@pytest.mark.parametrize("top_k", [2, 6, 64])
def test_dsa_is_its_equation_and_its_loss(top_k, monkeypatch):
    monkeypatch.setattr("seqarch.ops.chunked.queries.QUERIES", 8)
    mixer, x = deepseek(top_k=top_k, index_heads=3, index_width=8, index_loss_weight=0.5), inputs(21)
    mixer.index_norm.weight.data.uniform_(0.5, 2)
    expected = [deepseek_by_loop(mixer, row) for row in x]
    y, _ = mixer(x)
    assert_close(y, torch.stack([o for o, _ in expected]), 1e-12)
    loss = 0.5 * torch.stack([divergence for _, divergence in expected]).sum() / 42
    assert_close(loss_of(mixer), loss, 1e-12)
    indexer = [parameter for name, parameter in mixer.named_parameters() if name.startswith("index_")]
    got, wanted = (torch.autograd.grad(each, indexer) for each in (loss_of(mixer), loss))
    for a, b in zip(got, wanted, strict=True):
        assert_close(a, b, 1e-12)


def test_the_indexer_learns_from_its_loss_alone_and_nothing_else_does():
    mixer, x = deepseek(top_k=4), inputs(20).requires_grad_()
    named = {"x": x, **dict(mixer.named_parameters())}
    y, _ = mixer(x)
    for total, learns in ((y.sum(), False), (loss_of(mixer), True)):
        gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        for name, gradient in zip(named, gradients, strict=True):
            assert (gradient is not None) == (name.startswith("index_") is learns), name


def test_the_loss_falls_to_what_the_choice_allows():
    mixer, x = deepseek(top_k=8, num_heads=2, index_heads=8), inputs(24)
    indexer = [parameter for name, parameter in mixer.named_parameters() if name.startswith("index_")]
    optimiser = torch.optim.Adam(indexer, lr=3e-3)
    losses = []
    for _ in range(60):
        mixer(x)
        losses.append(loss_of(mixer))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]


def test_there_is_a_loss_in_training_alone():
    mixer, x = deepseek(top_k=4), inputs(9)
    assert mixer.auxiliary_loss() is None
    mixer(x)
    copy.deepcopy(mixer)
    assert loss_of(mixer).requires_grad
    with torch.no_grad():
        mixer(x)
    assert mixer.auxiliary_loss() is None
    mixer.eval()(x)
    assert mixer.auxiliary_loss() is None


def test_packed_losses_are_averaged_over_tokens():
    mixer, x = deepseek(top_k=4), inputs(20, batch=1)
    mixer(x, None, [0, 5, 5, 20])
    packed = loss_of(mixer)
    apart = []
    for piece in x.split([5, 15], dim=1):
        mixer(piece)
        apart.append(loss_of(mixer) * piece.shape[1] / 20)
    assert_close(packed, torch.stack(apart).sum(), 1e-12)


def test_equal_scores_choose_the_earlier_tokens_in_steps_as_at_once():
    mixer, x = deepseek(top_k=5, position="none"), inputs(30)
    with torch.no_grad():
        mixer.index_weight.weight.zero_()  # all scores are 0
        y, _ = mixer(x)
        state = mixer.init_state(2)
        for t in range(30):
            out, state = mixer(x[:, t : t + 1], state)
            assert_close(out[:, 0], y[:, t], 1e-10)
        tail = x.clone()
        tail[:, 5:29] += 1  # not among the first five, and not the last query
        assert_close(mixer(tail)[0][:, 29], y[:, 29], 1e-12)


def test_dsa_options_are_checked():
    with pytest.raises(ValueError, match="top_k=1 leaves the indexer nothing to learn"):
        deepseek(top_k=1)
    with pytest.raises(ValueError, match="even number of channels, got 5 of index_width"):
        deepseek(index_width=5)


# both


def test_no_tensor_holds_all_pairs():
    length = 2048
    for name, chosen in (("nsa", {"window": 64}), ("dsa", {"top_k": 16}), ("sparse_mla", {"top_k": 16})):
        mixer = build_mixer(name, d_model=32, **chosen)
        x = torch.randn(1, length, 32, requires_grad=True)
        with LargestTensor() as seen:
            y, _ = mixer(x)
            loss = mixer.auxiliary_loss()
            (y.sum() if loss is None else y.sum() + loss).backward()
        assert 0 < seen.elements <= length * length / 8


@pytest.mark.parametrize(("name", "chosen"), [("nsa", SMALL), ("dsa", {"top_k": 4}), ("sparse_mla", LATENT)])
def test_autocast_chooses_in_full_precision(name, chosen):
    mixer, x = build_mixer(name, d_model=32, **chosen), torch.randn(2, 40, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x)
        z, _ = mixer(x[:, :1], clone_state(state))
    assert z.isfinite().all()
    assert_close(y, mixer(x)[0], 0.05)
