"""Numbers too small for a normal one are 0 to the compiled kernels: closed gates and states that decay stay fast."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from seqarch import ops
from seqarch.layers.modules.quantized import WeightFormat
from seqarch.ops.native import cpu_library, fused, quantized_linear
from seqarch.ops.native.linear import linear
from tests.ops.test_not_finite import CASES
from tests.support.backends import available
from tests.support.one_token import make
from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(
    cpu_library.unavailable() is not None or platform.machine() not in ("x86_64", "AMD64"),
    reason="the compiled kernels take denormal numbers for 0 on x86",
)
SMALL = 2.0**-135
"""Times numbers near 1: denormal in float32."""


NONE_ARISE = {"rnn"}
"""Cases whose kernels make no denormal number of such inputs: its tanh is 0 near 0."""


def compiled(op: str) -> str | None:
    """The compiled backend of an operation, if it has one."""
    return next((name for name in available(op) if name.endswith("_cpp")), None)


def has_denormals(x: Tensor) -> bool:
    return bool(((x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)).any())


def of_small_numbers(run: Callable[[], Any], inputs: Mapping[str, Tensor]) -> set[str]:
    """Which results, and which gradients from ones, hold denormal numbers that were computed and not given."""
    found = run()
    outputs = [each for each in (found if isinstance(found, tuple) else (found,)) if isinstance(each, Tensor)]
    gradients = torch.autograd.grad(outputs[0].sum(), [*inputs.values()], allow_unused=True)
    named = {f"result {i}": each for i, each in enumerate(outputs)} | dict(zip(inputs, gradients, strict=True))
    given = torch.cat([each.detach().flatten() for each in inputs.values()])
    computed = {name: each[~torch.isin(each, given)] for name, each in named.items() if each is not None}
    return {name for name, each in computed.items() if has_denormals(each)}


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("case", [name for name, (op, *_) in CASES.items() if compiled(op) and name not in NONE_ARISE])
def test_results_and_gradients_of_small_numbers_are_0_or_normal(case: str):
    """Of what results are linear in; torch's form has denormal ones, so there are some to be flushed."""
    op, make, more, _ = CASES[case]
    tensors, small = make(2), "x" if "x" in make(2) else "v"
    tensors[small] = tensors[small] * SMALL
    inputs = {name: x.requires_grad_() for name, x in tensors.items()}

    def run(backend: str | None) -> Callable[[], Any]:
        return lambda: getattr(ops, op)(**inputs, **more(2), backend=backend)

    expected = of_small_numbers(run(next(each for each in available(op) if each.endswith("_torch"))), inputs)
    assert "result 0" in expected
    assert expected & inputs.keys()
    assert not of_small_numbers(run(compiled(op)), inputs)


@pytest.mark.usefixtures("threads")
def test_so_are_those_of_the_small_kernels():
    x, z = torch.randn(4, 64, 128) * SMALL, torch.randn(4, 64, 128)  # more numbers than starting threads is worth
    angle = torch.rand(64, 64)
    norm = fused.Norm(1.0, "silu")
    inputs = {"x": x.requires_grad_(), "z": z.requires_grad_()}
    for own, by_torch in (
        (lambda: fused.rms_norm(x, None, norm, z), lambda: fused._norm_by_torch(x, z, None, norm)),
        (lambda: fused.swiglu(torch.cat([z, x], -1)), lambda: fused._swiglu_by_torch(torch.cat([z, x], -1))),
        (lambda: fused.rotate(x[:, :, None], angle.cos(), angle.sin()),
         lambda: fused.rotate_by_torch(x[:, :, None], angle.cos(), angle.sin())),
    ):  # fmt: skip
        assert "result 0" in of_small_numbers(by_torch, inputs)
        assert not of_small_numbers(own, inputs)


@pytest.mark.usefixtures("threads")
@torch.no_grad()
def test_so_are_those_of_maps():
    x, weight = torch.randn(2, 1024) * SMALL, torch.randn(1024, 1024)
    assert has_denormals(F.linear(x, weight))
    assert not has_denormals(linear(x, weight, None))
    for name in ("int8", "int4"):
        form = WeightFormat(name, 32)
        codes, scales = form.encode(weight)
        assert has_denormals(F.linear(x, form.decode(codes, scales, torch.float32)))
        assert not has_denormals(quantized_linear.quantized_linear(x, codes, scales, None))


@pytest.mark.usefixtures("threads")
@torch.no_grad()
def test_a_captured_token_leaves_none_in_a_state_that_decays():
    stack = make("gla", width=512)
    _, state = stack(torch.zeros(1, 1, 512))
    small = pytree.tree_map_only(Tensor, lambda x: torch.full_like(x, SMALL), state)
    _, state = stack(torch.zeros(1, 1, 512), small)
    assert not any(has_denormals(x) for x in pytree.tree_leaves(state) if isinstance(x, Tensor))


def test_all_threads_are_started_where_denormals_are_flushed():
    starts = {
        source.name: len(re.findall(r"#pragma omp parallel\b", source.read_text(encoding="utf-8")))
        for source in (ROOT / "csrc" / "cpu").iterdir()
    }
    assert {name: count for name, count in starts.items() if count} == {
        "parallel.h": 3,
        "tape.cpp": 1,
        "transpose.cpp": 1,
    }
