"""The compiled recurrences beyond their common contract: instruction sets, threads, dtypes, torch's rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seqarch import ops
from seqarch.ops import OPS
from seqarch.ops.chunked.recurrence import stepwise
from seqarch.ops.delta_rule import chunk_cpp as delta_cpp
from seqarch.ops.linear_attention import chunk_cpp as linear_cpp
from seqarch.ops.native import cpu_library
from seqarch.testing import assert_close

ISAS = cpu_library.supported_isas()
DECAYS = ("none", "head", "step", "key")
COMPILED = ("linear_attention", "delta_rule", "delta_rule_read", "delta_rule_erase", "delta_rule_apart")
"""The compiled operations; the delta rule also with what it reads or erases apart from k."""


def call(kind: str, backend: str = "auto", **inputs: Any) -> tuple[Tensor, Tensor]:
    op = ops.linear_attention if kind == "linear_attention" else ops.delta_rule
    return op(**inputs, backend=backend)


def make(op: str, decay: str, B=2, T=70, G=2, H=4, K=20, V=37, dtype=torch.float64, rows: int | None = None) -> dict:
    torch.manual_seed(0)
    q, k = torch.randn(2, B, T, G, K, dtype=dtype)
    shapes = {"none": None, "head": (H,), "step": (B, T, H), "key": (B, T, H, K)}
    shape = shapes[decay]
    inputs: dict[str, Any] = {
        "q": q,
        "k": torch.nn.functional.normalize(k, dim=-1),
        "v": torch.randn(B, T, H, V, dtype=dtype),
    }
    inputs["log_decay"] = None if shape is None else -torch.rand(shape, dtype=dtype)
    if op != "linear_attention":
        inputs["beta"] = 2 * torch.rand(B, T, H, dtype=dtype)
    if op in ("delta_rule_read", "delta_rule_apart"):
        inputs["read"] = inputs["k"] * torch.rand_like(k)
    if op in ("delta_rule_erase", "delta_rule_apart"):
        inputs["erase"] = inputs["k"] * torch.rand_like(k)
    inputs["state"] = torch.randn(rows or B, H, K, V, dtype=dtype)
    return inputs


def gradients(op: str, backend: str, inputs: dict[str, Any], **options) -> dict[str, Tensor]:
    """Outputs, and the gradients of a weighted sum of both of them."""
    leaves = {name: m.clone().requires_grad_() if isinstance(m, Tensor) else m for name, m in inputs.items()}
    o, state = call(op, backend, **leaves, **options)
    torch.manual_seed(1)
    weights = [torch.randn(x.shape).to(x.device) for x in (o, state)]
    ((o * weights[0]).sum() + (state * weights[1]).sum()).backward()
    found: dict[str, Any] = {f"gradient of {name}": m.grad for name, m in leaves.items() if isinstance(m, Tensor)}
    return found | {"output": o.detach(), "last state": state.detach()}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("op", COMPILED if ISAS else ())
def test_every_instruction_set_equals_the_reference(op: str, decay: str):
    for shape in (
        {},
        {"T": 1, "V": 1},
        {"T": 65, "K": 3, "V": 5, "G": 4},
        {"T": 131, "K": 33, "V": 16, "G": 1, "B": 1},
    ):
        inputs = make(op, decay, **shape)
        right = gradients(op, "recurrent_torch", inputs)
        for isa in ISAS:
            with cpu_library.use_isa(isa):
                found = gradients(op, "chunk_cpp", inputs)
            for name, expected in right.items():
                assert_close(found[name], expected, 1e-11, f"{isa}, {shape}: {name}")


def test_heads_of_values_one_wide_are_taken_side_by_side():
    """As slots are: with decays from 0 to -inf, packed, of more heads than a vector has numbers, and where gradients of
    queries and keys are those of several tasks, the last of which has fewer heads."""
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"T": 131, "H": 80, "V": 1}, {}),
        ({"T": 70, "H": 9, "G": 1, "V": 1, "K": 33, "B": 1}, {}),
        ({"T": 130, "H": 37, "G": 1, "V": 1, "B": 2}, {}),
        ({"T": 1, "H": 6, "V": 1, "B": 3}, {}),
        ({"T": 200, "H": 6, "V": 1, "B": 1, "rows": 4}, {"cu_seqlens": (0, 64, 64, 65, 200)}),
    ]
    for shape, options in cases:
        inputs = make("linear_attention", "step", **shape)
        inputs["log_decay"][..., 0], inputs["log_decay"][..., 1] = 0.0, -torch.inf
        right = gradients("linear_attention", "recurrent_torch", inputs, **options)
        for isa in ISAS:
            with cpu_library.use_isa(isa):
                found = gradients("linear_attention", "chunk_cpp", inputs, **options)
            for name, expected in right.items():
                assert_close(found[name], expected, 1e-11, f"{isa}, {shape}: {name}")


@pytest.mark.parametrize("op", COMPILED if ISAS else ())
def test_packed_sequences_with_gradients(op: str):
    offsets = (0, 0, 64, 65, 65, 130, 200, 200)
    for decay in DECAYS:
        inputs = make(op, decay, B=1, T=200, rows=7)
        found = gradients(op, "chunk_cpp", inputs, cu_seqlens=offsets)
        for name, expected in gradients(op, "recurrent_torch", inputs, cu_seqlens=offsets).items():
            assert_close(found[name], expected, 1e-11, f"{decay}: {name}")


@pytest.mark.parametrize("op", COMPILED if ISAS else ())
def test_without_heads_of_values_the_gradients_are_0(op: str):
    inputs = make(op, "step", H=0, dtype=torch.float32)
    for name, found in gradients(op, "chunk_cpp", inputs).items():
        assert torch.equal(found, torch.zeros_like(found)), name


@pytest.mark.parametrize("op", COMPILED if ISAS else ())
def test_results_do_not_depend_on_the_number_of_threads(op: str):
    before = torch.get_num_threads()
    for decay in DECAYS:
        for H, V in ((12, 37), (1, 150), (40, 1)):
            inputs, results = make(op, decay, 1, 130, G=1, H=H, V=V, dtype=torch.float32), []
            try:
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    results.append(gradients(op, "chunk_cpp", inputs))
            finally:
                torch.set_num_threads(before)
            for other in results[1:]:
                assert all(torch.equal(results[0][name], other[name]) for name in other), (decay, H)


@pytest.mark.parametrize("op", COMPILED if ISAS else ())
def test_numbers_that_are_not_finite_stay_in_their_sequence(op: str):
    """Also where buffers are used again for the next one, and rows are shorter than vectors."""
    for decay in DECAYS:
        inputs = make(op, decay, B=1, T=140, K=5, V=3, rows=3, dtype=torch.float32)
        spoiled = {name: m.clone() if isinstance(m, Tensor) else m for name, m in inputs.items()}
        for name in ("q", "k", "v"):
            spoiled[name][:, 5] = torch.nan
        spoiled["state"][0] = torch.inf
        clean, found = (gradients(op, "chunk_cpp", each, cu_seqlens=(0, 70, 75, 140)) for each in (inputs, spoiled))
        for name in ("output", "gradient of q", "gradient of k", "gradient of v"):
            assert torch.equal(clean[name][:, 70:], found[name][:, 70:]), (decay, name)
        assert torch.equal(clean["last state"][1:], found["last state"][1:])
        assert torch.equal(clean["gradient of state"][1:], found["gradient of state"][1:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "rows", "H"), [("float64", 2, 37), ("float64", 4, 7), ("float32", 2, 137)])
def test_heads_side_by_side_see_nothing_of_the_sequence_before(isa: str, dtype: str, rows: int, H: int):
    """Nor does the last of a group's tasks, which has fewer heads than its buffers. Tasks go to whichever thread is
    free: the first sequence is long, so that its last tasks end while those of the next ones are handed out."""
    long, before = 640, torch.get_num_threads()
    offsets = (0, *(long + 70 * i for i in range(rows)))
    inputs = make(
        "linear_attention", "step", 1, offsets[-1], G=1, H=H, K=65, V=1, dtype=getattr(torch, dtype), rows=rows
    )
    spoiled = {name: m.clone() for name, m in inputs.items()}
    for name in ("q", "k", "v"):
        spoiled[name][:, :long] = torch.nan
    spoiled["state"][0] = torch.nan
    try:
        with cpu_library.use_isa(isa):
            clean = gradients("linear_attention", "chunk_cpp", inputs, cu_seqlens=offsets)
            for threads in (1, 2, 3, 3, 5, 5, 5):
                torch.set_num_threads(threads)
                found = gradients("linear_attention", "chunk_cpp", spoiled, cu_seqlens=offsets)
                for name in ("output", "gradient of q", "gradient of k", "gradient of v", "gradient of log_decay"):
                    assert torch.equal(clean[name][:, long:], found[name][:, long:]), (threads, name)
                for name in ("last state", "gradient of state"):
                    assert torch.equal(clean[name][1:], found[name][1:]), (threads, name)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("op", COMPILED if ISAS else ())
def test_inputs_of_several_dtypes(op: str):
    inputs = make(op, "key", dtype=torch.float32)
    expected, last = call(op, "recurrent_torch", **inputs)
    for name, dtype in (
        ("v", torch.bfloat16),
        ("q", torch.float16),
        ("k", torch.float64),
        ("log_decay", torch.float64),
    ):
        mixed = inputs | {name: inputs[name].to(dtype)}
        o, state = call(op, "chunk_cpp", **mixed)
        assert o.dtype == mixed["v"].dtype
        assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(o, expected, 1e-2, name)
        assert_close(state, last, 1e-2, name)


@pytest.mark.slow
def test_the_custom_operators_keep_torchs_rules():
    for decay in DECAYS if ISAS else ():
        inputs = make("linear_attention", decay, T=7, dtype=torch.float32)
        log_decay = inputs["log_decay"]
        inputs["log_decay"] = None if log_decay is None else stepwise(log_decay, inputs["v"])
        _check("linear_attention", linear_cpp, **inputs)
        inputs["beta"] = torch.rand(2, 7, 4)
        for apart in ({}, {"read": inputs["k"].clone()}, {"read": inputs["q"].clone(), "erase": inputs["k"].clone()}):
            _check("delta_rule", delta_cpp, **inputs, **apart)


def _check(op: str, module: Any, **inputs: Tensor | None) -> None:
    plain = OPS[op].inputs(**inputs, scale=0.5).values()
    leaves = [m.detach().clone().requires_grad_() if isinstance(m, Tensor) else m for m in plain]
    operator = module.operator
    torch.library.opcheck(operator.operator, tuple(leaves))
    results, needed = list(operator.operator(*plain)), [isinstance(m, Tensor) for m in plain]
    torch.library.opcheck(operator.gradient, (*plain, *results, needed))


@pytest.mark.parametrize("op", COMPILED if ISAS else ())
def test_torch_compile_sees_one_graph(op: str):
    inputs = make(op, "step", dtype=torch.float32)
    expected = call(op, **inputs)
    compiled = torch.compile(lambda **leaves: call(op, **leaves), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), expected)
