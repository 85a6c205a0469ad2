"""The logarithms of attention's sums, and sinks, against a softmax written out; their gradients on every backend."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from seqarch import ops
from seqarch.ops.attention import chunk_cpp, chunk_flash_attn, chunk_sdpa, chunk_triton
from seqarch.ops.attention.inputs import AttentionInputs
from seqarch.ops.native import cpu_library
from tests.ops.attention.test_attention import BACKENDS, CALLS, make, pairs_seen, same, serves

NAMES = ("o", "lse", "dq", "dk", "dv", "dsinks")


def dense(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, **options) -> tuple[Tensor, Tensor]:
    """o and lse of all scores and, if given, one more of each head."""
    scale, cap = options.pop("scale", q.shape[-1] ** -0.5), options.pop("logit_cap", None)
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    seen = pairs_seen(q.shape[1], k.shape[1], **options)[:, None]
    scores = torch.einsum("bqhk,bshk->bhqs", q, k) * scale
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    weights = torch.where(seen, scores, -torch.inf).exp().where(seen, 0.0)
    total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks[:, None, None].exp())
    o = torch.einsum("bhqs,bshv->bqhv", weights / total.clamp(min=1e-300), v)
    some = total > 0
    lse = torch.where(some, total.where(some, 1.0).log(), -torch.inf)
    return o, lse.squeeze(-1).transpose(1, 2)


def with_gradients(function, inputs: list[Tensor]) -> list[Tensor]:
    """Both results, and the gradients of a sum of both; of lse where it is finite."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    results = function(*inputs)
    generator, total = torch.Generator().manual_seed(1), 0
    for each in results:
        weight = torch.randn(each.shape, generator=generator).to(each.dtype)
        total = total + (each * weight).where(each.detach().isfinite(), 0).sum()
    return [*(each.detach() for each in results), *torch.autograd.grad(total, inputs)]


def with_sinks(inputs: list[Tensor]) -> list[Tensor]:
    return [*inputs, torch.linspace(-2, 2, inputs[0].shape[2], dtype=inputs[0].dtype)]


def call(backend: str, **options):
    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.attention(q, k, v, sinks=sinks, return_lse=True, backend=backend, **options)

    return run


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("long") or name == "long_window"])
def test_every_backend_equals_a_dense_softmax(name):
    inputs, options = make(**CALLS[name])
    served = [backend for backend in BACKENDS if serves(backend, inputs, {**options, "return_lse": True})]
    assert set(served) >= {*BACKENDS} - {"chunk_sdpa"}
    for given in (inputs, with_sinks(inputs)):
        expected = with_gradients(partial(dense, **options), given)
        for backend in served:
            found = with_gradients(call(backend, **options), given)
            assert len(found) == len(expected) == len(given) + 2
            for what, a, b in zip(NAMES, found, expected, strict=False):
                same(a, b, f"{backend} {what}")


@pytest.mark.parametrize("name", ["grouped", "long_more_keys", "packed_window"])
def test_with_a_cap_and_in_pieces(name):
    inputs, options = make(**CALLS[name], logit_cap=0.7)
    expected = with_gradients(partial(dense, **options), with_sinks(inputs))
    for backend in ("auto", "parallel_sdpa", "recurrent_torch"):
        for what, a, b in zip(
            NAMES, with_gradients(call(backend, **options), with_sinks(inputs)), expected, strict=True
        ):
            same(a, b, f"{backend} {what}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_o_is_what_it_is_without_them(backend):
    for name in ("more_keys_window", "long_window"):
        inputs, options = make(**CALLS[name])
        o, _ = ops.attention(*inputs, return_lse=True, backend=backend, **options)
        same(o, ops.attention(*inputs, backend=backend, **options))
    if backend == "chunk_cpp":
        assert torch.equal(o, ops.attention(*inputs, backend=backend, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_sees_nothing_has_no_sum_or_its_sink(backend, dtype):
    inputs, options = make(dtype=dtype, shape=(2, 50, 30, 2, 1, 8, 8), window=20, key_start=[4, 30])
    nothing = ~pairs_seen(50, 30, **options).any(-1)
    assert nothing[1].all()
    o, lse, *gradients = with_gradients(call(backend, **options), inputs)
    assert lse.dtype == torch.float32
    assert (lse[nothing] == -torch.inf).all()
    assert lse[~nothing].isfinite().all()
    given = with_sinks(inputs)
    with_them = with_gradients(call(backend, **options), given)
    assert torch.equal(with_them[1][nothing], given[3].float().expand(int(nothing.sum()), -1))
    assert all(x.isfinite().all() for x in (o, *gradients, *with_them))
    assert (o[nothing] == 0).all()
    assert (gradients[0][nothing] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_the_keys_are_put_together(backend):
    """Eight windows of keys, one after the other, are the whole."""
    (q, k, v), _ = make((2, 3, 64, 4, 2, 8, 6))
    options = {"causal": False} if backend != "chunk_sdpa" else {"window": 64}
    whole = ops.attention(q[:, -1:], k, v, backend=backend, **options)
    parts = [
        ops.attention(q[:, -1:], k[:, a:b], v[:, a:b], return_lse=True, backend=backend, **options)
        for a, b in pairwise(range(0, 65, 8))
    ]
    outputs, sums = (torch.stack(each) for each in zip(*parts, strict=True))
    same((outputs * sums.softmax(0).unsqueeze(-1)).sum(0), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, monkeypatch):
    monkeypatch.setattr(chunk_sdpa, "BLOCKS", (2,))
    inputs, options = make((1, 5, 7, 2, 1, 2, 3), window=3)
    given = [x.requires_grad_() for x in with_sinks(inputs)]
    assert torch.autograd.gradcheck(call(backend, **options), given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_stays_within_its_own_rounding(backend):
    inputs, options = make((1, 300, 300, 4, 2, 32, 32), torch.bfloat16, window=40)
    given = with_sinks(inputs)
    exact = with_gradients(partial(dense, **options), [x.double() for x in given])
    for a, b in zip(with_gradients(call(backend, **options), given), exact, strict=True):
        assert ((a.double() - b).square().mean() / b.square().mean()).sqrt() < 0.01


def test_the_compiled_operator_keeps_torchs_rules_and_is_one_graph():
    options = {"window": 5}
    if cpu_library.unavailable():
        return
    (q, k, v), _ = make((2, 9, 9, 4, 2, 5, 3), torch.float32)
    inputs = ops.OPS["attention"].inputs(q, k, v, return_lse=True, **options)
    leaves = inputs.replace(**{name: x.clone().requires_grad_() for name, x in (("q", q), ("k", k), ("v", v))})
    operator = chunk_cpp.operators.with_sums
    torch.library.opcheck(operator.operator, leaves.values())
    o, log_sum = operator(inputs)
    needed = [name in ("q", "k", "v") for name in AttentionInputs.__match_args__]
    upstream = o, log_sum, torch.randn_like(o), torch.randn_like(log_sum), needed
    torch.library.opcheck(operator.gradient, (*inputs.values(), *upstream))
    function = call("chunk_cpp", **options)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    given = with_sinks([q, k, v])
    for one, other in zip(with_gradients(compiled, given), with_gradients(function, given), strict=True):
        torch.testing.assert_close(one, other)


def test_backends_that_have_no_gradient_of_sums_are_passed_over(monkeypatch):
    (q, k, v), _ = make((1, 20, 20, 4, 2, 8, 8), torch.bfloat16)
    inputs = ops.OPS["attention"].inputs(q, k, v, return_lse=True)
    assert "return_lse is asked for" in str(chunk_flash_attn.unsupported(inputs))
    assert chunk_triton.deprioritised(inputs) is None
    assert chunk_triton.deprioritised(inputs.replace(return_lse=False)) is not None
    assert ops.explain("attention", q, k, v, sinks=torch.zeros(4), return_lse=False).backend is not None
    if not cpu_library.unavailable():
        assert ops.explain("attention", q, k, v, sinks=torch.zeros(4)).backend == "chunk_cpp"


def test_wrong_sinks_are_named():
    (q, k, v), _ = make((1, 6, 6, 4, 2, 8, 8), torch.float32)
    with pytest.raises(ValueError, match="sinks has shape"):
        ops.attention(q, k, v, sinks=torch.zeros(2))
    with pytest.raises(TypeError, match=r"sinks has dtype torch\.int64"):
        ops.attention(q, k, v, sinks=torch.zeros(4, dtype=torch.int64))
