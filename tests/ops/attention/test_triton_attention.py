"""The Triton kernels of softmax attention, over all keys, windows and listed blocks, and of experts' grouped products.

On a CUDA device where there is one, else interpreted, as in ``test_triton_recurrences``; against the dense softmax of
the operations' own tests, or a loop over the experts. Shapes have more than one tile of queries and of keys where that
matters, and ragged ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seqarch import ops
from seqarch.ops import OPS
from seqarch.ops.attention import chunk_triton
from seqarch.ops.attention.inputs import AttentionInputs
from seqarch.ops.block_sparse_attention import grouped_triton
from seqarch.ops.block_sparse_attention.inputs import ListInputs
from seqarch.ops.experts import grouped_mm
from seqarch.ops.native.custom_op import Upstream
from seqarch.ops.triton import availability
from seqarch.testing import assert_close
from tests.ops.attention import test_attention as whole
from tests.ops.attention import test_key_bias as biases
from tests.ops.attention import test_log_sums as sums
from tests.ops.block_sparse_attention import test_block_sparse_attention as listed
from tests.ops.block_sparse_attention import test_log_sums_of_lists as sums_of_lists
from tests.ops.chunked.test_triton_recurrences import BOUND, DEVICE, EXACT
from tests.ops.experts import test_experts as routed
from tests.support.surrounded import surrounded

QUICK = ("packed_window", "key_start_window", "more_queries_window", "bidirectional", "long_window_of_a_block")
QUICK_LISTED = ("lists_between", "packed_window", "window_key_start", "more_keys", "step", "key_start_step")
SHORTER: dict[str, dict[str, Any]] = {
    "long": {"shape": (1, 120, 120, 4, 2, 2, 8, 6)},
    "long_more_keys": {"shape": (1, 70, 150, 4, 2, 4, 8, 6)},
    "long_packed": {"shape": (1, 120, 120, 2, 1, 2, 8, 8), "cu_seqlens": [0, 3, 70, 70, 120]},
    "long_key_start": {"shape": (2, 80, 120, 2, 1, 2, 8, 8), "key_start": [20, 110]},
    "long_window": {"shape": (1, 120, 120, 2, 2, 2, 8, 8)},
}
"""Of calls that are long for what splits queries in chunks: interpreted, these kernels have tiles of 16 pairs of a
block, and a block is named by more than 30 queries at any of these lengths."""

LONG = {"shape": (1, 131, 150, 2, 1, 8, 6)}
"""More keys than one tile holds, seen whole."""

FEW: dict[str, dict[str, Any]] = {
    "step": {"shape": (2, 1, 700, 4, 2, 8, 6)},
    "steps_of_many_heads": {"shape": (1, 5, 150, 40, 2, 4, 4)},
    "window": {"shape": (2, 3, 300, 4, 2, 8, 6), "window": 150},
    "key_start": {"shape": (3, 1, 200, 2, 1, 8, 8), "key_start": [0, 190, 200]},
    "key_start_window": {"shape": (3, 2, 200, 2, 1, 8, 8), "key_start": [0, 190, 70], "window": 120},
    "bidirectional": {"shape": (1, 16, 200, 2, 2, 8, 6), "causal": False},
}
"""Calls as of tokens that are generated."""


pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
"""Which Triton 3.6's interpreter does; with numpy 2.4 it fails for that."""


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    """Kernels run: on the device, or else by the interpreter."""
    with nullcontext() if DEVICE == "cuda" else availability.interpreted():
        yield


def placed(options: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}


def compare(
    found: Callable[..., Tensor], expected: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype = EXACT
) -> None:
    """Values and gradients on inputs of this dtype, against float64 ones on the same numbers."""
    given = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    right = listed.with_gradients(expected, [x.double() if x.is_floating_point() else x for x in given])
    for name, one, other in zip(
        ("o", "dq", "dk", "dv"), listed.with_gradients(found, [x.to(DEVICE) for x in given]), right, strict=True
    ):
        if other.abs().max() < 1e-14:  # as of a query that sees one key: rounding is no share of nothing
            assert one.abs().max() < BOUND[dtype], name
        else:
            assert_close(one.cpu(), other, BOUND[dtype], name)


def compare_whole(call: dict[str, Any], dtype: torch.dtype = EXACT) -> None:
    inputs, options = whole.make(**call)
    on_device = placed(options)
    compare(
        lambda *x: ops.attention(*x, **on_device, backend="chunk_triton"),
        lambda *x: whole.dense(*x, **options), inputs, dtype,
    )  # fmt: skip


def compare_listed(call: str, dtype: torch.dtype = EXACT) -> None:
    inputs, options = listed.make(call, changes=SHORTER.get(call, {}) if DEVICE == "cpu" else {})
    on_device = placed(options)
    compare(
        lambda *x: ops.block_sparse_attention(*x, **on_device, backend="grouped_triton"),
        lambda *x: listed.dense(*x, **options), inputs, dtype,
    )  # fmt: skip


@pytest.mark.parametrize("call", QUICK)
def test_attention_equals_a_dense_softmax(call: str):
    compare_whole(whole.CALLS[call])


@pytest.mark.parametrize("call", ["packed_window", "key_start_window", "key_start_step"])
def test_the_sums_of_attention_equal_those_of_a_dense_softmax(call: str):
    """With a score of each head beside them, and gradients."""
    inputs, options = whole.make(**whole.CALLS[call])
    given = sums.with_sinks([x.to(EXACT) for x in inputs])
    right = sums.with_gradients(lambda *x: sums.dense(*x, **options), [x.double() for x in given])
    found = sums.with_gradients(sums.call("chunk_triton", **placed(options)), [x.to(DEVICE) for x in given])
    for name, one, other in zip(sums.NAMES, found, right, strict=True):
        assert_close(one.cpu(), other, BOUND[EXACT], name)


@pytest.mark.parametrize(
    "call", ["packed_window", "key_start_step", *(pytest.param(one, marks=pytest.mark.slow) for one in biases.CHOSEN)]
)
def test_what_is_added_to_scores_equals_a_dense_softmax(call: str):
    inputs, options = whole.make(**whole.CALLS[call])
    given = biases.biased([x.to(EXACT) for x in inputs])
    right = sums.with_gradients(biases.expected(**options), [x.double() for x in given])
    found = sums.with_gradients(biases.call("chunk_triton", **placed(options)), [x.to(DEVICE) for x in given])
    for name, one, other in zip(biases.NAMES, found, right, strict=True):
        assert_close(one.cpu(), other, BOUND[EXACT], name)


@pytest.mark.slow
@pytest.mark.parametrize("call", [call for call in whole.CALLS if call not in QUICK])
def test_attention_of_more_kinds_equals_a_dense_softmax(call: str):
    compare_whole(whole.CALLS[call])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_over_whole_tiles(dtype: torch.dtype):
    """16-bit inputs have other tiles than float32 ones."""
    compare_whole(LONG, dtype)


FEW_LOW = [
    call if call in ("key_start", "key_start_window") else pytest.param(call, marks=pytest.mark.slow) for call in FEW
]


@pytest.mark.parametrize("call", FEW)
def test_few_queries_and_many_keys(call: str):
    """Their keys are split: parts of one row that see nothing, and rows of more heads than a program holds."""
    compare_whole(FEW[call])


@pytest.mark.parametrize("call", FEW_LOW)
def test_few_queries_in_bfloat16(call: str):
    """Whose tiles are others."""
    compare_whole(FEW[call], torch.bfloat16)


@pytest.mark.parametrize("parts", [1, 3, 1000])
def test_any_number_of_parts(parts: int, monkeypatch: pytest.MonkeyPatch):
    """On a GPU of any size; more of them than are added up at a time."""
    from seqarch.ops.attention import launches_triton

    monkeypatch.setattr(launches_triton, "persistent", lambda most, _: min(most, parts))
    compare_whole({"shape": (1, 2, 700, 2, 1, 8, 6)})


def test_few_queries_of_any_strides():
    (q, k, v), _ = whole.make((2, 3, 200, 4, 2, 8, 6))
    apart = [x.to(DEVICE, EXACT).transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    expected = ops.attention(*(x.contiguous() for x in apart), backend="chunk_triton")
    assert torch.equal(ops.attention(*apart, backend="chunk_triton"), expected)


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("start", [2**31 - 1, 2**32, 2**62])
def test_rows_that_begin_past_all_numbers_are_hidden(queries: int, start: int):
    (q, k, v), _ = whole.make((2, queries, 300, 2, 1, 8, 6))
    inputs = [x.to(DEVICE, EXACT) for x in (q, k, v)]
    begins = torch.tensor([0, start], device=DEVICE)
    found = ops.attention(*inputs, key_start=begins, backend="chunk_triton")
    assert_close(found[:1], ops.attention(*(x[:1] for x in inputs), backend="chunk_triton"), BOUND[EXACT], "o")
    assert not found[1].any()


@pytest.mark.parametrize(("batch", "keys"), [(2, 0), (0, 9)])
def test_few_queries_without_keys_or_rows(batch: int, keys: int):
    (q, k, v), _ = whole.make((batch, 3, keys, 2, 1, 8, 6))
    inputs = [x.to(DEVICE, EXACT) for x in (q, k, v)]
    for found in listed.with_gradients(lambda *x: ops.attention(*x, backend="chunk_triton"), inputs):
        assert not found.any()


@pytest.mark.parametrize("call", QUICK_LISTED)
def test_listed_blocks_equal_a_dense_softmax(call: str):
    compare_listed(call)


@pytest.mark.parametrize("call", ["key_start", pytest.param("packed_window", marks=pytest.mark.slow)])
def test_the_sums_of_listed_blocks_equal_those_of_a_dense_softmax(call: str):
    (*inputs, index), options = listed.make(call)
    given = [x.to(EXACT) for x in inputs]
    right = sums.with_gradients(
        lambda *x: sums_of_lists.dense_sums(*x, index=index, **options), [x.double() for x in given]
    )
    call_here = sums_of_lists.call("grouped_triton", index.to(DEVICE), **placed(options))
    for name, one, other in zip(
        sums_of_lists.NAMES, sums.with_gradients(call_here, [x.to(DEVICE) for x in given]), right, strict=True
    ):
        some = other.isfinite()
        assert torch.equal(one.cpu().isfinite(), some)
        assert_close(one.cpu().where(some, 0), other.where(some, 0), BOUND[EXACT], name)


@pytest.mark.slow
@pytest.mark.parametrize("call", [call for call in listed.CALLS if call not in QUICK_LISTED])
def test_listed_blocks_of_more_kinds_equal_a_dense_softmax(call: str):
    compare_listed(call)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(one, marks=pytest.mark.slow) for one in (torch.float16, torch.float32))]
)
def test_listed_blocks_in_low_precision(dtype: torch.dtype):
    compare_listed("packed_window", dtype)


@pytest.mark.parametrize(("queries", "heads"), [(1, 3), (20, 3), (1, 70), (5, 70)])
def test_many_heads_share_a_list(queries: int, heads: int):
    """More heads than a tile has rows, and a number that is no power of two; one query has a path of its own."""
    inputs = [torch.randn(1, queries, heads, 4), torch.randn(1, 20, 1, 4), torch.randn(1, 20, 1, 4)]
    index = torch.randint(-1, 2, (1, queries, 1, 2))
    compare(
        lambda *x: ops.block_sparse_attention(*x, 16, backend="grouped_triton"),
        lambda *x: listed.dense(*x, block_size=16), [*inputs, index],
    )  # fmt: skip


@pytest.mark.slow
def test_heads_take_turns_where_memory_is_short(monkeypatch: pytest.MonkeyPatch):
    inputs, options = listed.make("lists_between")
    call = listed.call_op("grouped_triton", placed(options))
    inputs = [x.to(DEVICE, EXACT) if x.is_floating_point() else x.to(DEVICE) for x in inputs]
    together = listed.with_gradients(call, inputs)
    from seqarch.ops.block_sparse_attention import launches_triton

    monkeypatch.setattr(launches_triton, "WORKSPACE", 1)
    for one, other in zip(listed.with_gradients(call, inputs), together, strict=True):
        assert_close(one, other, BOUND[EXACT], "in turn")


def test_no_tensor_is_as_large_as_all_pairs(monkeypatch: pytest.MonkeyPatch):
    """Of what is allocated: no kernel is run."""
    from seqarch.ops.triton import launch

    monkeypatch.setattr(launch, "launch", lambda *arguments, **constants: None)
    for op, index in (("attention", False), ("block_sparse_attention", True)):
        made = []
        for length in (2048, 4096):
            q, k, v = (torch.randn(1, length, 1, 8, device=DEVICE) for _ in range(3))
            module = OPS[op].backends["grouped_triton" if index else "chunk_triton"].module
            rest: tuple[Any, ...] = (True, 100, 1.0, None, None)
            if index:
                entries = torch.randint(0, length // 32, (1, length, 1, 2), device=DEVICE) * 2
                rest = entries, torch.zeros(1, length, dtype=torch.int64, device=DEVICE), 32, 0, 1.0
            inputs = ListInputs(q, k, v, *rest) if index else AttentionInputs(q, k, v, *rest)
            with listed.LargestTensor() as largest:
                o, log_sum = module.forward(inputs)
                module.backward(inputs, Upstream([o, log_sum], [o], [True] * 3))
            made.append(largest.elements)
        assert 4096 * 8 <= made[1] < 4096 * 4096 / 16, op
        assert made[1] <= 2 * made[0], op


@pytest.mark.slow
def test_nothing_is_read_beyond_the_tensors():
    (q, k, v), options = whole.make(**whole.CALLS["packed_window"])
    call = lambda *x: ops.attention(*x, **options, backend="chunk_triton")  # noqa: E731
    given = [x.to(DEVICE, EXACT) for x in (q, k, v)]
    for one, other in zip(
        listed.with_gradients(call, given), listed.with_gradients(call, [surrounded(x) for x in given]), strict=True
    ):
        assert torch.equal(one, other)
    (*_, index), options = listed.make("packed_window")
    blocks = listed.call_op("grouped_triton", options)
    given = [*given, index.to(DEVICE)]
    around = [*(surrounded(x) for x in given[:3]), given[3]]
    for one, other in zip(listed.with_gradients(blocks, given), listed.with_gradients(blocks, around), strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(DEVICE == "cuda", reason="a device would need the memory, a sparse file does not")
@pytest.mark.parametrize(
    "kind", ["attention", "block_sparse_attention", pytest.param("experts", marks=pytest.mark.slow)]
)
def test_offsets_beyond_32_bits(kind: str, tmp_path: Path):
    """Rows that lie 2^23 numbers apart, so that the last of them lie beyond 2^31 of the first."""
    T = 270
    torch.manual_seed(0)
    x, other = torch.randn(T, 1, 4), torch.randn(T, 1, 4)
    far = torch.from_file(str(tmp_path / "rows"), shared=True, size=T * 2**23, dtype=torch.float32)
    far = far.as_strided((1, T, 1, 4), (0, 2**23, 4, 1))
    far.copy_(x[None])
    found = []
    for values in (x[None], far):
        if kind == "attention":
            found.append(ops.attention(other[None], other[None], values, window=20, backend="chunk_triton"))
        elif kind == "block_sparse_attention":
            index = torch.tensor([[0, 16]]).expand(1, T, 1, 2)
            call = ops.block_sparse_attention(other[None], other[None], values, index, 16, backend="grouped_triton")
            found.append(call)
        else:
            from seqarch.ops.experts import grouped_triton as experts

            starts = torch.tensor([0, 3, 200, T])
            found.append(experts.grouped_matmul(values[0, :, 0], torch.ones(3, 4, 5), starts))
    assert torch.equal(*found)


def test_large_scores_have_finite_gradients():
    """Computed again, a score of 1e9 rounds otherwise; its weight stays at most 1."""
    (q, k, v), _ = whole.make(**LONG)
    inputs = [(3e4 * q).float().to(DEVICE), (3e4 * k).float().to(DEVICE), v.float().to(DEVICE)]
    for found in listed.with_gradients(lambda *x: ops.attention(*x, backend="chunk_triton"), inputs):
        assert found.isfinite().all()


def experts_with(backend: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return routed.with_gradients(lambda **g: ops.experts(backend=backend, **g), given)


@pytest.mark.parametrize("shape", [{}, {"width": 40, "hidden": 70}])
@pytest.mark.parametrize("dropped", [False, True])
def test_grouped_products_equal_a_loop_over_the_experts(shape: dict[str, int], dropped: bool):
    given = routed.make(**shape)
    if dropped:
        given["expert_index"][::3, 1] = -1
    expected = experts_with("parallel_torch", given)
    found = experts_with("grouped_triton", {name: x.to(DEVICE, EXACT) if x.is_floating_point() else x.to(DEVICE)
                                            for name, x in given.items()})  # fmt: skip
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name].cpu(), expected[name], BOUND[EXACT], name)


@pytest.mark.parametrize("gated", [False, True])
def test_torchs_grouped_product_is_given_the_right_arguments(gated: bool):
    """On a CPU torch computes it in a loop, in any dtype but float64."""
    given = routed.make(torch.float32, width=16, hidden=24)
    given["expert_index"][::3, 1] = -1
    if not gated:
        del given["w_gate"]
    expected = experts_with("parallel_torch", given)
    found = routed.with_gradients(lambda **g: grouped_mm.run(OPS["experts"].inputs(**g)), given)
    for name in expected:
        assert_close(found[name], expected[name], 1e-6, name)


def test_what_the_kernels_do_not_support(monkeypatch: pytest.MonkeyPatch):
    x = torch.zeros(1, 20, 2, 300, device=DEVICE)
    with pytest.raises(ops.BackendError, match="'chunk_triton' cannot serve this call: K is 300, expected at most 256"):
        ops.attention(x, x, x, backend="chunk_triton")
    index = torch.zeros(1, 20, 2, 1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ops.BackendError, match="'grouped_triton' cannot serve this call: K is 300"):
        ops.block_sparse_attention(x, x, x, index, 8, backend="grouped_triton")
    inputs = OPS["experts"].inputs(**routed.make(torch.bfloat16))
    assert "x is on cpu, where torch's grouped product is a loop" in str(grouped_mm.unsupported(inputs))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert "a loop over the experts on compute capability (8, 0), expected 9.0" in str(grouped_mm.unavailable())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert grouped_mm.unavailable() is None


def test_auto_leaves_whole_sequences_to_torch():
    x = torch.zeros(1, 20, 2, 4, device=DEVICE)
    for options, passed_over in (
        ({}, True),
        ({"causal": False}, True),
        ({"cu_seqlens": [0, 20]}, True),
        ({"window": 3}, False),
        ({"cu_seqlens": [0, 5, 20]}, False),
        ({"key_start": torch.zeros(1, dtype=torch.int64, device=DEVICE)}, False),
    ):
        reason = ops.explain("attention", x, x, x, **options).reasons.get("chunk_triton", "")
        assert ("queries see whole sequences" in reason) == passed_over, options
        assert ops.attention(x, x, x, **options, backend="chunk_triton").shape == x.shape
    start = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for queries, options, passed_over in (
        (1, {}, True),
        (1, {"causal": False}, True),
        (1, {"window": 3}, False),
        (1, {"key_start": start}, False),
        (2, {}, False),
        (2, {"causal": False}, True),
    ):
        reason = ops.explain("attention", x[:, :queries], x, x, **options).reasons.get("chunk_triton", "")
        assert ("queries see whole sequences" in reason) == passed_over, (queries, options)


def test_auto_leaves_short_blocks_to_torch_but_for_one_query():
    x = torch.zeros(1, 40, 2, 4, device=DEVICE)
    for queries, size, passed_over in ((40, 15, True), (40, 16, False), (1, 1, False)):
        index = torch.zeros(1, queries, 2, 1, dtype=torch.int64, device=DEVICE)
        told = ops.explain("block_sparse_attention", x[:, :queries], x, x, index, size)
        assert ("tokens leave most of a tile empty" in told.reasons.get("grouped_triton", "")) == passed_over


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_custom_operators_keep_torchs_rules():
    (q, k, v), _ = whole.make(**whole.CALLS["grouped"])
    leaves = [x.to(DEVICE, EXACT).requires_grad_() for x in (q, k, v)]
    bias = torch.randn(*k.shape[:2], q.shape[2], device=DEVICE, dtype=EXACT).requires_grad_()
    for operator, *own in (
        (chunk_triton.operators.outputs, False, None),
        (chunk_triton.operators.with_sums, True, bias),
    ):
        torch.library.opcheck(operator.operator, (*leaves, True, 3, 0.5, None, None, 0.0, *own))
    (q, k, v, index), options = listed.make("list_a_query_head")
    leaves = [x.to(DEVICE, EXACT).requires_grad_() for x in (q, k, v)]
    entries = torch.where(index >= 0, 2 * index, index).to(DEVICE)
    first = torch.zeros(1, q.shape[1], dtype=torch.int64, device=DEVICE)
    for operator in (grouped_triton.operators.outputs, grouped_triton.operators.with_sums):
        torch.library.opcheck(operator.operator, (*leaves, entries, first, options["block_size"], 0, 0.3))
