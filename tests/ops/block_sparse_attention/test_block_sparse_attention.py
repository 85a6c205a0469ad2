"""The operation against a dense masked softmax in float64, written apart from it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from seqarch import ops
from seqarch.ops.block_sparse_attention import flops, lists
from seqarch.ops.block_sparse_attention.inputs import ListInputs
from seqarch.ops.native.custom_op import Upstream
from tests.support.backends import available

BACKENDS = available("block_sparse_attention")
FAST = [name for name in BACKENDS if name not in ("parallel_torch", "recurrent_torch")]

CALLS: dict[str, dict[str, Any]] = {
    "square": {"shape": (2, 13, 13, 4, 4, 4, 8, 8), "lists": 2, "size": 4},
    "list_a_key_head": {"shape": (2, 13, 13, 6, 2, 2, 4, 8), "lists": 2, "size": 3},
    "list_a_query_head": {"shape": (2, 13, 13, 6, 2, 6, 4, 8), "lists": 2, "size": 3},
    "lists_between": {"shape": (2, 13, 13, 8, 2, 4, 4, 3), "lists": 3, "size": 4},
    "one_token": {"shape": (2, 1, 1, 2, 2, 2, 8, 8), "lists": 2, "size": 4},
    "step": {"shape": (2, 1, 14, 4, 2, 4, 8, 8), "lists": 2, "size": 4},
    "more_keys": {"shape": (2, 5, 14, 4, 2, 2, 8, 8), "lists": 2, "size": 4},
    "more_queries": {"shape": (2, 9, 4, 4, 2, 2, 8, 8), "lists": 2, "size": 2},
    "scaled": {"shape": (1, 9, 9, 2, 2, 2, 8, 8), "lists": 2, "size": 4, "scale": 0.7},
    "tokens": {"shape": (2, 9, 9, 4, 1, 1, 8, 8), "lists": 4, "size": 1},
    "a_block_past_the_end": {"shape": (2, 9, 9, 2, 2, 2, 8, 8), "lists": 2, "size": 50},
    "packed": {"shape": (1, 20, 20, 4, 2, 2, 8, 8), "lists": 2, "size": 4, "cu_seqlens": [0, 3, 3, 12, 13, 20]},
    "key_start": {"shape": (3, 4, 13, 4, 2, 4, 8, 8), "lists": 2, "size": 4, "key_start": [0, 7, 13]},
    "key_start_step": {"shape": (3, 1, 13, 4, 2, 4, 8, 8), "lists": 2, "size": 4, "key_start": [0, 12, 15]},
    "short_key_start": {"shape": (2, 20, 40, 2, 1, 2, 8, 8), "lists": 3, "size": 16, "key_start": [3, 36]},
    "window": {"shape": (2, 23, 23, 4, 2, 2, 8, 8), "lists": 2, "size": 4, "window": 6},
    "window_of_one": {"shape": (2, 9, 9, 2, 2, 2, 8, 8), "lists": 1, "size": 4, "window": 1},
    "window_of_a_block": {"shape": (1, 23, 26, 2, 2, 2, 8, 8), "lists": 1, "size": 4, "window": 5},
    "window_past_the_start": {"shape": (1, 9, 9, 2, 2, 2, 8, 8), "lists": 1, "size": 2, "window": 99},
    "packed_window": {
        "shape": (1, 20, 20, 4, 2, 2, 8, 8),
        "lists": 1,
        "size": 3,
        "window": 5,
        "cu_seqlens": [0, 9, 20],
    },
    "window_key_start": {"shape": (2, 6, 20, 2, 1, 1, 8, 8), "lists": 1, "size": 3, "window": 5, "key_start": [3, 16]},
    "long": {"shape": (2, 300, 300, 4, 2, 2, 8, 6), "lists": 3, "size": 16},
    "long_more_keys": {"shape": (1, 130, 300, 4, 2, 4, 8, 6), "lists": 3, "size": 32},
    "long_packed": {"shape": (1, 300, 300, 2, 1, 2, 8, 8), "lists": 3, "size": 16, "cu_seqlens": [0, 3, 170, 170, 300]},
    "long_key_start": {"shape": (2, 200, 300, 2, 1, 2, 8, 8), "lists": 3, "size": 16, "key_start": [40, 290]},
    "long_window": {"shape": (1, 300, 300, 2, 2, 2, 8, 8), "lists": 1, "size": 16, "window": 40},
}


def make(
    call: str, dtype: torch.dtype = torch.float64, changes: dict[str, Any] | None = None
) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v, the lists (with blocks twice, later than the query and none at all) and the size; the options."""
    options = {**CALLS[call], **(changes or {})}
    B, Tq, Tk, H, G, I, K, V = options.pop("shape")
    S, size = options.pop("lists"), options.pop("size")
    torch.manual_seed(0)
    inputs = [torch.randn(B, Tq, H, K), torch.randn(B, Tk, G, K), torch.randn(B, Tk, G, V)]
    index = torch.randint(-1, -(-Tk // size), (B, Tq, I, S))
    if "key_start" in options:
        options["key_start"] = torch.tensor(options["key_start"])
    return [*(x.to(dtype) for x in inputs), index], {"block_size": size, **options}


def pairs_seen(queries: int, keys: int, index: Tensor, block_size: int, **others: Any) -> Tensor:
    """Which keys each list shows a query: ``[B, Tq, I, Tk]``."""
    key, at = torch.arange(keys), torch.arange(queries)[:, None] + keys - queries
    start = torch.as_tensor(others.get("key_start", [0]))[:, None, None].expand(-1, queries, keys)
    if "cu_seqlens" in others:
        offsets = torch.as_tensor(others["cu_seqlens"])
        start = offsets[(key[:, None] >= offsets[1:]).sum(-1)][None, :, None].expand(-1, -1, keys)
    block = (key - start).div(block_size, rounding_mode="floor")
    seen = (block[:, :, None, :, None] == index[..., None, :]).any(-1)
    if others.get("window"):
        seen = seen | (at - key < others["window"])[:, None]
    return seen & ((key <= at) & (key >= start))[:, :, None]


def dense(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float | None = None, **options: Any) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    seen = pairs_seen(q.shape[1], k.shape[1], index, **options).repeat_interleave(q.shape[2] // index.shape[2], dim=2)
    scores = torch.einsum("bqhk,bshk->bqhs", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = torch.where(seen, scores, -torch.inf).exp().where(seen, 0.0)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.einsum("bqhs,bshv->bqhv", weights, v)


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    o = function(*leaves, *inputs[3:])
    cotangent = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o)
    return [o.detach(), *torch.autograd.grad((o * cotangent).sum(), leaves)]


def call_op(backend: str, options: dict[str, Any]) -> Callable[..., Tensor]:
    return lambda *inputs: ops.block_sparse_attention(*inputs, **options, backend=backend)


def same(a: Tensor, b: Tensor, what: str = "") -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=lambda message: f"{what}: {message}")


def serving(inputs: list[Tensor], options: dict[str, Any]) -> list[str]:
    op = ops.OPS["block_sparse_attention"]
    given = op.inputs(*inputs, **options)
    return [name for name in BACKENDS if op.backends[name].unsupported(given) is None]


@pytest.mark.parametrize("call", CALLS)
def test_every_backend_equals_a_dense_softmax(call):
    inputs, options = make(call)
    expected = with_gradients(lambda *x: dense(*x, **options), inputs)
    for backend in serving(inputs, options):
        found = with_gradients(call_op(backend, options), inputs)
        for name, one, other in zip(("o", "dq", "dk", "dv"), found, expected, strict=True):
            same(one, other, f"{backend}: {name}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_finite_differences(backend):
    torch.manual_seed(0)
    inputs = [torch.randn(1, 40, 2, 2), torch.randn(1, 40, 1, 2), torch.randn(1, 40, 1, 1)]
    leaves = [x.double().requires_grad_() for x in inputs]
    index = torch.randint(-1, 3, (1, 40, 1, 2))
    function = lambda q, k, v: ops.block_sparse_attention(q, k, v, index, 16, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_all_blocks_are_causal_attention():
    (q, k, v, _), _ = make("long")
    every = torch.arange(19).expand(2, 300, 1, 19)
    index = every.expand(-1, -1, 2, -1)
    same(ops.block_sparse_attention(q, k, v, index, 16), ops.attention(q, k, v))
    nothing = torch.full((2, 300, 2, 1), -1)
    windowed = ops.block_sparse_attention(q, k, v, nothing, 16, window=20)
    same(windowed, ops.attention(q, k, v, window=20))
    assert (ops.block_sparse_attention(q, k, v, nothing, 16) == 0).all()


@pytest.mark.parametrize("shape", [(0, 4, 4, 2), (2, 0, 4, 2), (2, 0, 0, 2), (2, 3, 0, 2), (2, 3, 3, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_attend_to_keeps_gradients_defined(shape, backend):
    B, Tq, Tk, S = shape
    inputs = [torch.randn(B, Tq, 4, 8), torch.randn(B, Tk, 2, 8), torch.randn(B, Tk, 2, 6)]
    inputs.append(torch.full((B, Tq, 2, S), -1 if Tk == 0 else 0))
    o, *gradients = with_gradients(call_op(backend, {"block_size": 16}), inputs)
    assert o.shape == (B, Tq, 4, 6)
    assert all((x == 0).all() for x in (o, *gradients))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_and_strided_inputs(backend):
    (q, k, v, index), options = make("long")
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    buffer = torch.randn(2, 400, 2, 14, dtype=torch.float64)
    buffer[:, :300] = torch.cat([k, v], dim=-1)
    slices = buffer[:, :300].split([8, 6], dim=-1)
    expected = with_gradients(call_op("recurrent_torch", options), [q, k, v, index])
    for inputs in (strided, [q, *slices]):
        for one, other in zip(with_gradients(call_op(backend, options), [*inputs, index]), expected, strict=True):
            same(one, other)
        same(call_op(backend, options)(*inputs, index), expected[0])
    low = [x.bfloat16() for x in (q, k, v)]
    o = call_op(backend, options)(*low, index)
    assert o.dtype == torch.bfloat16
    same(o, call_op(backend, options)(*(x.float() for x in low), index).bfloat16())


@pytest.mark.parametrize("call", ["list_a_query_head", "more_keys", "more_queries", "packed", "key_start", "window"])
def test_flops_equal_what_the_reference_does(call):
    inputs, options = make(call)
    with FlopCounterMode(display=False) as counter:
        ops.block_sparse_attention(*inputs, **options, backend="recurrent_torch")
    (q, k, v, index), shown = inputs, {name: value for name, value in options.items() if name != "scale"}
    pairs = int(pairs_seen(q.shape[1], k.shape[1], index, **shown).sum()) * q.shape[2] // index.shape[2]
    assert counter.get_total_flops() == flops(pairs, q.shape[3], v.shape[3])


class LargestTensor(TorchDispatchMode):
    """Records the numbers in the largest tensor made within the block, inside the custom operators too."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inside = INSIDE.get(func)
        if inside is not None:
            with self:
                return inside(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        made = [x for x in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.untyped_storage().nbytes() // x.element_size() for x in made)])
        return result


def _inside(module: Any) -> dict[Any, Callable[..., Any]]:
    """What the two custom operators of a backend compute, by their overloads."""
    return {
        module.operators.outputs.operator._opoverload: lambda *values: module.forward(ListInputs(*values)),
        module.operators.outputs.gradient._opoverload: lambda *values: module.backward(
            ListInputs(*values[:-4]), Upstream(values[-4:-2], values[-2:-1], values[-1])
        ),
    }


INSIDE: dict[Any, Callable[..., Any]] = {}
for _name in FAST:
    INSIDE |= _inside(ops.OPS["block_sparse_attention"].backends[_name].module)


@pytest.mark.parametrize("backend", FAST)
def test_nothing_is_as_large_as_all_pairs(backend):
    torch.manual_seed(0)
    made = []
    for length in (2048, 4096):
        q, k, v = (torch.randn(1, length, 1, 8).requires_grad_() for _ in range(3))
        index = torch.randint(0, length // 32, (1, length, 1, 2))
        with LargestTensor() as largest:
            ops.block_sparse_attention(q, k, v, index, 32, backend=backend).sum().backward()
        made.append(largest.elements)
    assert 4096 * 8 <= made[1] < 4096 * 4096 / 16
    assert made[1] <= 2 * made[0]


@pytest.mark.parametrize("backend", FAST)
def test_autocast_leaves_sums_alone(backend):
    inputs, options = make("long", torch.float32)
    expected = with_gradients(call_op(backend, options), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(call_op(backend, options), inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_compiled_whole(backend):
    inputs, options = make("long_window")
    torch.compiler.reset()
    compiled = torch.compile(call_op(backend, options), fullgraph=True, backend="aot_eager")
    expected = with_gradients(call_op(backend, options), inputs)
    for one, other in zip(with_gradients(compiled, inputs), expected, strict=True):
        same(one, other)


@pytest.mark.parametrize("backend", FAST)
def test_the_custom_operators_are_sound(backend):
    module = ops.OPS["block_sparse_attention"].backends[backend].module
    (q, k, v, index), options = make("long_more_keys")
    entries = lists.plain_lists(index, torch.arange(170, 300)[None], options["block_size"], 0)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    first = torch.zeros(1, 130, dtype=torch.int64)
    torch.library.opcheck(module.operators.outputs.operator, (*leaves, entries, first, options["block_size"], 0, 0.3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_beyond_all_keys_mean_all_of_them(backend):
    def found(**changed: Any) -> list[Tensor]:
        inputs, options = make("short_key_start")
        inputs[3] = inputs[3].clamp(max=0) if "block_size" in changed else inputs[3]
        return with_gradients(call_op(backend, options | changed), inputs)

    keys = 40
    for option in ("window", "block_size"):
        expected = found(**{option: keys})
        for beyond in (10**9, 2**31, 2**62, sys.maxsize):
            for one, other in zip(found(**{option: beyond}), expected, strict=True):
                same(one, other)
    expected = found(window=9, key_start=torch.tensor([0, keys]))
    for starts in ([-1, keys + 1], [-(2**63), 2**63 - 1], [-(2**62), 2**62]):
        for one, other in zip(found(window=9, key_start=torch.tensor(starts)), expected, strict=True):
            same(one, other)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"block_size": 0}, ValueError, "block_size counts tokens.*got 0"),
    ({"block_size": 2.0}, TypeError, r"block_size is float 2\.0, expected int"),
    ({"window": 0}, ValueError, "window counts tokens.*got 0"),
    ({"block_index": torch.zeros(2, 6, 2, 3)}, TypeError, "block_index is torch.float32 on cpu, expected torch.int64"),
    ({"block_index": torch.full((2, 6, 2, 3), -2)}, ValueError, "entries from -2 to -2, expected -1 to 2"),
    ({"block_index": torch.full((2, 6, 2, 3), 3)}, ValueError, "block_index has entries from 3 to 3, expected"),
    ({"block_index": torch.zeros(2, 5, 2, 3).long()}, ValueError, "block_index has shape"),
    ({"block_index": torch.zeros(2, 6, 3, 3).long()}, ValueError, r"block_index \(3\) must be a multiple of the heads"),
    ({"block_index": torch.zeros(2, 6, 8, 3).long()}, ValueError, r"q \(4\) must be a multiple of the heads of block"),
    ({"cu_seqlens": [0, 3]}, ValueError, "batch of 1, got a batch of 2"),
    ({"key_start": torch.tensor([0.0, 1.0])}, TypeError, "key_start has dtype torch.float32"),
    ({"key_start": torch.tensor([0, 1]), "cu_seqlens": [0, 6]}, ValueError, "give one of them"),
    ({"backend": "chunk_trch"}, ValueError, "Did you mean 'chunk_torch'"),
    ({"q": torch.zeros(2, 6, 4, 8, dtype=torch.int64)}, TypeError, "q has dtype torch.int64"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_bad_input_is_named(change, error, message):
    q, k, v = torch.zeros(2, 6, 4, 8), torch.zeros(2, 6, 2, 8), torch.zeros(2, 6, 2, 8)
    index = torch.zeros(2, 6, 2, 3, dtype=torch.int64)
    given = {"q": q, "k": k, "v": v, "block_index": index, "block_size": 2}
    with pytest.raises(error, match=message):
        ops.block_sparse_attention(**{**given, **change})
