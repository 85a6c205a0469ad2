"""The attention operation against a dense softmax in float64, written apart from it."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from seqarch import ops
from seqarch.ops.attention import chunk_cpp, chunk_flash_attn, chunk_sdpa, chunk_triton, flops
from seqarch.ops.native import cpu_library
from tests.support.backends import available

BACKENDS = available("attention")

CALLS = {
    "square": {"shape": (2, 6, 6, 4, 4, 8, 8)},
    "grouped": {"shape": (2, 6, 6, 6, 2, 4, 8)},
    "one_kv_head": {"shape": (2, 6, 6, 4, 1, 8, 3)},
    "one_token": {"shape": (2, 1, 1, 2, 2, 8, 8)},
    "step": {"shape": (2, 1, 9, 4, 2, 8, 8)},
    "step_window": {"shape": (2, 1, 9, 4, 2, 8, 8), "window": 4},
    "more_keys": {"shape": (2, 4, 9, 4, 2, 8, 8)},
    "more_keys_window": {"shape": (2, 4, 9, 4, 2, 8, 8), "window": 3},
    "more_queries": {"shape": (2, 9, 4, 4, 2, 8, 8)},
    "more_queries_window": {"shape": (2, 9, 4, 2, 2, 8, 8), "window": 2},
    "window_of_one": {"shape": (2, 7, 7, 2, 2, 8, 8), "window": 1},
    "window_past_the_end": {"shape": (2, 7, 7, 2, 2, 8, 8), "window": 50},
    "bidirectional": {"shape": (2, 5, 8, 4, 2, 8, 8), "causal": False},
    "scaled": {"shape": (2, 5, 5, 4, 2, 8, 8), "scale": 0.7},
    "packed": {"shape": (1, 20, 20, 4, 2, 8, 8), "cu_seqlens": [0, 3, 3, 10, 11, 20]},
    "packed_bidirectional": {"shape": (1, 12, 12, 2, 2, 8, 8), "cu_seqlens": [0, 5, 12], "causal": False},
    "packed_window": {"shape": (1, 20, 20, 4, 2, 8, 8), "cu_seqlens": [0, 0, 9, 20], "window": 4},
    "key_start": {"shape": (3, 4, 9, 4, 2, 8, 8), "key_start": [0, 7, 9]},
    "key_start_window": {"shape": (3, 4, 9, 4, 2, 8, 8), "key_start": [0, 7, 12], "window": 3},
    "key_start_step": {"shape": (3, 1, 9, 4, 2, 8, 8), "key_start": [0, 8, 9], "window": 5},
    "key_start_bidirectional": {"shape": (3, 4, 6, 2, 2, 8, 8), "key_start": [0, 5, 6], "causal": False},
    "long_more_keys": {"shape": (1, 300, 400, 2, 1, 4, 4), "key_start": [70]},
    "long_more_queries": {"shape": (1, 600, 300, 2, 2, 4, 4)},
    "long_packed": {"shape": (1, 400, 400, 2, 1, 4, 4), "cu_seqlens": [0, 3, 300, 400]},
    "long_window": {"shape": (2, 400, 400, 2, 1, 8, 8), "window": 20},
    "long_window_of_a_block": {"shape": (1, 389, 389, 2, 2, 4, 4), "window": 129},
    "long_window_of_blocks": {"shape": (1, 300, 500, 2, 1, 8, 6), "window": 130},
    "long_window_more_keys": {"shape": (1, 260, 700, 2, 1, 4, 4), "window": 9},
    "long_window_more_queries": {"shape": (1, 500, 300, 2, 1, 8, 6), "window": 20},
    "long_window_packed": {"shape": (1, 500, 500, 2, 1, 8, 8), "window": 20, "cu_seqlens": [0, 3, 3, 300, 410, 500]},
    "long_window_key_start": {"shape": (2, 300, 400, 2, 1, 8, 8), "window": 20, "key_start": [3, 350]},
}


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, **options) -> tuple[list[Tensor], dict]:
    B, Tq, Tk, H, G, K, V = shape
    torch.manual_seed(0)
    inputs = [torch.randn(B, Tq, H, K), torch.randn(B, Tk, G, K), torch.randn(B, Tk, G, V)]
    if "key_start" in options:
        options["key_start"] = torch.tensor(options["key_start"])
    return [x.to(dtype) for x in inputs], options


def pairs_seen(queries: int, keys: int, causal: bool = True, window: int | None = None, **others) -> Tensor:
    """Which keys a query sees, position by position: ``[B or 1, Tq, Tk]``."""
    start = torch.as_tensor(others.get("key_start", [0]))[:, None, None]
    offsets = torch.as_tensor(others.get("cu_seqlens", [0, keys]))
    key, at = torch.arange(keys), torch.arange(queries)[:, None] + keys - queries
    seen = (key >= start).expand(-1, queries, -1)
    if causal:
        seen = seen & (key <= at)
    if window is not None:
        seen = seen & (at - key < window)
    if "cu_seqlens" in others:
        sequence = (key[:, None] >= offsets[1:]).sum(-1)
        seen = seen & (sequence == sequence[:, None])
    return seen


def dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, logit_cap: float | None = None, **options
) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    seen = pairs_seen(q.shape[1], k.shape[1], **options)[:, None]
    scores = torch.einsum("bqhk,bshk->bhqs", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if logit_cap is not None:
        scores = logit_cap * torch.tanh(scores / logit_cap)
    weights = torch.where(seen, scores, -torch.inf).exp().where(seen, 0.0)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.einsum("bhqs,bshv->bqhv", weights, v)


def with_gradients(function, inputs: list[Tensor]) -> list[Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    o = function(*inputs)
    cotangent = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o.dtype)
    return [o.detach(), *torch.autograd.grad((o * cotangent).sum(), inputs)]


def same(a: Tensor, b: Tensor, what: str = "") -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=lambda message: f"{what}: {message}")


def serves(backend: str, inputs: list[Tensor], options: dict) -> bool:
    op = ops.OPS["attention"]
    return op.backends[backend].unsupported(op.inputs(*inputs, **options)) is None


@pytest.mark.parametrize("call", CALLS)
def test_every_backend_equals_a_dense_softmax(call):
    inputs, options = make(**CALLS[call])
    expected = with_gradients(lambda q, k, v: dense(q, k, v, **options), inputs)
    served = [backend for backend in BACKENDS if serves(backend, inputs, options)]
    assert ("chunk_sdpa" in served) == ("window" in options)
    assert {*BACKENDS} - {"chunk_sdpa"} <= set(served)
    for backend in served:
        run = partial(ops.attention, backend=backend, **options)
        for name, a, b in zip(("o", "dq", "dk", "dv"), with_gradients(run, inputs), expected, strict=True):
            same(a, b, f"{backend} {name}")


@pytest.mark.parametrize("call", CALLS)
def test_scores_are_capped_by_the_backends_that_know_it(call):
    inputs, options = make(**CALLS[call], logit_cap=0.7)
    expected = with_gradients(lambda q, k, v: dense(q, k, v, **options), inputs)
    served = [backend for backend in BACKENDS if serves(backend, inputs, options)]
    assert {*served} - {"chunk_sdpa"} == {"parallel_sdpa", "recurrent_torch"}
    for backend in ("auto", *served):
        run = partial(ops.attention, backend=backend, **options)
        for name, a, b in zip(("o", "dq", "dk", "dv"), with_gradients(run, inputs), expected, strict=True):
            same(a, b, f"{backend} {name}")
    free = ops.attention(*inputs, **{**options, "logit_cap": None})
    single = inputs[0].shape[1] == inputs[1].shape[1] == 1 or options.get("window") == 1
    assert single or not torch.allclose(free, expected[0], atol=1e-4)
    for kernels in (chunk_cpp, chunk_triton, chunk_flash_attn):
        assert "logit_cap is given" in str(kernels.unsupported(ops.OPS["attention"].inputs(*inputs, **options)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_sees_nothing_gives_zero_and_no_nan(backend, dtype):
    long = {"shape": (2, 500, 300, 2, 1, 8, 8), "window": 20, "key_start": [40, 300]}
    inputs, options = make(dtype=dtype, **long)
    o, *gradients = with_gradients(lambda q, k, v: ops.attention(q, k, v, backend=backend, **options), inputs)
    nothing = ~pairs_seen(500, 300, **options).any(-1)
    assert nothing[0].sum() == 240
    assert nothing[1].all()
    assert (o[nothing] == 0).all()
    assert (gradients[0][nothing] == 0).all()
    assert (o[~nothing] != 0).any()
    assert all(x.isfinite().all() for x in (o, *gradients))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_stays_within_its_own_rounding(backend):
    inputs, options = make((1, 300, 300, 4, 2, 32, 32), torch.bfloat16, window=40)
    exact = with_gradients(lambda q, k, v: dense(q, k, v, **options), [x.double() for x in inputs])
    found = with_gradients(lambda q, k, v: ops.attention(q, k, v, backend=backend, **options), inputs)
    assert found[0].dtype == torch.bfloat16
    for a, b in zip(found, exact, strict=True):
        assert ((a.double() - b).square().mean() / b.square().mean()).sqrt() < 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, monkeypatch):
    monkeypatch.setattr(chunk_sdpa, "BLOCKS", (2,))
    inputs, options = make((1, 5, 7, 2, 1, 2, 3), window=3)
    for x in inputs:
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: ops.attention(*x, backend=backend, **options), inputs)


@pytest.mark.parametrize("block", [1, 2, 3, 5, 8])
def test_blocks_of_any_size_give_the_same(block, monkeypatch):
    for call in CALLS.values():
        inputs, options = make(**call)
        if "window" in options and inputs[0].shape[1] < 50:
            monkeypatch.undo()
            expected = with_gradients(partial(ops.attention, backend="parallel_sdpa", **options), inputs)
            monkeypatch.setattr(chunk_sdpa, "BLOCKS", (block,))
            found = with_gradients(partial(ops.attention, backend="chunk_sdpa", **options), inputs)
            for a, b in zip(found, expected, strict=True):
                same(a, b)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "chunk_sdpa"])
def test_packed_equals_separate_and_nothing_leaks(backend):
    (q, k, v), _ = make((1, 11, 11, 4, 2, 8, 8))
    o = ops.attention(q, k, v, cu_seqlens=torch.tensor([0, 4, 11], dtype=torch.int32), backend=backend)
    alone = [ops.attention(*(x[:, part] for x in (q, k, v)), backend=backend) for part in (slice(0, 4), slice(4, 11))]
    torch.testing.assert_close(o, torch.cat(alone, dim=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs_and_a_future_that_does_not_matter(backend):
    (q, k, v), _ = make((2, 300, 300, 4, 2, 8, 8))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    o = ops.attention(q, k, v, window=30, backend=backend)
    torch.testing.assert_close(ops.attention(*strided, window=30, backend=backend), o, rtol=0, atol=1e-12)
    k[:, 200:], v[:, 200:] = 5, 5
    changed = ops.attention(q, k, v, window=30, backend=backend)
    torch.testing.assert_close(changed[:, :200], o[:, :200], rtol=0, atol=1e-12)
    assert (changed[:, 200:] - o[:, 200:]).abs().amax(dim=(0, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 0, 0), (2, 3, 0)])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "chunk_sdpa"])
def test_nothing_to_attend_to(shape, backend):
    (q, k, v), _ = make((*shape, 4, 2, 8, 6))
    o = ops.attention(q, k, v, backend=backend)
    assert o.shape == (*shape[:2], 4, 6)
    assert (o == 0).all()


@pytest.mark.parametrize(
    ("queries", "keys", "causal", "window"),
    [(6, 6, True, None), (6, 6, True, 2), (1, 9, True, 4), (3, 9, True, 7), (9, 4, True, None), (4, 9, False, None)],
)
def test_flops_equal_what_the_reference_does(queries, keys, causal, window):
    inputs, _ = make((2, queries, keys, 4, 2, 8, 6))
    with FlopCounterMode(display=False) as counter:
        ops.attention(*inputs, causal=causal, window=window, backend="recurrent_torch")
    assert counter.get_total_flops() == flops(queries, keys, 4, 8, 6, causal, window, batch_size=2)
    pairs = int(pairs_seen(queries, keys, causal, window).sum())
    assert counter.get_total_flops() == 2 * pairs * 2 * 4 * (8 + 6)


def test_auto_takes_the_compiled_kernel_else_blocks_for_a_window_only(monkeypatch):
    (q, k, v), _ = make((1, 600, 600, 2, 2, 8, 8))
    compiled = [name for name in BACKENDS if name.endswith("_cpp")]
    assert ops.explain("attention", q, k, v, window=100).backend == (compiled or ["chunk_sdpa"])[0]
    assert ops.explain("attention", q, k, v).backend == (compiled or ["parallel_sdpa"])[0]
    monkeypatch.setattr(cpu_library, "_reason", "it was never built")
    assert ops.explain("attention", q, k, v, window=100).backend == "chunk_sdpa"
    full = ops.explain("attention", q, k, v)
    assert full.backend == "parallel_sdpa"
    assert "no window" in full.reasons["chunk_sdpa"]
    with pytest.raises(ops.BackendError, match=r"chunk_sdpa.*no window"):
        ops.attention(q, k, v, backend="chunk_sdpa")


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name.startswith("chunk")])
def test_blocks_hold_nothing_as_long_as_all_pairs(backend):
    (q, k, v), _ = make((1, 2048, 2048, 1, 1, 4, 4), torch.float32)
    sizes: list[int] = []
    pack = torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x)
    with pack:
        ops.attention(q.requires_grad_(), k, v, window=64, backend=backend)
    assert 0 < max(sizes) <= 2048 * 2 * 64


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window": 0}, ValueError, "window counts the token itself.*got 0"),
        ({"window": 3, "causal": False}, ValueError, "window=3 looks to the past only"),
        ({"cu_seqlens": [0, 3]}, ValueError, "batch of 1, got a batch of 2"),
        ({"key_start": torch.tensor([0.0, 1.0])}, TypeError, "key_start has dtype torch.float32"),
        ({"key_start": torch.tensor([0, 1, 2])}, ValueError, "key_start has shape"),
        ({"key_start": torch.tensor([0, 1]), "cu_seqlens": [0, 6]}, ValueError, "give one of them"),
        ({"logit_cap": 0.0}, ValueError, "logit_cap is 0.0, expected a positive number or None"),
        ({"logit_cap": float("inf")}, ValueError, "logit_cap is inf, expected a positive number"),
        ({"backend": "chunk_spda"}, ValueError, "Did you mean 'chunk_sdpa'"),
        ({"v": torch.zeros(2, 5, 2, 8)}, ValueError, "v has shape"),
        ({"k": torch.zeros(2, 6, 3, 8), "v": torch.zeros(2, 6, 3, 8)}, ValueError, "must be a multiple"),
        ({"q": torch.zeros(2, 6, 4, 8, dtype=torch.int64)}, TypeError, "q has dtype torch.int64"),
    ],
)
def test_bad_input_is_named(change, error, message):
    (q, k, v), _ = make((2, 6, 6, 4, 2, 8, 8), torch.float32)
    with pytest.raises(error, match=message):
        ops.attention(**{"q": q, "k": k, "v": v, **change})


@pytest.mark.parametrize("offsets", [[0, 5, 3, 6], [0, 4], [1, 6]])
def test_bad_offsets_are_named(offsets):
    (q, k, v), _ = make((1, 6, 6, 2, 2, 8, 8))
    with pytest.raises(ValueError, match="cu_seqlens must"):
        ops.attention(q, k, v, cu_seqlens=offsets)


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation makes anew."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(each, Tensor) and not each._is_view():
                self.elements = max(self.elements, each.numel())
        return made


def test_one_query_with_shared_heads_repeats_no_keys():
    """A token that is decoded reads the keys once, not once per head: latents, whose values are narrower than keys."""
    q, keys = torch.randn(2, 1, 8, 40), torch.randn(2, 100, 1, 40)
    start = torch.tensor([0, 7])
    with Largest() as seen:
        o = ops.attention(q, keys, keys[..., :32], key_start=start, backend="parallel_sdpa")
    assert seen.elements <= keys.numel()
    expected = ops.attention(q, keys, keys[..., :32], key_start=start, backend="recurrent_torch")
    torch.testing.assert_close(o, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_beyond_all_keys_is_none(backend):
    inputs, _ = make((2, 9, 33, 4, 2, 8, 8), torch.float32)
    expected = ops.attention(*inputs, window=33, backend=backend)
    for window in (10**9, 2**31, 2**62, sys.maxsize):
        assert torch.equal(ops.attention(*inputs, window=window, backend=backend), expected)


def test_packed_queries_and_keys_have_one_length():
    (q, k, v), _ = make((1, 4, 6, 2, 2, 8, 8))
    with pytest.raises(ValueError, match="got 4 and 6"):
        ops.attention(q, k, v, cu_seqlens=[0, 4])
