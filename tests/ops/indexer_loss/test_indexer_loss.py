"""The lightning indexer's loss and its gradients against a loop, written apart from it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from seqarch import ops
from seqarch.ops.indexer_loss import chunk_torch, flops
from tests.support.backends import available
from tests.support.largest import LargestTensor

BACKENDS = available("indexer_loss")
NAMES = ("index_q", "index_k", "weight", "q", "k", "token_index")

CALLS: dict[str, dict[str, Any]] = {
    "square": {"shape": (2, 13, 13, 3, 4, 4, 2, 8), "chosen": 4},
    "all": {"shape": (2, 13, 13, 3, 4, 4, 4, 8)},
    "one_head": {"shape": (2, 13, 13, 1, 4, 1, 1, 8), "chosen": 4},
    "one_token": {"shape": (2, 13, 13, 3, 4, 4, 1, 8), "chosen": 1},
    "step": {"shape": (2, 1, 14, 3, 4, 4, 2, 8), "chosen": 4},
    "more_keys": {"shape": (2, 5, 14, 3, 4, 4, 2, 8), "chosen": 4},
    "more_queries": {"shape": (2, 9, 4, 3, 4, 4, 2, 8), "chosen": 2},
    "scaled": {"shape": (1, 9, 9, 3, 4, 4, 2, 8), "chosen": 4, "scale": 0.7},
    "packed": {"shape": (1, 20, 20, 3, 4, 4, 2, 8), "chosen": 4, "cu_seqlens": [0, 3, 3, 12, 13, 20]},
    "packed_all": {"shape": (1, 20, 20, 3, 4, 4, 2, 8), "cu_seqlens": [0, 3, 3, 12, 13, 20]},
    "key_start": {"shape": (3, 4, 13, 3, 4, 4, 2, 8), "chosen": 4, "key_start": [0, 7, 13]},
    "key_start_all": {"shape": (3, 4, 13, 3, 4, 4, 2, 8), "key_start": [0, 7, 11]},
    "long": {"shape": (2, 40, 40, 2, 4, 2, 1, 4), "chosen": 7},
    "long_more_keys": {"shape": (1, 35, 50, 2, 4, 2, 1, 4), "chosen": 7},
    "long_key_start": {"shape": (2, 30, 40, 2, 4, 2, 1, 4), "chosen": 7, "key_start": [8, 35]},
}


def make(call: str, dtype: torch.dtype = torch.float64) -> tuple[list[Any], dict[str, Any]]:
    """The arguments in order, with lists that hold tokens twice, later than the query and none at all; the options."""
    options = dict(CALLS[call])
    B, Tq, Tk, Hi, Ki, H, G, K = options.pop("shape")
    torch.manual_seed(0)
    shapes = (B, Tq, Hi, Ki), (B, Tk, Ki), (B, Tq, Hi), (B, Tq, H, K), (B, Tk, G, K)
    inputs: list[Any] = [torch.randn(*shape).to(dtype) for shape in shapes]
    chosen = options.pop("chosen", None)
    inputs.append(None if chosen is None else torch.randint(-1, Tk, (B, Tq, chosen)))
    if "key_start" in options:
        options["key_start"] = torch.tensor(options["key_start"])
    return inputs, options


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short sequences have several."""
    monkeypatch.setattr("seqarch.ops.chunked.queries.QUERIES", 16)


def by_loop(
    index_q: Tensor,
    index_k: Tensor,
    weight: Tensor,
    q: Tensor,
    k: Tensor,
    chosen: Tensor | None,
    scale: float | None = None,
    cu_seqlens: list[int] | None = None,
    key_start: Any = None,
) -> Tensor:
    """Query by query and head by head."""
    scale, heads = q.shape[-1] ** -0.5 if scale is None else scale, q.shape[2]
    offsets, losses = cu_seqlens or [0, q.shape[1]], []
    for row in range(len(q)):
        for start, end in pairwise(offsets):
            first = start if key_start is None else int(key_start[row])
            loss = torch.zeros((), dtype=q.dtype)
            for i in range(start, end):
                seen = range(first, (i if cu_seqlens else i + k.shape[1] - q.shape[1]) + 1)
                if chosen is not None:
                    seen = sorted({s + first for s in chosen[row, i].tolist() if s >= 0} & set(seen))
                if len(seen):
                    p = torch.zeros(len(seen), dtype=q.dtype)
                    for h in range(heads):
                        keys = k[row, list(seen), h * k.shape[2] // heads]
                        p = p + (scale * keys @ q[row, i, h]).softmax(0).detach() / heads
                    products = index_k[row, list(seen)] @ index_q[row, i].T
                    guess = (products.relu() @ weight[row, i]).log_softmax(0)
                    loss = loss + (p * (p.log() - guess)).sum()
            losses.append(loss)
    return torch.stack(losses)


def with_gradients(function: Callable[..., Tensor], inputs: list[Any]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:5]]
    losses = function(*leaves, inputs[5])
    cotangent = torch.linspace(1, 2, len(losses), dtype=losses.dtype)
    gradients = torch.autograd.grad((losses * cotangent).sum(), leaves, allow_unused=True)
    assert all(x is None or not x.any() for x in gradients[3:]), "it teaches the attention"
    return [losses.detach(), *gradients[:3]]


def call_op(backend: str, options: dict[str, Any]) -> Callable[..., Tensor]:
    return lambda *inputs: ops.indexer_loss(*inputs, **options, backend=backend)


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for name, one, other in zip(("loss", "dq", "dk", "dweight"), found, expected, strict=False):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_loss_and_gradients_are_those_of_a_loop(call, backend):
    inputs, options = make(call)
    expected = with_gradients(lambda *x: by_loop(*x, **options), inputs)
    found = with_gradients(call_op(backend, options), inputs)
    assert len(found) == len(expected)
    same(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(call_op(backend, options)(*inputs), expected[0])


@pytest.mark.parametrize("call", ["square", "all", "packed", "key_start", "more_queries"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_finite_differences(backend, call, monkeypatch):
    monkeypatch.setattr("seqarch.ops.chunked.queries.QUERIES", 4)
    inputs, options = make(call)
    leaves = [x.requires_grad_() for x in inputs[:3]]
    function = lambda *indexer: call_op(backend, options)(*indexer, *inputs[3:])  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_indexer_that_knows_the_attention_has_no_loss(backend):
    k = torch.rand(2, 13, 1, 4, dtype=torch.float64)  # all products are positive: one head of the indexer has them all
    q = torch.rand(2, 13, 1, 4, dtype=torch.float64)
    weight = torch.full((2, 13, 1), 0.5, dtype=torch.float64)
    found = with_gradients(call_op(backend, {"scale": 0.5}), [q, k[:, :, 0], weight, q, k, None])
    for each in found:
        torch.testing.assert_close(each, torch.zeros_like(each), rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 0, 0), (2, 3, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_compare_keeps_gradients_defined(shape, backend):
    B, Tq, Tk = shape
    shapes = (B, Tq, 3, 4), (B, Tk, 4), (B, Tq, 3), (B, Tq, 4, 8), (B, Tk, 2, 8)
    losses, *gradients = with_gradients(call_op(backend, {}), [*(torch.randn(*each) for each in shapes), None])
    assert losses.shape == (B,)
    assert all((x == 0).all() for x in (losses, *gradients))


@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_and_strided_inputs_are_compared_in_float32(backend):
    inputs, options = make("square", torch.bfloat16)
    expected = with_gradients(call_op(backend, options), [*(x.float() for x in inputs[:5]), inputs[5]])
    losses, *gradients = with_gradients(call_op(backend, options), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(call_op(backend, options)(*inputs), losses, rtol=0, atol=0)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected[0])
    torch.testing.assert_close(gradients, [x.bfloat16() for x in expected[1:]])
    inputs, options = make("square")
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    same([call_op(backend, options)(*strided)], [call_op(backend, options)(*inputs)])


def test_numbers_beyond_all_tokens_mean_all_of_them():
    inputs, _ = make("key_start")
    for backend in BACKENDS:
        expected = call_op(backend, {"key_start": torch.tensor([0, 13, 4])})(*inputs)
        start = torch.tensor([-sys.maxsize, sys.maxsize, 4])
        same([call_op(backend, {"key_start": start})(*inputs)], [expected])


@pytest.mark.parametrize("call", ["square", "all", "more_keys", "long_key_start"])
def test_flops_equal_what_the_reference_does(call):
    inputs, options = make(call)
    pairs, (index_q, _, _, q, k, chosen) = 0, inputs
    for row in range(len(q)):
        first = int(options["key_start"][row]) if "key_start" in options else 0
        for i in range(q.shape[1]):
            seen = set(range(i + k.shape[1] - q.shape[1] - first + 1))
            pairs += len(seen if chosen is None else seen & set(chosen[row, i].tolist()))
    with FlopCounterMode(display=False) as counter:
        ops.indexer_loss(*inputs, **options, backend="recurrent_torch")
    assert counter.get_total_flops() == flops(pairs, *index_q.shape[2:], *q.shape[2:])


def test_no_tensor_holds_all_pairs():
    inputs = [torch.randn(1, 2048, *shape) for shape in ((2, 4), (4,), (2,), (1, 4), (1, 4))]
    index = ops.index_topk(*inputs[:3], 16)
    with LargestTensor() as largest:
        chunk_torch.forward(ops.OPS["indexer_loss"].inputs(*inputs, index))
    assert 0 < largest.elements <= 2048 * 16 * 2  # a chunk of queries, all keys, two heads


def test_compiled_whole():
    inputs, options = make("long_key_start")
    torch.compiler.reset()
    compiled = torch.compile(call_op("auto", options), fullgraph=True, backend="aot_eager")
    same(with_gradients(compiled, inputs), with_gradients(call_op("auto", options), inputs))


def test_the_custom_operator_is_sound():
    for call in ("key_start", "all"):
        inputs, options = make(call)
        leaves = [x.requires_grad_() for x in inputs[:3]]
        given = ops.OPS["indexer_loss"].inputs(*leaves, *inputs[3:], **options)
        torch.library.opcheck(torch.ops.seqarch.indexer_loss.default, given.values())


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"index_k": torch.zeros(2, 6, 1, 4)}, ValueError, r"index_k has shape \[2, 6, 1, 4\], expected \[B, Tk, Ki\]"),
    ({"k": torch.zeros(2, 7, 2, 8)}, ValueError, "k has shape .* with Tk = 6 as in index_k"),
    ({"k": torch.zeros(2, 6, 3, 8)}, ValueError, r"the heads of q \(4\) must be a multiple of the heads of k \(3\)"),
    ({"q": torch.zeros(2, 6, 0, 8)}, ValueError, "q has no heads, expected at least 1"),
    ({"q": torch.zeros(2, 6, 4, 0), "k": torch.zeros(2, 6, 2, 0)}, ValueError, "q and k are 0 wide"),
    ({"token_index": torch.zeros(2, 6, 3)}, TypeError, "token_index is torch.float32 on cpu, expected torch.int64"),
    ({"token_index": torch.full((2, 6, 3), 6)}, ValueError, "token_index has entries from 6 to 6, expected -1 to 5"),
    ({"token_index": torch.zeros(2, 5, 3).long()}, ValueError, "token_index has shape"),
    ({"weight": torch.zeros(2, 6, 3).long()}, TypeError, "weight has dtype torch.int64"),
    ({"scale": float("inf")}, ValueError, "scale is float inf, expected a finite number"),
    ({"cu_seqlens": [0, 3]}, ValueError, "batch of 1, got a batch of 2"),
    ({"key_start": torch.tensor([0.0, 1.0])}, TypeError, "key_start has dtype torch.float32"),
    ({"key_start": torch.tensor([0, 1]), "cu_seqlens": [0, 6]}, ValueError, "give one of them"),
    ({"backend": "chunk_trch"}, ValueError, "Did you mean 'chunk_torch'"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_bad_input_is_named(change, error, message):
    shapes = (2, 6, 3, 4), (2, 6, 4), (2, 6, 3), (2, 6, 4, 8), (2, 6, 2, 8)
    given = {**dict(zip(NAMES, (torch.zeros(*shape) for shape in shapes), strict=False)), "token_index": None}
    with pytest.raises(error, match=message):
        ops.indexer_loss(**{**given, **change})
