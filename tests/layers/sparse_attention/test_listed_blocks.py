"""Sparse attentions as mixers: their patterns against plain loops, their caches. The laws are in ``test_laws``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from seqarch import ops
from seqarch.layers import build_mixer, measured_state_bytes
from seqarch.layers.attention.base import Place
from seqarch.layers.modules.rotary import apply_rotary
from seqarch.layers.sparse_attention.big_bird import BigBird
from seqarch.layers.sparse_attention.longformer import Longformer
from seqarch.layers.sparse_attention.moba import MoBA
from seqarch.testing import assert_close
from tests.support.backends import available
from tests.support.paths import ORACLES


def inputs(length: int, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return build_mixer(name, d_model=32, **options).double()


@torch.no_grad()
def by_mask(mixer: Any, x: Tensor, see: Any) -> Tensor:
    """The mixer's output if query head h at t sees the tokens ``see(q, k, h, t)`` of one row, as a plain loop."""
    config, width = mixer.config, mixer.config.head_width
    sizes = [config.heads * width, config.kv_heads * width, config.kv_heads * width]
    parts = (x @ mixer.qkv_proj.linear.weight.T).split(sizes, dim=-1)
    q, k, v = (part.unflatten(-1, (-1, width)) for part in parts)
    q, k = (apply_rotary(m, torch.arange(x.shape[1])) for m in (q, k))
    k, v = (m.repeat_interleave(config.heads // config.kv_heads, dim=2) for m in (k, v))
    o = torch.zeros_like(q)
    for row in range(x.shape[0]):
        for h in range(config.heads):
            for t in range(x.shape[1]):
                tokens = torch.tensor(sorted(see(q[row, :, h], k[row, :, h], h, t)))
                weights = (k[row, tokens, h] @ q[row, t, h] / width**0.5).softmax(0)
                o[row, t, h] = weights @ v[row, tokens, h]
    return o.flatten(2) @ mixer.out_proj.weight.T


def in_blocks(blocks: set[int], size: int, t: int) -> set[int]:
    return {j for j in range(t + 1) if j // size in blocks}


@pytest.mark.parametrize("top_k", [1, 2, 3, 9])
def test_moba_is_its_equation(top_k):
    mixer, x = build("moba", block_size=4, top_k=top_k, num_heads=4, num_kv_heads=2), inputs(22)

    def see(q: Tensor, k: Tensor, h: int, t: int) -> set[int]:
        own = t // 4
        liked = sorted(range(own), key=lambda n: (q[t] @ k[4 * n : 4 * n + 4].mean(0)).item(), reverse=True)
        return in_blocks({own, *liked[: top_k - 1]}, 4, t)

    assert_close(mixer(x)[0], by_mask(mixer, x, see), 1e-12)


@pytest.mark.parametrize("backend", available("block_sparse_attention"))
def test_moba_equals_its_authors(backend):
    record = load_file(ORACLES / "mixture_of_block_attention.safetensors")
    q, k, v = (record[f"in.{name}"] for name in "qkv")
    mixer = build("moba", num_heads=2, head_dim=16, block_size=16, top_k=3)
    with ops.use_backends(block_sparse_attention=backend):
        sums = mixer.init_state(len(k)).sums
        selection, _ = mixer.select(q, k, Place(torch.arange(90)[None], 90, None), sums)
        assert_close(mixer.attend(q, k, v, *selection), record["out.o"], 2e-6)


def test_one_block_is_its_own():
    """The authors' fast form attends to everything at ``top_k=1``."""
    mixer, x = build("moba", block_size=8, top_k=1), inputs(20)
    y = mixer(x)[0]
    x[:, :8] += 1
    assert torch.equal(mixer(x)[0][:, 8:], y[:, 8:])


def test_generation_chooses_as_training_does():
    mixer, x = build("moba", block_size=4, top_k=2, num_heads=2), inputs(40)
    with torch.no_grad():
        y, _ = mixer(x)
        state, chosen = mixer.init_state(2, max_length=40), []
        select = mixer.select
        mixer.select = lambda *args: chosen.append(select(*args)) or chosen[-1]
        for t in range(40):
            out, state = mixer(x[:, t : t + 1], state)
            assert_close(out, y[:, t : t + 1], 1e-12)
    assert all(((block_index >= 0).sum(-1) <= 2).all() for (block_index,), _ in chosen)
    assert ((chosen[-1][0][0] == 9).sum(-1) == 1).all()
    assert measured_state_bytes(state) == mixer.state_bytes(40, 2)


def test_big_bird_is_its_pattern():
    options = {"block_size": 2, "window_blocks": 2, "global_blocks": 1, "random_blocks": 2, "seed": 5}
    mixer, x = build("big_bird", num_heads=4, num_kv_heads=2, **options), inputs(30)
    drawn = mixer._random_blocks(torch.arange(15)[None], 15)[0]

    def see(q: Tensor, k: Tensor, h: int, t: int) -> set[int]:
        return in_blocks({0, t // 2 - 1, t // 2, *drawn[t // 2, h // 2].tolist()}, 2, t)

    assert_close(mixer(x)[0], by_mask(mixer, x, see), 1e-12)


def test_big_birds_draws():
    mixer = build("big_bird", num_heads=4, block_size=4, seed=3)
    drawn = mixer._random_blocks(torch.arange(400)[None], 400)[0]
    for own, blocks in enumerate(drawn.tolist()):
        between = set(range(2, own - 2))
        for head in blocks:
            found = {block for block in head if block <= own}
            assert found <= between, (own, head)
            assert len(found) == min(3, len(between)), (own, head)
    assert (drawn[50:, 0] != drawn[50:, 1]).any(-1).float().mean() > 0.9
    other = build("big_bird", num_heads=4, block_size=4, seed=4)._random_blocks(torch.arange(400)[None], 400)[0]
    assert (drawn[50:] != other[50:]).any(-1).float().mean() > 0.9
    share = ((drawn[50:] - 2) / (torch.arange(50, 400)[:, None, None] - 4)).flatten()
    counts = torch.histc(share, bins=4, min=0, max=1) / len(share)
    assert (counts - 0.25).abs().max() < 0.04, "draws are not uniform"
    assert torch.equal(mixer._random_blocks(torch.tensor([[77]]), 78)[0, 0], drawn[77])


def test_longformer_is_its_pattern():
    mixer, x = build("longformer", num_heads=2, window=5, block_size=2, global_tokens=4), inputs(23)
    see = lambda q, k, h, t: {j for j in range(t + 1) if t - j < 5 or j < 4}  # noqa: E731
    assert_close(mixer(x)[0], by_mask(mixer, x, see), 1e-12)


@pytest.mark.parametrize("reserved", [None, 3, 40])
@pytest.mark.parametrize("name", ["longformer", "big_bird", "moba"])
def test_prompts_of_different_lengths_then_steps_for_all(name, reserved):
    chosen: dict[str, dict[str, Any]] = {
        "longformer": {"window": 3, "block_size": 2, "global_tokens": 4},
        "big_bird": {"block_size": 2, "window_blocks": 1, "global_blocks": 1, "random_blocks": 1},
        "moba": {"block_size": 3, "top_k": 2},
    }
    mixer, lengths, more = build(name, num_heads=2, **chosen[name]), [4, 1, 13, 0], [2, 0, 7, 1]
    prompts = [inputs(n, 1, seed=n) for n in lengths]
    steps, last = inputs(9, 4, seed=20), [inputs(n, 1, seed=30 + n) for n in more]
    with torch.no_grad():
        state = None if reserved is None else mixer.init_state(4, max_length=reserved)
        y, state = mixer(torch.cat(prompts, 1), state, [0, 4, 5, 18, 18])
        stepped = []
        for piece in steps.split([1, 1, 4, 3], dim=1):
            out, state = mixer(piece, state)
            stepped.append(out)
        z, state = mixer(torch.cat(last, 1), state, [0, 2, 2, 9, 10])
        final, _ = mixer(steps[:, :1], state)
        for row in range(4):
            alone = torch.cat([prompts[row], steps[row : row + 1], last[row], steps[row : row + 1, :1]], dim=1)
            parts = [part.split(sizes, dim=1)[row] for part, sizes in ((y, lengths), (z, more))]
            found = [parts[0], torch.cat(stepped, 1)[row : row + 1], parts[1], final[row : row + 1]]
            assert_close(torch.cat(found, dim=1), mixer(alone)[0], 1e-12, f"row {row}")


def test_longformers_cache_stops_growing():
    mixer, x = build("longformer", window=5, block_size=2, global_tokens=4), inputs(30)
    with torch.no_grad():
        _, state = mixer(x)
        assert state.cache.keys.shape[1] == 8
        for _ in range(3):
            _, state = mixer(x[:, :1], state)
    assert measured_state_bytes(state) == mixer.state_bytes(8, 2) == mixer.state_bytes(33, 2)


@pytest.mark.parametrize("length", [1, 4, 37, 130])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (BigBird, {"block_size": 4, "window_blocks": 2, "global_blocks": 2}),
        (MoBA, {"block_size": 8, "top_k": 4}),
        (Longformer, {"window": 9, "global_tokens": 16}),
    ],
)
def test_step_costs_stop_growing_and_add_up(kind, options, length):
    mixer = kind(kind.Config(d_model=32, **options))
    steps = [mixer.step_flops(t) for t in range(length)]
    scores = (
        0 if kind is not MoBA else 2 * 32 * sum(mixer._blocks(length) - mixer._blocks(t + 1) for t in range(length))
    )
    assert sum(steps) + scores == mixer.flops(length)


def test_wrong_options_are_named():
    with pytest.raises(
        ValueError, match=r"global_tokens \(10\) must be a multiple of block_size \(16\): try block_size 2"
    ):
        build("longformer", global_tokens=10)
    with pytest.raises(ValueError, match="window_blocks must be at least 1, got 0"):
        build("big_bird", window_blocks=0)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        build("moba", top_k=0)
