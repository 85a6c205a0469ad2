"""The logarithms of the sums of attention over listed blocks, and their gradients, on every backend that runs here."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from seqarch import ops
from seqarch.ops.block_sparse_attention import grouped_cpp
from seqarch.ops.block_sparse_attention.inputs import ListInputs
from tests.ops.attention.test_log_sums import with_gradients
from tests.ops.block_sparse_attention.test_block_sparse_attention import (
    BACKENDS,
    CALLS,
    dense,
    make,
    pairs_seen,
    same,
    serving,
)

NAMES = ("o", "lse", "dq", "dk", "dv")
SHORT = [name for name in CALLS if not name.startswith("long") or name == "long_key_start"]


def dense_sums(q: Tensor, k: Tensor, v: Tensor, *, index: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """o and lse of all scores."""
    scale = options.get("scale") or q.shape[-1] ** -0.5
    seen = pairs_seen(q.shape[1], k.shape[1], index, **{**options, "scale": None})
    seen = seen.repeat_interleave(q.shape[2] // index.shape[2], dim=2)
    scores = torch.einsum("bqhk,bshk->bqhs", q, k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)) * scale
    total, some = scores.exp().where(seen, 0.0).sum(-1), seen.any(-1)
    return dense(q, k, v, index, **options), torch.where(some, total.where(some, 1.0).log(), -torch.inf)


def call(backend: str, index: Tensor, **options: Any):
    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.block_sparse_attention(q, k, v, index, **options, return_lse=True, backend=backend)

    return run


@pytest.mark.parametrize("name", SHORT)
def test_every_backend_equals_a_dense_softmax(name: str):
    (*given, index), options = make(name)
    expected = with_gradients(partial(dense_sums, index=index, **options), given)
    for backend in serving([*given, index], options):
        for what, a, b in zip(NAMES, with_gradients(call(backend, index, **options), given), expected, strict=True):
            same(a, b, f"{backend} {what}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_o_is_what_it_is_without_them_and_bfloat16_has_sums_of_float32(backend: str):
    (*given, index), options = make("long_key_start")
    o, _ = call(backend, index, **options)(*given)
    same(o, ops.block_sparse_attention(*given, index, **options, backend=backend))
    low = [x.bfloat16() for x in given]
    o, lse = call(backend, index, **options)(*low)
    assert (o.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    _, exact = call(backend, index, **options)(*(x.double() for x in low))
    nothing = exact == -torch.inf
    assert nothing.any()
    assert torch.equal(lse == -torch.inf, nothing)
    assert (lse - exact)[~nothing].abs().max() < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_the_lists_are_put_together(backend: str):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 64, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    index = torch.rand(2, 64, 2, 4).argsort(-1)
    whole = ops.block_sparse_attention(q, k, v, index, 16, backend=backend)
    parts = [call(backend, part, block_size=16)(q, k, v) for part in index.split([1, 2, 1], dim=-1)]
    outputs, sums = (torch.stack(each) for each in zip(*parts, strict=True))
    same((outputs * sums.softmax(0).unsqueeze(-1)).sum(0), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_finite_differences(backend: str):
    torch.manual_seed(0)
    given = [torch.randn(1, 34, heads, 2, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1)]
    index = torch.randint(0, 3, (1, 34, 1, 2))
    index[..., 0] = 0  # each query sees something
    assert torch.autograd.gradcheck(call(backend, index, block_size=16), given, fast_mode=True)


def test_the_compiled_operator_keeps_torchs_rules_and_is_one_graph():
    (*given, index), options = make("window", torch.float32)
    if "grouped_cpp" in BACKENDS:
        inputs = ListInputs.of(ops.OPS["block_sparse_attention"].inputs(*given, index, **options))
        leaves = inputs.replace(**{name: x.clone().requires_grad_() for name, x in zip("qkv", given, strict=True)})
        operator = grouped_cpp.operators.with_sums
        torch.library.opcheck(operator.operator, leaves.values())
        o, log_sum = operator(inputs)
        needed = [name in ("q", "k", "v") for name in ListInputs.__match_args__]
        upstream = o, log_sum, torch.randn_like(o), torch.randn_like(log_sum), needed
        torch.library.opcheck(operator.gradient, (*inputs.values(), *upstream))
    function = call("auto", index, **options)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for one, other in zip(with_gradients(compiled, given), with_gradients(function, given), strict=True):
        torch.testing.assert_close(one, other)
