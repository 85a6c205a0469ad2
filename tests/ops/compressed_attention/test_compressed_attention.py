"""Attention to compressed blocks and the choice of blocks against dense masks and loops, written apart from it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from seqarch import ops
from seqarch.ops.compressed_attention import chunk_torch, flops
from seqarch.ops.compressed_attention.blocks import Blocks, importance, select_blocks
from seqarch.ops.compressed_attention.recurrent_torch import shared_strides
from seqarch.ops.native.custom_op import Upstream
from seqarch.testing import assert_close
from tests.support.backends import available
from tests.support.largest import LargestTensor
from tests.support.paths import ORACLES

BACKENDS = available("compressed_attention")
SIZES = "compressed_length", "compressed_stride", "block_size", "selected_blocks", "initial_blocks", "local_blocks"

CALLS: dict[str, dict[str, Any]] = {
    "square": {"shape": (2, 29, 4, 4, 4, 4), "blocks": (6, 2, 4, 4, 1, 1)},
    "key_heads": {"shape": (2, 29, 6, 2, 4, 3), "blocks": (6, 2, 4, 4, 1, 2)},
    "apart": {"shape": (1, 29, 2, 1, 4, 4), "blocks": (4, 4, 4, 3, 0, 1)},
    "none_forced": {"shape": (1, 29, 2, 1, 4, 4), "blocks": (4, 2, 8, 2, 0, 0)},
    "few_blocks": {"shape": (1, 7, 2, 1, 4, 4), "blocks": (4, 2, 4, 9, 1, 1)},
    "none_complete": {"shape": (2, 7, 2, 1, 4, 4), "blocks": (12, 2, 2, 3, 1, 1)},
    "scaled": {"shape": (1, 20, 2, 1, 4, 4), "blocks": (6, 2, 4, 4, 1, 1), "scale": 0.7},
    "step": {"shape": (2, 1, 4, 2, 4, 4), "blocks": (6, 2, 4, 4, 1, 1), "query_start": 30},
    "continued": {"shape": (2, 11, 4, 2, 4, 4), "blocks": (6, 2, 4, 4, 1, 1), "query_start": 30},
    "packed": {"shape": (1, 40, 4, 2, 4, 4), "blocks": (6, 2, 4, 4, 1, 1), "cu_seqlens": [0, 3, 3, 20, 40]},
    "key_start": {
        "shape": (3, 9, 4, 2, 4, 4),
        "blocks": (6, 2, 4, 4, 1, 1),
        "query_start": 20,
        "key_start": [0, 7, 26],
    },
    "fewer_blocks": {"shape": (2, 9, 4, 2, 4, 4), "blocks": (6, 2, 4, 4, 1, 1), "key_start": [3, 5], "missing": 2},
    "long": {"shape": (2, 70, 2, 1, 4, 4), "blocks": (12, 4, 8, 5, 1, 2)},
    "long_packed": {"shape": (1, 80, 2, 1, 4, 4), "blocks": (12, 4, 8, 5, 1, 2), "cu_seqlens": [0, 7, 43, 43, 80]},
    "long_key_start": {
        "shape": (2, 50, 2, 1, 4, 4),
        "blocks": (12, 4, 8, 5, 1, 2),
        "query_start": 20,
        "key_start": [5, 50],
    },
}


def make(call: str, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k and v; the other arguments."""
    options = dict(CALLS[call])
    B, T, H, G, K, V = options.pop("shape")
    blocks, missing = Blocks(*options.pop("blocks")), options.pop("missing", 0)
    torch.manual_seed(0)
    lengths = [
        end - start for start, end in pairwise(options.get("cu_seqlens", [0, options.get("query_start", 0) + T]))
    ]
    count = sum(map(blocks.complete, lengths)) - missing
    if "key_start" in options:
        options["key_start"] = torch.tensor(options["key_start"])
    inputs = [torch.randn(*shape).to(dtype) for shape in ((B, T, H, K), (B, count, G, K), (B, count, G, V))]
    return inputs, {**dict(zip(SIZES, blocks, strict=True)), **options}


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short sequences have several."""
    monkeypatch.setattr("seqarch.ops.chunked.queries.QUERIES", 16)


def by_loop(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, list[Any]]:
    """Outputs and, nested as ``[B, T, G]``, the list of each query without its -1s; row by row, head by head."""
    if "cu_seqlens" not in options:
        starts = options.pop("key_start", torch.zeros(len(q), dtype=torch.int64)).tolist()
        rows = [row_by_loop(*each, **options) for each in zip(q, k, v, starts, strict=True)]
        return torch.stack([o for o, _ in rows]), [lists for _, lists in rows]
    offsets, begin, parts = options.pop("cu_seqlens"), 0, []
    for start, end in pairwise(offsets):
        count = max(0, (end - start - options["compressed_length"]) // options["compressed_stride"] + 1)
        own = slice(begin, begin + count)
        parts.append(row_by_loop(q[0, start:end], k[0, own], v[0, own], 0, **options))
        begin += count
    return torch.cat([o for o, _ in parts])[None], [[query for _, lists in parts for query in lists]]


def row_by_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: int,
    compressed_length: int,
    compressed_stride: int,
    block_size: int,
    selected_blocks: int,
    initial_blocks: int,
    local_blocks: int,
    query_start: int = 0,
    scale: float | None = None,
) -> tuple[Tensor, list[Any]]:
    scale, groups = q.shape[-1] ** -0.5 if scale is None else scale, k.shape[1]
    outputs, lists = [], []
    for i, query in enumerate(q):
        t = query_start + i - first
        seen = [b for b in range(len(k)) if b * compressed_stride + compressed_length - 1 <= t]
        o, chosen = [], []
        for g, heads in enumerate(query.unflatten(0, (groups, -1))):
            weights = (scale * heads @ k[seen, g].T).softmax(-1)
            o.append(weights @ v[seen, g])
            score = [0.0] * (max(0, t) // block_size + 1)
            for b, p in zip(seen, weights.sum(0).tolist(), strict=True):
                for token in range(b * compressed_stride, b * compressed_stride + compressed_length):
                    score[token // block_size] += p
            own = t // block_size
            forced = {*range(initial_blocks), *range(own - local_blocks + 1, own + 1)} & set(range(own + 1))
            others = sorted(set(range(own + 1)) - forced, key=lambda j: -round(score[j], 9))
            chosen.append([*sorted(forced), *others[: selected_blocks - len(forced)]])
        outputs.append(torch.cat(o))
        lists.append(chosen)
    return torch.stack(outputs) if outputs else q.new_zeros(0, q.shape[1], v.shape[2]), lists


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    o = function(*leaves)
    cotangent = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o.dtype)
    return [o.detach(), *torch.autograd.grad((o * cotangent).sum(), leaves)]


def call_op(backend: str, options: dict[str, Any]) -> Callable[..., Tensor]:
    return lambda *inputs: ops.compressed_attention(*inputs, **options, backend=backend)[0]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for name, one, other in zip(("o", "dq", "dk", "dv"), found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_outputs_gradients_and_lists_are_those_of_a_loop(call, backend):
    inputs, options = make(call)
    same(
        with_gradients(call_op(backend, options), inputs), with_gradients(lambda *x: by_loop(*x, **options)[0], inputs)
    )
    with torch.no_grad():
        o, index = ops.compressed_attention(*inputs, **options, backend=backend)
    expected, lists = by_loop(*inputs, **options)
    torch.testing.assert_close(o, expected)
    found = [[[[j for j in group if j >= 0] for group in query] for query in row] for row in index.tolist()]
    assert found == lists


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_finite_differences(backend, monkeypatch):
    monkeypatch.setattr("seqarch.ops.chunked.queries.QUERIES", 4)
    sizes = {**dict(zip(SIZES, (4, 2, 4, 2, 1, 1), strict=True)), "query_start": 3, "key_start": torch.tensor([0, 3])}
    leaves = [torch.randn(2, n, h, 3, dtype=torch.float64, requires_grad=True) for n, h in ((11, 4), (6, 2), (6, 2))]
    assert torch.autograd.gradcheck(call_op(backend, sizes), leaves, fast_mode=backend != "chunk_torch")


def test_a_block_weighs_compressed_ones_by_the_tokens_that_they_share():
    for length, stride, size in ((32, 16, 64), (6, 2, 4), (8, 8, 8), (4, 2, 8), (12, 4, 4)):
        blocks, tokens = Blocks(length, stride, size, 3, 1, 1), 5 * size + 3
        weights = torch.rand(blocks.complete(tokens), dtype=torch.float64)
        expected = torch.zeros(blocks.selectable(tokens), dtype=torch.float64)
        for i, weight in enumerate(weights):
            for token in range(i * stride, i * stride + length):
                expected[token // size] += weight / stride
        torch.testing.assert_close(importance(weights, blocks, len(expected)), expected)
        shared = shared_strides(blocks, len(weights), tokens, weights.device)
        torch.testing.assert_close((weights.unsqueeze(1) * shared).sum(0), expected)


def test_forced_blocks_come_first_and_equals_in_order():
    blocks = Blocks(4, 4, 4, 5, 1, 2)
    scores = torch.tensor([0.0, 0.2, 0.1, 0.3, 0.1, 0.1, 0.0, 0.9, 0.9])
    at = torch.tensor([[0, 7, 30]])  # in blocks 0, 1 and 7; block 8 is later than all of them
    chosen = select_blocks(scores.expand(1, 1, 3, -1), at, blocks)[0, :, 0].tolist()
    assert chosen == [[0, -1, -1, -1, -1], [0, 1, -1, -1, -1], [0, 6, 7, 3, 1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_blocks_are_listed_from_the_first_on(backend):
    (q, k, v), options = make("long")
    _, index = ops.compressed_attention(q, 0 * k, v, **options, backend=backend)
    # of 9 blocks: the first, the last two, then those that most compressed blocks overlap, of equals the first
    assert index[0, -1, 0].tolist() == [0, 7, 8, 1, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_independent_implementation_agrees(backend):
    """Mean pooling, blocks that do not overlap, keys and values shared by the branches."""
    record = load_file(ORACLES / "native_sparse_attention.safetensors")
    x = {name: record[f"in.{name}"].double().requires_grad_() for name in ("q", "k", "v", "g_cmp", "g_slc")}
    keys, values = (x[name].unflatten(1, (-1, 16)).mean(2) for name in ("k", "v"))
    compressed, index = ops.compressed_attention(x["q"], keys, values, 16, 16, 16, 4, scale=0.25, backend=backend)
    assert torch.equal(index.sort(-1).values, record["in.block_index"].sort(-1).values)
    selected = ops.block_sparse_attention(x["q"], x["k"], x["v"], index, 16, scale=0.25)
    out = {"compressed": compressed, "selected": selected}
    out["o"] = compressed * x["g_cmp"].unsqueeze(-1) + selected * x["g_slc"].unsqueeze(-1)
    weighted = torch.stack([(out[name] * record[f"cotangent.{name}"]).sum() for name in out]).sum()
    gradients = torch.autograd.grad(weighted, list(x.values()))
    for name, tensor in out.items():
        assert_close(tensor, record[f"out.{name}"], 1e-6, name)
    for name, gradient in zip(x, gradients, strict=True):
        assert_close(gradient, record[f"grad.{name}"], 1e-6, f"gradient of {name}")


@pytest.mark.parametrize("shape", [(0, 9), (2, 0), (2, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_attend_to_keeps_gradients_defined(shape, backend):
    B, T = shape
    options = dict(zip(SIZES, (4, 2, 4, 3, 1, 1), strict=True))
    count = Blocks(*options.values()).complete(T)
    inputs = [torch.randn(B, T, 4, 8), torch.randn(B, count, 2, 8), torch.randn(B, count, 2, 6)]
    o, *gradients = with_gradients(call_op(backend, options), inputs)
    _, index = ops.compressed_attention(*inputs, **options, backend=backend)
    assert o.shape == (B, T, 4, 6)
    assert index.shape == (B, T, 2, min(3, -(-T // 4)))
    assert all((x == 0).all() for x in (o, *gradients))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_and_strided_inputs(backend):
    inputs, options = make("long")
    expected = with_gradients(call_op(backend, options), inputs)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    same(with_gradients(call_op(backend, options), strided), expected)
    low = [x.bfloat16() for x in inputs]
    o, index = ops.compressed_attention(*low, **options, backend=backend)
    wide, chosen = ops.compressed_attention(*(x.float() for x in low), **options, backend=backend)
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, wide.bfloat16())
    assert torch.equal(index, chosen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_sums_and_choices_alone(backend):
    inputs, options = make("long", torch.float32)
    expected = ops.compressed_attention(*inputs, **options, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.compressed_attention(*inputs, **options, backend=backend)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_in_a_block_stays_in_its_row_and_head(backend):
    (q, k, v), options = make("key_heads")
    clean = call_op(backend, options)(q, k, v)
    for place, number in ((1, float("nan")), (2, float("inf"))):
        given = [q, k.clone(), v.clone()]
        given[place][0, 5, 0] = number  # complete at 15
        equal = call_op(backend, options)(*given) == clean
        assert equal[1].all()
        assert equal[0, :, 3:].all()
        assert not equal[0, 15:, :3].any()
        assert equal[0, :15].all() or (place == 2 and backend == "chunk_torch")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", ["block_size", "selected_blocks"])
def test_numbers_beyond_all_tokens_mean_all_of_them(option, backend):
    inputs, options = make("few_blocks")
    options |= {"compressed_length": 4, "compressed_stride": 1}
    inputs[1:] = [torch.randn(1, 4, 1, 4, dtype=torch.float64) for _ in range(2)]
    expected = ops.compressed_attention(*inputs, **{**options, option: 7}, backend=backend)
    for huge in (10**9, 2**62, sys.maxsize):
        found = ops.compressed_attention(*inputs, **{**options, option: huge}, backend=backend)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("call", ["square", "key_heads", "none_complete", "step", "continued", "long"])
def test_flops_equal_what_the_reference_does(call):
    (q, k, v), options = make(call)
    blocks, before = Blocks(*(options[name] for name in SIZES)), options.get("query_start", 0)
    with FlopCounterMode(display=False) as counter:
        ops.compressed_attention(q, k, v, **options, backend="recurrent_torch")
    widths = q.shape[3], v.shape[3]
    assert counter.get_total_flops() == flops(q.shape[1], before, q.shape[2], *widths, blocks, q.shape[0])


def test_no_tensor_holds_all_pairs():
    length, sizes = 2048, Blocks(32, 16, 64, 16, 1, 2)
    q, v = torch.randn(1, length, 1, 4), torch.randn(1, length, 1, 4)
    k = torch.randn(1, sizes.complete(length), 1, 4)
    with LargestTensor() as largest:
        inputs = ops.OPS["compressed_attention"].inputs(q, k, k, **dict(zip(SIZES, sizes, strict=True)))
        chunk_torch.forward(inputs)
        chunk_torch.backward(inputs, Upstream([], [v], [True] * 3))
    assert 0 < largest.elements <= length * 64


def test_compiled_whole():
    inputs, options = make("long_key_start")
    torch.compiler.reset()
    compiled = torch.compile(call_op("auto", options), fullgraph=True, backend="aot_eager")
    same(with_gradients(compiled, inputs), with_gradients(call_op("auto", options), inputs))


def test_the_custom_operators_are_sound():
    for call in ("key_start", "square"):
        inputs, options = make(call)
        given = ops.OPS["compressed_attention"].inputs(*(x.requires_grad_() for x in inputs), **options)
        torch.library.opcheck(torch.ops.seqarch.compressed_attention.default, given.values())


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"compressed_length": 3}, ValueError, r"compressed_length \(3\) must be a multiple of compressed_stride \(2\)"),
    ({"block_size": 5}, ValueError, r"block_size \(5\) must be a multiple of compressed_stride \(2\)"),
    ({"compressed_stride": 0}, ValueError, "compressed_stride is 0, expected a whole number of at least 1"),
    ({"selected_blocks": 2}, ValueError, r"selected_blocks \(2\) must hold the forced ones, 1 initial and 2 local"),
    ({"local_blocks": -1}, ValueError, "local_blocks is -1, expected a whole number of at least 0"),
    ({"query_start": -1}, ValueError, "query_start is -1, expected a whole number of at least 0"),
    ({"block_size": 2.0}, TypeError, r"block_size is float 2\.0, expected int"),
    ({"query_start": 2}, ValueError, "k and v hold 2 blocks, expected the 3 that 8 tokens complete"),
    ({"k": torch.zeros(2, 3, 2, 8)}, ValueError, "v has shape .* with M = 3 as in k"),
    ({"q": torch.zeros(2, 6, 3, 8)}, ValueError, r"the heads of q \(3\) must be a multiple of the heads of k and v"),
    ({"q": torch.zeros(2, 6, 4, 8).long()}, TypeError, "q has dtype torch.int64"),
    ({"scale": float("nan")}, ValueError, "scale is float nan, expected a finite number"),
    ({"cu_seqlens": [0, 3]}, ValueError, "batch of 1, got a batch of 2"),
    ({"cu_seqlens": [0, 6], "query_start": 2}, ValueError, "from their beginning, got query_start 2"),
    ({"key_start": torch.tensor([0.0, 1.0])}, TypeError, "key_start has dtype torch.float32"),
    ({"key_start": torch.tensor([0, 1]), "cu_seqlens": [0, 6]}, ValueError, "give one of them"),
    ({"backend": "chunk_trch"}, ValueError, "Did you mean 'chunk_torch'"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_bad_input_is_named(change, error, message):
    q, k, v = torch.zeros(2, 6, 4, 8), torch.zeros(2, 2, 2, 8), torch.zeros(2, 2, 2, 8)
    sizes = {"compressed_length": 4, "compressed_stride": 2, "block_size": 4, "selected_blocks": 4}
    with pytest.raises(error, match=message):
        ops.compressed_attention(**{"q": q, "k": k, "v": v, **sizes, **change})
