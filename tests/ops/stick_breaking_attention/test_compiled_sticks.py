"""The compiled kernel of stick-breaking attention beyond the common contract: instruction sets, threads, dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seqarch import ops
from seqarch.ops.native import cpu_library
from seqarch.ops.stick_breaking_attention import OP, chunk_cpp
from seqarch.testing import assert_close

ISAS = cpu_library.supported_isas()
pytestmark = pytest.mark.skipif(not ISAS, reason="the compiled library is missing")


def make(
    queries: int, keys: int | None = None, heads: int = 4, groups: int = 2, K: int = 20, V: int = 37, rows: int = 2
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    keys = queries if keys is None else keys
    shapes = {"q": (rows, queries, heads, K), "k": (rows, keys, groups, K), "v": (rows, keys, groups, V)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def gradients(backend: str, given: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Both results, and the gradients of a weighted sum of both."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    o, rest = ops.stick_breaking_attention(**leaves, **options, backend=backend)
    torch.manual_seed(1)
    ((o * torch.randn(o.shape)).sum() + (rest * torch.randn(rest.shape)).sum()).backward()
    found = {"o": o.detach(), "rest": rest.detach()}
    return found | {f"gradient of {name}": x.grad for name, x in leaves.items() if x.grad is not None}


def test_every_instruction_set_equals_the_reference():
    """Of few keys and of many, of one query, of wide and narrow heads, and with sticks that are never used up."""
    cases: list[tuple[dict[str, Tensor], dict[str, Any]]] = [
        (make(131), {}),
        (make(131), {"scale": 0.01}),
        (make(70, heads=6, groups=1, K=3, V=1), {"key_start": torch.tensor([0, 69])}),
        (make(1, 200, heads=2, groups=1), {"scale": 0.05}),
        (make(2, 150, heads=2, groups=2), {"key_start": torch.tensor([140, 150])}),
        (make(200, rows=1), {"cu_seqlens": [0, 1, 1, 66, 200]}),
    ]
    for given, options in cases:
        right = gradients("recurrent_torch", given, **options)
        for isa in ISAS:
            with cpu_library.use_isa(isa):
                found = gradients("chunk_cpp", given, **options)
            for name, expected in right.items():
                assert_close(found[name], expected, 1e-11, f"{isa}, {name}, {options}")


def test_float32_is_within_its_rounding():
    for scale in (0.02, 0.3):
        given = make(150)
        right = gradients("recurrent_torch", given, scale=scale)
        for isa in ISAS:
            with cpu_library.use_isa(isa):
                found = gradients("chunk_cpp", {name: x.float() for name, x in given.items()}, scale=scale)
            for name, expected in right.items():
                assert_close(found[name].double(), expected, 2e-6, f"{isa}, {name}, {scale}")


def test_keys_before_which_nothing_is_left_count_for_nothing():
    """Also where what they hold is not finite: they are not looked at. Their gradients are 0."""
    given = {name: x.float() for name, x in make(300).items()}
    strong = given | {"k": given["k"].abs(), "q": 10 * given["q"].abs()}
    clean = gradients("chunk_cpp", strong)
    assert not clean["rest"][:, 200:].any()
    spoiled = strong | {"v": strong["v"].clone()}
    spoiled["v"][:, :64] = torch.nan
    o, _ = ops.stick_breaking_attention(**spoiled, backend="chunk_cpp")
    assert torch.equal(o[:, 256:], clean["o"][:, 256:])
    key = strong["k"].clone().requires_grad_()
    ops.stick_breaking_attention(strong["q"][:, 256:], key, strong["v"], backend="chunk_cpp")[0].sum().backward()
    assert key.grad is not None
    assert not key.grad[:, :128].any()
    assert key.grad[:, 192:].any()


def test_results_do_not_depend_on_the_number_of_threads():
    before, given, results = torch.get_num_threads(), {n: x.float() for n, x in make(200).items()}, []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(gradients("chunk_cpp", given, scale=0.05))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_inputs_of_several_dtypes():
    given = {name: x.float() for name, x in make(70).items()}
    expected, left = ops.stick_breaking_attention(**given, backend="recurrent_torch")
    for name, dtype in (("v", torch.bfloat16), ("q", torch.float16), ("k", torch.float64)):
        o, rest = ops.stick_breaking_attention(**given | {name: given[name].to(dtype)}, backend="chunk_cpp")
        assert (o.dtype, rest.dtype) == (
            dtype if name == "v" else torch.float32,
            torch.float64 if name == "k" else torch.float32,
        )
        assert_close(o.float(), expected, 1e-2, name)
        assert_close(rest.float(), left, 1e-2, name)
    low = {name: x.bfloat16() for name, x in given.items()}
    exact, _ = ops.stick_breaking_attention(**{name: x.double() for name, x in low.items()})
    assert_close(ops.stick_breaking_attention(**low, backend="chunk_cpp")[0], exact, 0.01)


@pytest.mark.slow
def test_the_custom_operators_keep_torchs_rules():
    given = {name: x.float() for name, x in make(7).items()}
    for start in (None, torch.tensor([0, 3])):
        plain = OP.inputs(**given, scale=0.5, key_start=start).values()
        leaves = [x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in plain]
        torch.library.opcheck(chunk_cpp.operator.operator, tuple(leaves))
        results = list(chunk_cpp.operator.operator(*plain))
        needed = [isinstance(x, Tensor) and x.is_floating_point() for x in plain]
        torch.library.opcheck(chunk_cpp.operator.gradient, (*plain, *results, needed))
