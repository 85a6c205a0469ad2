"""The lightning indexer's choice against a loop, written apart from it."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from seqarch import ops
from seqarch.ops.chunked.queries import largest
from seqarch.ops.index_topk import chunk_torch, flops
from tests.support.backends import available
from tests.support.largest import LargestTensor

BACKENDS = available("index_topk")

CALLS: dict[str, dict[str, Any]] = {
    "square": {"shape": (2, 13, 13, 3, 4), "top_k": 4},
    "one": {"shape": (2, 13, 13, 1, 4), "top_k": 1},
    "all": {"shape": (2, 13, 13, 3, 4), "top_k": 99},
    "step": {"shape": (2, 1, 14, 3, 4), "top_k": 4},
    "more_keys": {"shape": (2, 5, 14, 3, 4), "top_k": 4},
    "more_queries": {"shape": (2, 9, 4, 3, 4), "top_k": 3},
    "packed": {"shape": (1, 20, 20, 3, 4), "top_k": 3, "cu_seqlens": [0, 3, 3, 12, 13, 20]},
    "key_start": {"shape": (3, 4, 13, 3, 4), "top_k": 3, "key_start": [0, 7, 13]},
    "key_start_step": {"shape": (3, 1, 13, 3, 4), "top_k": 3, "key_start": [0, 12, 15]},
    "long": {"shape": (2, 60, 60, 2, 4), "top_k": 16},
    "long_more_keys": {"shape": (1, 35, 60, 2, 4), "top_k": 16},
    "long_packed": {"shape": (1, 60, 60, 2, 4), "top_k": 5, "cu_seqlens": [0, 3, 37, 37, 60]},
    "long_key_start": {"shape": (2, 40, 60, 2, 4), "top_k": 5, "key_start": [10, 55]},
}


def make(call: str, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], dict[str, Any]]:
    options = dict(CALLS[call])
    B, Tq, Tk, H, K = options.pop("shape")
    torch.manual_seed(0)
    if "key_start" in options:
        options["key_start"] = torch.tensor(options["key_start"])
    return [torch.randn(*shape).to(dtype) for shape in ((B, Tq, H, K), (B, Tk, K), (B, Tq, H))], options


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short sequences have several."""
    monkeypatch.setattr("seqarch.ops.chunked.queries.QUERIES", 16)


def by_loop(
    q: Tensor, k: Tensor, weight: Tensor, top_k: int, cu_seqlens: list[int] | None = None, key_start: Any = None
) -> Tensor:
    """Token by token and head by head."""
    offsets = cu_seqlens or [0, k.shape[1]]
    rows = []
    for row in range(len(q)):
        for start, end in pairwise(offsets):
            first = start if key_start is None else int(key_start[row])
            queries = range(start, end) if cu_seqlens else range(q.shape[1])
            for i in queries:
                at = i if cu_seqlens else i + k.shape[1] - q.shape[1]
                scores = [
                    sum(float(weight[row, i, h] * (q[row, i, h] @ k[row, s]).relu()) for h in range(q.shape[2]))
                    for s in range(first, at + 1)
                ]
                best = sorted(range(len(scores)), key=lambda s: -scores[s])[:top_k]
                rows.append(best + [-1] * (min(top_k, k.shape[1]) - len(best)))
    return torch.tensor(rows).view(*q.shape[:2], -1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_the_choice_is_that_of_a_loop(call, backend):
    inputs, options = make(call)
    assert torch.equal(ops.index_topk(*inputs, **options, backend=backend), by_loop(*inputs, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_scores_the_earlier_tokens_are_chosen(backend):
    (q, k, weight), _ = make("long")
    index = ops.index_topk(q, k, 0 * weight, 16, backend=backend)
    assert torch.equal(index[:, 20:], torch.arange(16).expand(2, 40, 16))
    assert index[0, 2].tolist() == [0, 1, 2] + [-1] * 13
    assert largest(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 4).tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_chooses_as_the_whole_sequence_did(backend):
    (q, k, weight), options = make("square")
    whole = ops.index_topk(q, k, weight, **options, backend=backend)
    for t in range(3, 13):
        one = slice(t, t + 1)
        index = ops.index_topk(q[:, one], k[:, : t + 1], weight[:, one], **options, backend=backend)
        assert torch.equal(index, whole[:, one])


@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_and_strided_inputs_are_scored_in_float32(backend):
    inputs, options = make("long", torch.bfloat16)
    expected = ops.index_topk(*(x.float() for x in inputs), **options, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.index_topk(*inputs, **options, backend=backend), expected)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in inputs]
    found = ops.index_topk(*strided, **options, backend=backend)
    assert torch.equal(found, expected)
    assert not found.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_beyond_all_tokens_mean_all_of_them(backend):
    inputs, _ = make("key_start")
    for top_k in (10**9, 2**62, sys.maxsize):
        expected = ops.index_topk(*inputs, 13, backend=backend)
        assert torch.equal(ops.index_topk(*inputs, top_k, backend=backend), expected)
    expected = ops.index_topk(*inputs, 3, key_start=torch.tensor([0, 13, 4]), backend=backend)
    start = torch.tensor([-(2**63), 2**63 - 1, 4])
    assert torch.equal(ops.index_topk(*inputs, 3, key_start=start, backend=backend), expected)


def test_the_lists_are_blocks_of_one_token():
    (q, k, weight), options = make("square")
    index = ops.index_topk(q, k, weight, **options)
    heads = [torch.randn(2, 13, 2, 5, dtype=torch.float64) for _ in range(3)]
    every = ops.index_topk(q, k, weight, 13).unsqueeze(2).expand(-1, -1, 2, -1)
    torch.testing.assert_close(ops.block_sparse_attention(*heads, every, 1), ops.attention(*heads))
    chosen = ops.block_sparse_attention(*heads, index.unsqueeze(2).expand(-1, -1, 2, -1), 1)
    assert (chosen - ops.attention(*heads))[:, 6:].abs().max() > 0.01


@pytest.mark.parametrize("call", ["square", "more_keys", "more_queries", "long"])
def test_flops_equal_what_the_reference_does(call):
    inputs, options = make(call)
    with FlopCounterMode(display=False) as counter:
        ops.index_topk(*inputs, **options, backend="recurrent_torch")
    batch, queries, heads, width = inputs[0].shape
    assert counter.get_total_flops() == flops(queries, inputs[1].shape[1], heads, width, batch)


def test_no_tensor_holds_all_pairs():
    q, k, weight = torch.randn(1, 2048, 2, 4), torch.randn(1, 2048, 4), torch.randn(1, 2048, 2)
    with LargestTensor() as seen:
        chunk_torch.choose(ops.OPS["index_topk"].inputs(q, k, weight, 16))
    assert 0 < seen.elements <= 2048 * 16 * 2  # a chunk of queries, all keys, two heads


def test_compiled_whole():
    inputs, options = make("long_key_start")
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: ops.index_topk(*x, **options), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), ops.index_topk(*inputs, **options))


def test_the_custom_operator_is_sound():
    inputs, options = make("key_start")
    given = ops.OPS["index_topk"].inputs(*inputs, **options)
    torch.library.opcheck(torch.ops.seqarch.index_topk.default, given.values())


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"top_k": 0}, ValueError, "top_k counts tokens, expected a whole number of at least 1, got 0"),
    ({"top_k": 2.0}, TypeError, r"top_k is float 2\.0, expected int"),
    ({"k": torch.zeros(2, 6, 1, 4)}, ValueError, r"k has shape \[2, 6, 1, 4\], expected \[B, Tk, K\]"),
    ({"weight": torch.zeros(2, 6, 4)}, ValueError, "weight has shape .* with H = 3 as in q"),
    ({"weight": torch.zeros(2, 6, 3).long()}, TypeError, "weight has dtype torch.int64"),
    ({"cu_seqlens": [0, 3]}, ValueError, "batch of 1, got a batch of 2"),
    ({"k": torch.zeros(2, 7, 4), "cu_seqlens": [0, 6]}, ValueError, "packs queries and keys alike, got 6 and 7"),
    ({"key_start": torch.tensor([0.0, 1.0])}, TypeError, "key_start has dtype torch.float32"),
    ({"key_start": torch.tensor([0, 1]), "cu_seqlens": [0, 6]}, ValueError, "give one of them"),
    ({"backend": "chunk_trch"}, ValueError, "Did you mean 'chunk_torch'"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_bad_input_is_named(change, error, message):
    given = {"q": torch.zeros(2, 6, 3, 4), "k": torch.zeros(2, 6, 4), "weight": torch.zeros(2, 6, 3), "top_k": 2}
    with pytest.raises(error, match=message):
        ops.index_topk(**{**given, **change})
