"""The compiled linear map of a few rows, and the layer that takes it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch.layers.modules.linear import Linear
from seqarch.ops.native import cpu_library, linear
from seqarch.testing import assert_close

BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float64: 1e-14}


@pytest.fixture(params=cpu_library.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each instruction set in turn."""
    with cpu_library.use_isa(request.param):
        yield


def make(rows: int, depth: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, 1, depth).to(dtype), torch.randn(width, depth).to(dtype), torch.randn(width).to(dtype)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", BOUNDS)
def test_every_instruction_set_equals_float64(dtype: torch.dtype):
    for rows, depth, width in ((1, 64, 7), (2, 63, 5), (3, 257, 64), (4, 15, 3), (5, 130, 2), (9, 1, 1)):
        x, weight, bias = make(rows, depth, width, dtype)
        for b in (bias, None):
            expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
            assert_close(linear.linear(x, weight, b), expected, BOUNDS[dtype], f"{rows} {depth} {width}")


@pytest.mark.usefixtures("isa")
def test_strided_inputs_and_empty_ones():
    x, weight, bias = make(3, 40, 24)
    expected = F.linear(x, weight, bias)
    wide = torch.stack((x, x), dim=-1)[..., 0], torch.stack((weight, weight), dim=-1)[..., 0]
    assert_close(linear.linear(*wide, bias), expected, 1e-6)
    for rows, depth, width in ((0, 4, 3), (2, 0, 3), (2, 4, 0)):
        inputs = make(rows, depth, width)
        torch.testing.assert_close(linear.linear(*inputs), F.linear(*inputs))


@pytest.mark.usefixtures("isa")
def test_the_result_does_not_depend_on_the_number_of_threads():
    inputs, before, results = make(3, 1024, 1100), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(linear.linear(*inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.usefixtures("isa")
def test_the_operator_keeps_torchs_rules():
    x, weight, bias = make(2, 33, 5)
    torch.library.opcheck(linear.linear, (x, weight, bias))
    torch.library.opcheck(linear.linear, (x, weight, None))


@pytest.mark.usefixtures("isa")
def test_the_layer_takes_the_kernel_where_it_serves(monkeypatch: pytest.MonkeyPatch):
    layer, calls = Linear(512, 256), []
    kernel = linear.linear
    monkeypatch.setattr(linear, "linear", lambda *inputs: calls.append(1) or kernel(*inputs))

    def taken(layer: Linear, x: Tensor) -> bool:
        calls.clear()
        assert_close(layer(x), F.linear(x, layer.weight, layer.bias), BOUNDS[layer.weight.dtype])
        return bool(calls)

    x = torch.randn(2, 2, 512)
    assert not taken(layer, x)  # its weights take gradients
    with torch.no_grad():
        assert taken(layer, x)
        assert taken(Linear(512, 256, bias=False), x[:1, :1])
        assert taken(Linear(512, 256).bfloat16(), x.bfloat16())
        assert not taken(layer, torch.randn(5, 512))  # too many rows
        assert not taken(Linear(512, 255), x)  # too few weights
        assert not taken(Linear(512, 256).double(), x.double())
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert taken(layer, x)
        torch.testing.assert_close(compiled(x), layer(x))
        with torch.autocast("cpu"):
            calls.clear()
            assert layer(x).dtype == torch.bfloat16
            assert not calls
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(cpu_library, "_reason", "it was never built")
        assert not taken(layer, x)


def test_a_width_that_does_not_fit_is_torchs_error():
    layer = Linear(512, 256)
    with torch.no_grad():
        for width in (256, 1024):
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                layer(torch.randn(1, width))
