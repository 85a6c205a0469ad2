"""The causal convolution against its definition, on every backend and instruction set that runs here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from seqarch import ops
from seqarch.ops.causal_conv1d import flops, parallel_cpp
from seqarch.ops.native import cpu_library
from tests.support.paths import ORACLES

ORACLE = ORACLES / "causal_conv1d.safetensors"
ISAS = cpu_library.supported_isas()
IMPLEMENTATIONS = ["parallel_torch", *(f"parallel_cpp-{isa}" for isa in ISAS)]
Inputs = dict[str, Tensor | None]


@pytest.fixture(params=IMPLEMENTATIONS)
def backend(request) -> Iterator[str]:
    """A backend's name; within the test its kernels are those of one instruction set, forward and backward."""
    name, _, isa = request.param.partition("-")
    with cpu_library.use_isa(isa) if isa else nullcontext():
        yield name


def convolve(backend: str, inputs: Inputs, **options) -> tuple[Tensor, Tensor]:
    return ops.causal_conv1d(**inputs, backend=backend, **options)  # type: ignore[arg-type]


def definition(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, activation=None, cu_seqlens=None
) -> tuple[Tensor, Tensor]:
    """Number by number, as the equation reads."""
    width, offsets = weight.shape[1], cu_seqlens or [0, x.shape[1]]
    outputs, finals = [], []
    for row, (start, end) in enumerate(pairwise(offsets)):
        rows = slice(row, row + 1) if cu_seqlens else slice(None)
        first = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if state is None else state[rows]
        h = torch.cat([first, x[:, start:end]], 1)
        for t in range(end - start):
            z = sum(weight[:, w] * h[:, t + w] for w in range(width)) + (0 if bias is None else bias)
            outputs.append(z / (1 + torch.exp(-z)) if activation == "silu" else z)
        finals.append(h[:, end - start :])
    y = torch.stack(outputs, 1) if outputs else x * weight[:, 0] + (0 if bias is None else bias)
    return y, torch.cat(finals)


def make(B=2, T=7, D=5, W=4, sequences=None, bias=True, state=True, dtype=torch.float64) -> Inputs:
    return {
        "x": torch.randn(B, T, D).to(dtype),
        "weight": torch.randn(D, W).to(dtype),
        "bias": torch.randn(D).to(dtype) if bias else None,
        "state": torch.randn(sequences or B, W - 1, D).to(dtype) if state else None,
    }


def gradients(function, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs, and the gradients of a weighted sum of both of them."""
    leaves = {k: None if v is None else v.detach().clone().requires_grad_() for k, v in inputs.items()}
    y, state = function(leaves)
    weights = [torch.linspace(-1, 2, part.numel(), dtype=part.dtype).view_as(part) for part in (y, state)]
    ((y * weights[0]).sum() + (state * weights[1]).sum()).backward()
    grads = {f"d{k}": v.grad for k, v in leaves.items() if v is not None}
    return {"y": y.detach(), "state": state.detach(), **grads}


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


SHAPES = {
    "plain": {},
    "no_bias": {"bias": False},
    "no_state": {"state": False},
    "bare": {"bias": False, "state": False},
    **{f"width_{W}": {"W": W, "T": 11} for W in range(2, 9)},
    **{f"length_{T}": {"T": T} for T in (1, 2, 63, 64, 65, 130, 300)},
    "shorter_than_the_window": {"T": 3, "W": 8},
    "nothing_in_time": {"T": 0},
    "nothing_in_batch": {"B": 0},
    "no_channels": {"D": 0},
    "one_channel": {"D": 1, "T": 9},
    "many_channels": {"D": 517, "T": 131, "B": 1},
}
PACKED = {
    "packed": [0, 3, 10],
    "packed_with_empty_sequences": [0, 0, 3, 3, 4, 140, 140],
    "packed_alone": [0, 5],
    "packed_nothing": [0, 0],
}
CASES = {name: (shape, None) for name, shape in SHAPES.items()} | {
    name: ({"B": 1, "T": offsets[-1], "sequences": len(offsets) - 1}, offsets) for name, offsets in PACKED.items()
}


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_definition(backend, case, activation):
    shape, offsets = CASES[case]
    inputs, options = make(**shape), {"activation": activation, "cu_seqlens": offsets}
    found = gradients(lambda leaves: convolve(backend, leaves, **options), inputs)
    expected = gradients(lambda leaves: definition(**leaves, **options), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_oracle(backend):
    record = load_file(ORACLE)
    names = ("x", "weight", "bias", "state")
    inputs = {name: record[f"in.{name}"].requires_grad_() for name in names}
    y, state = convolve(backend, inputs, activation="silu")
    ((y * record["cotangent.y"]).sum() + (state * record["cotangent.state"]).sum()).backward()
    assert relative_error(y, record["out.y"]) < 1e-6
    assert torch.equal(state, record["out.state"])
    for name in names:
        assert relative_error(inputs[name].grad, record[f"grad.{name}"]) < 1e-6, name


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-7), (torch.bfloat16, 5e-3)])
def test_error_in_lower_precision(backend, dtype, bound):
    inputs = make(B=2, T=300, D=300, dtype=dtype)
    wide = {k: v.double() for k, v in inputs.items()}
    found = gradients(lambda leaves: convolve(backend, leaves, activation="silu"), inputs)
    expected = gradients(lambda leaves: convolve("parallel_torch", leaves, activation="silu"), wide)
    for name, value in found.items():
        assert value.dtype == dtype
        assert relative_error(value, expected[name]) < bound, name


def test_splitting_anywhere_changes_nothing(backend):
    inputs = make(T=130)
    y, last = convolve(backend, inputs, activation="silu")
    for cut in (0, 1, 2, 3, 64, 129, 130):
        before, state = convolve(backend, inputs | {"x": inputs["x"][:, :cut]}, activation="silu")
        rest = inputs | {"x": inputs["x"][:, cut:], "state": state}
        after, end = convolve(backend, rest, activation="silu")
        torch.testing.assert_close(torch.cat([before, after], 1), y, rtol=1e-13, atol=1e-13)
        assert torch.equal(end, last)


def test_strides_do_not_matter(backend):
    inputs = make(B=3, T=20, D=24)
    views = {
        "channels_first": lambda v: v.transpose(1, 2).contiguous().transpose(1, 2),
        "time_first": lambda v: v.transpose(0, 1).contiguous().transpose(0, 1),
        "a_part_of_wider_rows": lambda v: torch.cat([v, v + 1], 2)[..., : v.shape[2]],
        "every_second_channel": lambda v: v.repeat_interleave(2, 2)[..., ::2],
    }
    expected = gradients(lambda leaves: convolve(backend, leaves), inputs)
    for name, view in views.items():

        def through_views(leaves, view=view):
            strided = {"x": view(leaves["x"]), "weight": leaves["weight"].t().contiguous().t(), "bias": leaves["bias"]}
            y, state = convolve(backend, strided | {"state": view(leaves["state"])})
            return view(y), view(state)

        found = gradients(through_views, inputs)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")


def test_gradients_that_are_expanded_or_absent(backend):
    inputs = {k: v.requires_grad_() for k, v in make().items()}
    y, state = convolve(backend, inputs)
    from_sum = torch.autograd.grad(y.sum(), list(inputs.values()), retain_graph=True)
    from_ones = torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y), retain_graph=True)
    torch.testing.assert_close(from_sum, from_ones)
    (of_x,) = torch.autograd.grad(state.sum(), [inputs["x"]])
    assert of_x.sum(dim=(0, 2)).tolist() == [0, 0, 0, 0, 10, 10, 10]


def test_gradcheck(backend):
    inputs = [v.requires_grad_() for v in make(B=2, T=5, D=3, W=3).values()]

    def function(x, weight, bias, state):
        return convolve(backend, {"x": x, "weight": weight, "bias": bias, "state": state}, activation="silu")

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_large_and_special_numbers(backend, dtype):
    x = torch.tensor([-1e30, -200.0, -80.0, 80.0, 200.0, 1e30], dtype=dtype)[None, None].expand(1, 1, 6)
    identity = {"weight": torch.tensor([[0.0, 1.0]], dtype=dtype).expand(6, 2), "bias": None, "state": None}
    y, _ = convolve(backend, {"x": x, **identity}, activation="silu")
    torch.testing.assert_close(y, torch.nn.functional.silu(x), rtol=1e-2, atol=1e-6)
    special = torch.zeros(1, 6, 4, dtype=dtype)
    special[0, 1, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
    y, _ = convolve(backend, make(B=1, T=6, D=4, W=3, state=False, dtype=dtype) | {"x": special})
    assert y.isfinite().tolist() == [[[not (1 <= t <= 3 and d < 3) for d in range(4)] for t in range(6)]]
    assert y[0, 1:4, 0].isnan().all()


def test_the_compiled_result_does_not_depend_on_the_number_of_threads():
    inputs, before, results = make(B=3, T=300, D=300, dtype=torch.float32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5) if ISAS else ():
            torch.set_num_threads(threads)
            results.append(gradients(lambda leaves: convolve("parallel_cpp", leaves, activation="silu"), inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_the_custom_operators_keep_torchs_rules():
    calls = ((None, {}), ([0, 3, 3, 7], {"B": 1, "sequences": 3}), (None, {"bias": False, "state": False}))
    for offsets, shape in calls if ISAS else ():
        plain = (*make(dtype=torch.float32, **shape).values(), True, offsets)
        leaves = [v.clone().requires_grad_() if isinstance(v, Tensor) else v for v in plain]
        operator = parallel_cpp.KERNELS.operator
        torch.library.opcheck(operator.operator, tuple(leaves))
        results, needed = list(operator.operator(*plain)), [isinstance(v, Tensor) for v in plain]
        torch.library.opcheck(operator.gradient, (*plain, *results, needed))


def test_torch_compile_sees_one_graph():
    inputs = make(dtype=torch.float32)
    for backend in ("auto", "parallel_torch"):

        def call(leaves, backend=backend):
            return ops.causal_conv1d(**leaves, activation="silu", backend=backend)

        expected = gradients(call, inputs)  # first, since the import of a backend cannot be traced
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(gradients(compiled, inputs), expected)


def test_flops_equal_what_is_counted():
    inputs = make(B=3, T=10, D=6, W=4)
    with FlopCounterMode(display=False) as counter:
        convolve("parallel_torch", inputs)
    assert counter.get_total_flops() == flops(10, 6, 4, batch_size=3) == 2 * 3 * 10 * 6 * 4


def wrong(**changes) -> Inputs:
    return make() | changes


BAD = {
    "x_of_two_dimensions": (wrong(x=torch.randn(7, 5)), {}, ValueError, r"x has shape \[7, 5\], expected \[B, T, D\]"),
    "weight_of_other_channels": (wrong(weight=torch.randn(4, 4)), {}, ValueError, r"weight .*D = 5 as in x"),
    "bias_of_other_channels": (wrong(bias=torch.randn(4)), {}, ValueError, r"bias .*D = 5"),
    "width_of_one": (wrong(weight=torch.randn(5, 1)), {}, ValueError, "width 1, expected 2 to 8"),
    "width_of_nine": (wrong(weight=torch.randn(5, 9)), {}, ValueError, "width 9, expected 2 to 8"),
    "state_too_short": (wrong(state=torch.randn(2, 2, 5)), {}, ValueError, r"\[2, 2, 5\], expected \[2, 3, 5\]"),
    "integers": (wrong(x=torch.ones(2, 7, 5, dtype=torch.long)), {}, TypeError, "x has dtype torch.int64"),
    "other_device": (wrong(bias=torch.ones(5, device="meta")), {}, ValueError, "bias is on meta, expected cpu as x"),
    "activation": ({}, {"activation": "swish"}, ValueError, "unknown activation .*'swish'.*silu"),
    "packed_batch": ({}, {"cu_seqlens": [0, 7]}, ValueError, "batch of 1, got a batch of 2"),
    "packed_short": (make(B=1), {"cu_seqlens": [0, 6]}, ValueError, "must end at the length 7, got 6"),
    "packed_decreasing": (make(B=1), {"cu_seqlens": [0, 5, 3, 7]}, ValueError, "must not decrease, got 5 then 3"),
    "backend": ({}, {"backend": "parallel_cp"}, ValueError, "unknown backend .*Did you mean 'parallel_cpp'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        ops.causal_conv1d(**(changes or make()), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x_dtype", "other_dtype", "reason"),
    [(torch.float16, torch.float16, "x has dtype torch.float16"), (torch.float32, torch.float64, "torch.float64 par")],
)
def test_dtypes_that_only_the_reference_serves(x_dtype, other_dtype, reason):
    inputs = make(dtype=other_dtype, state=False)
    inputs["x"] = inputs["x"].to(x_dtype)
    y, state = ops.causal_conv1d(**inputs)  # type: ignore[arg-type]
    assert y.dtype == state.dtype == x_dtype
    with pytest.raises(ops.BackendError, match=reason if ISAS else "not installed"):
        ops.causal_conv1d(**inputs, backend="parallel_cpp")  # type: ignore[arg-type]
