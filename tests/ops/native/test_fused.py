"""Norms, gated units and rotary positions by compiled kernels are torch's, with their derivatives of any order."""

import pytest
import torch
from torch import Tensor

from seqarch.ops.native import cpu_library, fused
from seqarch.ops.native.fused import LEAST_NUMBERS, Norm

TOLERANCE = {torch.float64: {"rtol": 1e-9, "atol": 1e-11}, torch.float32: {"rtol": 2e-4, "atol": 2e-5}}
GATES = {
    "no gate": Norm(1e-5, factor=0.7),
    "silu before": Norm(1e-5, "silu", gate_first=True),
    "silu after": Norm(1e-5, "silu", factor=0.7),
    "sigmoid before": Norm(1e-5, "sigmoid", gate_first=True, factor=-2.0),
    "sigmoid after": Norm(1e-5, "sigmoid"),
}
SHAPES = {"rows": (300, 40), "tokens": (3, 40, 96), "heads": (2, 50, 4, 17), "five axes": (2, 3, 5, 4, 40)}


@pytest.fixture(params=cpu_library.supported_isas() or [None])
def isa(request):
    if request.param is None:
        pytest.skip(str(cpu_library.unavailable()))
    with cpu_library.use_isa(request.param):
        yield request.param


def drawn(*shape: int, dtype: torch.dtype = torch.float64, strided: bool = False) -> Tensor:
    """Normal numbers that need gradients; ``strided``: with gaps after the last axis, as a part of a projection has."""
    if strided:
        shape = (*shape[:-1], shape[-1] + 5)
    leaf = torch.randn(*shape, dtype=dtype)
    return (leaf[..., 2:-3] if strided else leaf).requires_grad_()


def compare(own: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    tolerance = TOLERANCE[own.dtype]
    torch.testing.assert_close(own, expected, **tolerance)
    upstream = torch.randn_like(own)
    found = [torch.autograd.grad(each, inputs, upstream) for each in (own, expected)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_are_torchs(isa: str, shape: str, gate: str, dtype: torch.dtype):
    torch.manual_seed(0)
    sizes, norm = SHAPES[shape], GATES[gate]
    for strided, weighted, groups in ((False, True, 1), (True, True, 1), (True, False, 1), (False, True, 4)):
        if sizes[-1] % groups:
            continue
        x = drawn(*sizes, dtype=dtype, strided=strided)
        z = None if norm.activation is None else drawn(*sizes, dtype=dtype, strided=strided)
        weight = drawn(sizes[-1], dtype=dtype) if weighted else None
        own = norm._replace(groups=groups)
        expected = fused._norm_by_torch(x, z, weight, own)
        compare(fused.rms_norm(x, weight, own, z), expected, [each for each in (x, z, weight) if each is not None])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gated_units_are_torchs(isa: str, dtype: torch.dtype):
    torch.manual_seed(0)
    for strided in (False, True):
        x = drawn(3, 40, 38, dtype=dtype, strided=strided)
        compare(fused.swiglu(x), fused._swiglu_by_torch(x), [x])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("half", [0, 20, 24])
def test_rotations_are_torchs(isa: str, half: int, rows: int, dtype: torch.dtype):
    torch.manual_seed(0)
    x = drawn(3, 40, 2, 48, dtype=dtype, strided=True)
    tables = [torch.randn(rows, 40, half, dtype=dtype) for _ in range(2)]
    compare(fused.rotate(x, *tables), fused.rotate_by_torch(x, *tables), [x])


def test_extreme_numbers(isa: str):
    """Rows of zeros, gates that no exponential holds, and numbers whose squares are all but infinite."""
    x = torch.zeros(3, 64, requires_grad=True)
    y = fused.rms_norm(x, None, Norm(1e-6))
    assert not y.any()
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(dx, torch.full_like(dx, 1e3))
    gates = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4]).repeat(2, 1).requires_grad_()
    compare(
        fused.swiglu(torch.cat([gates, gates], dim=-1)), fused._swiglu_by_torch(torch.cat([gates, gates], -1)), [gates]
    )
    large = torch.full((2, 16), 1e18)
    torch.testing.assert_close(fused.rms_norm(large, None, Norm(1e-6)), torch.ones(2, 16))


CALLS = {
    "norm": lambda x: fused.rms_norm(x, None, Norm(1e-5)),
    "gated norm": lambda x: fused.rms_norm(x, x[0, 0] + 1, Norm(1e-5, "silu"), 2 * x),
    "gated unit": fused.swiglu,
    "rotation": lambda x: fused.rotate(
        x.unsqueeze(2), torch.full((1, 3, 3), 0.6, dtype=x.dtype), torch.full((1, 3, 3), 0.8, dtype=x.dtype)
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_derivatives_of_any_order(isa: str, call: str):
    torch.manual_seed(0)
    x = drawn(2, 3, 6)
    assert torch.autograd.gradcheck(CALLS[call], x, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(CALLS[call], x)


@pytest.mark.parametrize("call", CALLS)
def test_results_do_not_depend_on_threads(isa: str, call: str):
    torch.manual_seed(0)
    x, before, found = torch.randn(64, 3, 512, requires_grad=True), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y = CALLS[call](x)
            found.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_only_plain_tensors_on_a_cpu_are_served(isa: str):
    x = torch.randn(2, LEAST_NUMBERS)
    assert fused.serves(x)
    assert fused.serves(x, None, x)
    assert not fused.serves(x[:1, 1:])
    assert not fused.serves(x.bfloat16())
    assert not fused.serves(x, x.double())
    assert not fused.serves(x.to("meta"))
    with torch.autocast("cpu"):
        assert not fused.serves(x)
    seen = []
    torch.func.grad(lambda t: (seen.append(fused.serves(t)), t.sum())[1])(x)
    assert seen == [False]
