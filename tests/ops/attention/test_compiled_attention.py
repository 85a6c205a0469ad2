"""The compiled attentions beyond their common contract: instruction sets, threads, dtypes, odd sizes, torch's rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seqarch import ops
from seqarch.ops.attention import chunk_cpp
from seqarch.ops.attention.inputs import AttentionInputs
from seqarch.ops.native import cpu_library
from seqarch.testing import assert_close

ISAS = cpu_library.supported_isas()
BACKENDS = {"attention": "chunk_cpp", "block_sparse_attention": "grouped_cpp"}
COMPILED = tuple(BACKENDS) if ISAS else ()

SIZES: dict[str, tuple[int, ...]] = {
    "tiles": (2, 150, 150, 4, 2, 20, 37),
    "one": (1, 1, 1, 1, 1, 1, 1),
    "step": (3, 1, 130, 6, 2, 33, 16),
    "many_heads": (1, 9, 70, 130, 1, 5, 3),
    "more_keys": (1, 65, 300, 2, 2, 17, 8),
}
"""B, Tq, Tk, H, G, K and V."""

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "attention": [{}, {"window": 50}, {"causal": False, "scale": 2.0}],
    "block_sparse_attention": [{"block_size": 16}, {"block_size": 100}, {"block_size": 7, "window": 40}],
}


def make(op: str, size: str = "tiles", dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(0)
    B, Tq, Tk, H, G, K, V = SIZES[size]
    shapes = {"q": (B, Tq, H, K), "k": (B, Tk, G, K), "v": (B, Tk, G, V)}
    inputs = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    if op == "block_sparse_attention":
        inputs["block_index"] = torch.randint(-1, 10, (B, Tq, G, 4))
    return inputs


def gradients(op: str, backend: str, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The output, and the gradients of a weighted sum of it. Blocks past the end become the last one."""
    if "block_index" in inputs:
        last = -(-inputs["k"].shape[1] // options["block_size"]) - 1
        inputs = inputs | {"block_index": inputs["block_index"].clamp(max=last)}
    leaves = {name: x.clone().requires_grad_() if x.is_floating_point() else x for name, x in inputs.items()}
    o = getattr(ops, op)(**leaves, **options, backend=backend)
    torch.manual_seed(1)
    (o * torch.randn(o.shape)).sum().backward()
    return {f"gradient of {name}": leaves[name].grad for name in ("q", "k", "v")} | {"output": o.detach()}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", BACKENDS)
def test_every_instruction_set_equals_the_reference(op: str, size: str, isa: str):
    inputs = make(op, size)
    for options in OPTIONS[op]:
        with cpu_library.use_isa(isa):
            found = gradients(op, BACKENDS[op], inputs, **options)
        for name, expected in gradients(op, "recurrent_torch", inputs, **options).items():
            torch.testing.assert_close(found[name], expected, rtol=1e-11, atol=1e-12, msg=f"{options}: {name}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", BACKENDS)
def test_float32_and_bfloat16_on_every_instruction_set(op: str, isa: str):
    """Also with scores of some hundreds, of which a sum of exponentials would overflow."""
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        inputs = make(op, dtype=dtype)
        for options in OPTIONS[op]:
            exact = gradients(op, "recurrent_torch", {name: _wide(x) for name, x in inputs.items()}, **options)
            with cpu_library.use_isa(isa):
                found = gradients(op, BACKENDS[op], inputs, **options)
            for name, expected in exact.items():
                assert found[name].dtype == dtype
                assert_close(found[name], expected, bound, f"{dtype}, {options}: {name}")
    large = make(op, dtype=torch.float32)
    large["q"] *= 100
    with cpu_library.use_isa(isa):
        found = gradients(op, BACKENDS[op], large, **OPTIONS[op][0])
    exact = gradients(op, "recurrent_torch", {name: _wide(x) for name, x in large.items()}, **OPTIONS[op][0])
    for name, expected in exact.items():
        assert_close(found[name], expected, 1e-4, name)


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("op", COMPILED)
def test_results_do_not_depend_on_the_number_of_threads(op: str):
    before = torch.get_num_threads()
    for size in SIZES:
        for options in OPTIONS[op]:
            inputs, results = make(op, size, torch.float32), []
            try:
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    results.append(gradients(op, BACKENDS[op], inputs, **options))
            finally:
                torch.set_num_threads(before)
            for other in results[1:]:
                assert all(torch.equal(results[0][name], other[name]) for name in other), (size, options)


@pytest.mark.parametrize("op", COMPILED)
def test_numbers_that_are_not_finite_stay_in_their_sequence(op: str):
    """Also where buffers are used again for the next one, and rows are shorter than vectors."""
    inputs = {name: x[:1] for name, x in make(op, dtype=torch.float32).items()}
    spoiled = {name: x.clone() for name, x in inputs.items()}
    for name in ("q", "k", "v"):
        spoiled[name][:, 5] = torch.nan
    for options in OPTIONS[op]:
        each = (gradients(op, BACKENDS[op], x, **options, cu_seqlens=(0, 70, 75, 150)) for x in (inputs, spoiled))
        clean, found = each
        for name, expected in clean.items():
            assert torch.equal(expected[:, 70:], found[name][:, 70:]), (options, name)
        if op == "attention":
            assert found["output"][:, 69].isnan().any() == ("window" not in options)


@pytest.mark.parametrize("op", COMPILED)
def test_padding_before_the_first_key_is_not_read(op: str):
    inputs, start = make(op, dtype=torch.float32), torch.tensor([40, 150])
    spoiled = {name: x.clone() for name, x in inputs.items()}
    for row in range(2):
        spoiled["k"][row, : start[row]] = torch.nan
        spoiled["v"][row, : start[row]] = torch.inf
    for options in OPTIONS[op]:
        clean, found = (gradients(op, BACKENDS[op], x, **options, key_start=start) for x in (inputs, spoiled))
        assert all(torch.equal(found[name], expected) for name, expected in clean.items())


@pytest.mark.parametrize("op", COMPILED)
def test_inputs_of_several_dtypes(op: str):
    inputs = make(op, dtype=torch.float32)
    expected = gradients(op, "recurrent_torch", inputs, **OPTIONS[op][0])
    for name, dtype in (("v", torch.bfloat16), ("q", torch.float16), ("k", torch.float64)):
        mixed = inputs | {name: inputs[name].to(dtype)}
        found = gradients(op, BACKENDS[op], mixed, **OPTIONS[op][0])
        assert found["output"].dtype == mixed["v"].dtype
        assert found[f"gradient of {name}"].dtype == dtype
        for key, wanted in expected.items():
            assert_close(found[key], wanted, 1e-2, f"{name}: {key}")


@pytest.mark.parametrize("options", [(True, 0, None, None), (False, 0, None, None), (True, 9, [3, 0], None)])
def test_the_custom_operators_keep_torchs_rules(options: tuple[Any, ...]):
    """Those of the other operation are checked with all backends of its form."""
    causal, window, start, offsets = options
    if not ISAS:
        return
    q, k, v = (x.repeat(2, 1, 1, 1) for x in make("attention", "more_keys", torch.float32).values())
    key_start = None if start is None else torch.tensor(start)
    inputs = AttentionInputs(q, k, v, causal, window, 0.5, offsets, key_start)
    leaves = inputs.replace(**{name: x.clone().requires_grad_() for name, x in (("q", q), ("k", k), ("v", v))})
    torch.library.opcheck(chunk_cpp.operators.outputs.operator, leaves.values())
    o, log_sum = chunk_cpp.operators.outputs(inputs)
    needed = [name in ("q", "k", "v") for name in inputs.__match_args__]
    upstream = o, log_sum, torch.randn_like(o), needed
    torch.library.opcheck(chunk_cpp.operators.outputs.gradient, (*inputs.values(), *upstream))


@pytest.mark.parametrize("op", COMPILED)
def test_torch_compile_sees_one_graph(op: str):
    inputs = make(op, dtype=torch.float32)
    function = lambda **leaves: getattr(ops, op)(**leaves, **OPTIONS[op][0], backend=BACKENDS[op])  # noqa: E731
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), function(**inputs))
