"""Numbers too small for a normal one are 0 to the compiled kernels: closed gates and states that decay stay fast."""

from __future__ import annotations

import platform
import re

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from seqarch import ops
from seqarch.ops.native import cpu_library, fused
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


def compiled(op: str) -> str | None:
    """The compiled backend of an operation, if it has one."""
    return next((name for name in available(op) if name.endswith("_cpp")), None)


def has_denormals(x: Tensor) -> bool:
    return bool(((x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)).any())


def check(found: Tensor, *inputs: Tensor) -> None:
    """A result and the gradients from a small one of it."""
    assert not has_denormals(found)
    for gradient in torch.autograd.grad(found, inputs, torch.full_like(found, SMALL)):
        assert not has_denormals(gradient)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", [name for name, (op, *_) in CASES.items() if compiled(op)])
def test_results_and_gradients_of_small_numbers_are_0_or_normal(case: str, threads: int):
    op, make, more, _ = CASES[case]
    tensors = {name: (x * SMALL).requires_grad_() for name, x in make(2).items()}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = getattr(ops, op)(**tensors, **more(2), backend=compiled(op))
        check(found if isinstance(found, Tensor) else found[0], *tensors.values())
    finally:
        torch.set_num_threads(before)


def test_so_are_those_of_the_small_kernels():
    x, z = ((torch.randn(3, 40, 64) * SMALL).requires_grad_() for _ in range(2))
    angle = torch.rand(40, 32)
    check(fused.rms_norm(x, None, fused.Norm(1.0, "silu"), z), x, z)
    check(fused.swiglu(x), x)
    check(fused.rotate(x[:, :, None], angle.cos(), angle.sin()), x)
    with torch.no_grad():
        assert not has_denormals(linear(x[:1, :1], torch.randn(16, 64), None))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_captured_token_leaves_none_in_a_state_that_decays(threads: int):
    stack, before = make("gla", width=512), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            _, state = stack(torch.zeros(1, 1, 512))
            small = pytree.tree_map_only(Tensor, lambda x: torch.full_like(x, SMALL), state)
            _, state = stack(torch.zeros(1, 1, 512), small)
        assert not any(has_denormals(x) for x in pytree.tree_leaves(state) if isinstance(x, Tensor))
    finally:
        torch.set_num_threads(before)


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
