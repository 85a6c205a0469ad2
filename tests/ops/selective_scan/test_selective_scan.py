"""The compiled selective scan against the reference, on every instruction set that runs here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from seqarch import ops
from seqarch.ops.native import cpu_library
from seqarch.ops.selective_scan import OP, chunk_cpp

ISAS = cpu_library.supported_isas()
Inputs = dict[str, Any]
Function = Callable[[Inputs], tuple[Tensor, Tensor]]


def make(
    B: int = 2,
    T: int = 40,
    D: int = 20,
    N: int = 3,
    G: int | None = None,
    sequences: int | None = None,
    full: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """Random inputs; with every option where ``full``."""

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=torch.float64).to(dtype)

    shared = (B, T, N) if G is None else (B, T, G, N)
    inputs = {"x": draw(B, T, D), "dt": draw(B, T, D), "A": -3 * draw(D, N).abs(), "B": draw(*shared)}
    inputs |= {"C": draw(*shared), "dt_softplus": full}
    if full:
        state = draw(sequences or B, D, N).to(torch.promote_types(dtype, torch.float32))
        return inputs | {"D": draw(D), "z": draw(B, T, D), "dt_bias": draw(D), "state": state}
    return inputs | {"dt": inputs["dt"].abs()}


def scan(backend: str, **options: Any) -> Function:
    return lambda inputs: ops.selective_scan(**(inputs | options), backend=backend)


def gradients(function: Function, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs, and the gradients of a weighted sum of both of them."""
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items() if isinstance(v, Tensor)}
    y, state = function(inputs | leaves)
    weights = [torch.linspace(-1, 2, part.numel(), dtype=torch.float64).view_as(part) for part in (y, state)]
    ((y * weights[0]).sum() + (state * weights[1]).sum()).backward()
    grads = {f"d{k}": v.grad for k, v in leaves.items() if v.grad is not None}
    return {"y": y.detach(), "state": state.detach(), **grads}


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "everything": ({}, {}),
    "bare": ({"full": False}, {}),
    "unscaled": ({}, {"scale_input": False}),
    "one_state": ({"N": 1, "D": 70, "full": False}, {"scale_input": False}),
    "sixteen_states": ({"N": 16, "D": 33}, {}),
    "many_states": ({"N": 70, "D": 3}, {}),
    "many_channels": ({"D": 150}, {}),
    "groups": ({"G": 4, "D": 12}, {}),
    "groups_of_several_blocks": ({"G": 2, "D": 150}, {}),
    "a_group_a_channel": ({"G": 5, "D": 5}, {}),
    "packed": ({"B": 1, "T": 75, "sequences": 5}, {"cu_seqlens": [0, 0, 33, 34, 74, 75]}),
    "packed_groups": ({"B": 1, "T": 40, "G": 2, "sequences": 2}, {"cu_seqlens": [0, 33, 40]}),
    "packed_steps": ({"B": 1, "T": 5, "N": 16, "sequences": 3}, {"cu_seqlens": [0, 1, 2, 5]}),
    "nothing_in_time": ({"T": 0}, {}),
    "nothing_in_batch": ({"B": 0}, {}),
    "no_channels": ({"D": 0}, {}),
    "no_states": ({"N": 0}, {}),
    **{f"length_{T}": ({"T": T, "N": 16}, {}) for T in (1, 2, 3, 4, 31, 32, 33, 64, 65)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("isa", ISAS)
def test_values_and_gradients_equal_the_reference(isa: str, case: str):
    sizes, options = CASES[case]
    inputs = make(**sizes)
    expected = gradients(scan("recurrent_torch", **options), inputs)
    with cpu_library.use_isa(isa):
        found = gradients(scan("chunk_cpp", **options), inputs)
        with torch.no_grad():
            y, state = scan("chunk_cpp", **options)(inputs)
    unreached = {name: torch.zeros_like(value) for name, value in found.items()}  # by the reference, without a token
    torch.testing.assert_close(found, unreached | expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close((y, state), (found["y"], found["state"]), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("isa", ISAS)
def test_error_in_lower_precision(isa: str, dtype: torch.dtype, bound: float):
    inputs = make(T=300, D=70, N=16, dtype=dtype)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    expected = gradients(scan("chunk_torch"), wide)
    with cpu_library.use_isa(isa):
        found = gradients(scan("chunk_cpp"), inputs)
    for name, value in found.items():
        assert value.dtype == (torch.float32 if name in ("state", "dstate") else dtype)
        assert relative_error(value, expected[name]) < bound, name


def test_each_activation_has_a_dtype_of_its_own():
    inputs = make(D=70)
    dtypes = {"x": torch.bfloat16, "z": torch.float32, "B": torch.bfloat16, "C": torch.float32, "A": torch.float32}
    mixed = inputs | {name: inputs[name].to(dtype) for name, dtype in dtypes.items()}
    exact = inputs | {name: mixed[name].double() for name in dtypes}
    for _ in ISAS[:1]:
        found, expected = gradients(scan("chunk_cpp"), mixed), gradients(scan("chunk_torch"), exact)
        for name, value in found.items():
            source = mixed["x" if name == "y" else name.removeprefix("d")]
            assert value.dtype == source.dtype, name
            assert relative_error(value, expected[name]) < 5e-3, name  # the gradient of y is rounded as y is


@pytest.mark.parametrize("isa", ISAS)
def test_decays_of_0_and_1(isa: str):
    """dt A from 0 to -inf in one sequence, in float32; what is forgotten is forgotten wholly."""
    inputs = make(T=8, D=4, N=2, full=False, dtype=torch.float32)
    steps = torch.tensor([0.0, 1e-9, 1.0, 80.0, 127.5, 1e4, 1e30, float("inf")])
    inputs |= {"dt": steps[None, :, None].expand(2, 8, 4), "A": torch.full((4, 2), -1.0)}
    with cpu_library.use_isa(isa):
        found = gradients(scan("chunk_cpp", scale_input=False), inputs)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    expected = gradients(scan("recurrent_torch", scale_input=False), wide)
    for name in found.keys() - {"dA"}:  # inf times 0 in both
        assert relative_error(found[name], expected[name]) < 1e-6, name
    at_once = inputs | {"A": torch.full((4, 2), -torch.inf), "dt": torch.ones(2, 8, 4)}
    with cpu_library.use_isa(isa):
        forgotten = gradients(scan("chunk_cpp"), at_once)
    assert torch.equal(forgotten["state"], inputs["x"][:, -1, :, None] * inputs["B"][:, -1, None])
    assert all(value.isfinite().all() for value in forgotten.values())


@pytest.mark.parametrize("isa", ISAS)
def test_nan_and_inf_stay(isa: str):
    inputs = make(B=1, T=6, D=4, N=16, full=False, dtype=torch.float32)
    inputs["x"][0, 1, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    inputs["dt"][0, 3, 3] = torch.nan
    with cpu_library.use_isa(isa):
        y, _ = scan("chunk_cpp")(inputs)
    assert y.isfinite().tolist() == [[[t < 1 if d < 3 else t < 3 for d in range(4)] for t in range(6)]]


def test_the_result_does_not_depend_on_the_number_of_threads():
    inputs, before, results = make(B=3, T=70, D=300, N=16, dtype=torch.float32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5) if ISAS else ():
            torch.set_num_threads(threads)
            results.append(gradients(scan("chunk_cpp"), inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_only_gradients_that_are_asked_for():
    inputs, found = make(T=10), []
    inputs["x"].requires_grad_()
    for backend in ("recurrent_torch", "chunk_cpp" if ISAS else "chunk_torch"):
        y, last = scan(backend)(inputs)
        of_y = torch.autograd.grad(y.sum(), [inputs["x"]], retain_graph=True)
        found.append([*of_y, *torch.autograd.grad(last.sum(), [inputs["x"]])])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_the_operators_keep_torchs_rules():
    operator = chunk_cpp.KERNELS.operator
    packed = {"B": 1, "T": 7, "sequences": 3}
    for sizes, offsets in (({"T": 7}, None), (packed, [0, 3, 3, 7]), ({"T": 7, "full": False}, None)):
        plain = (*OP.inputs(**make(dtype=torch.float32, **sizes), cu_seqlens=offsets).values(), True)
        leaves = [m.clone().requires_grad_() if isinstance(m, Tensor) else m for m in plain]
        for _ in ISAS[:1]:
            torch.library.opcheck(operator.operator, tuple(leaves))
            *results, starts = operator.operator(*plain)
            needed = [isinstance(m, Tensor) for m in plain]
            torch.library.opcheck(operator.gradient, (*plain, starts, *results, needed))


def test_torch_compile_sees_one_graph():
    inputs = make(dtype=torch.float32)
    expected = gradients(scan("auto"), inputs)
    compiled = torch.compile(scan("auto"), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled, inputs), expected)


def test_what_only_torch_serves():
    inputs = {k: v.half() if isinstance(v, Tensor) and k != "state" else v for k, v in make().items()}
    assert ops.selective_scan(**inputs)[0].dtype == torch.float16
    with pytest.raises(ops.BackendError, match="x has dtype torch.float16" if ISAS else "not installed"):
        scan("chunk_cpp")(inputs)
    elsewhere = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in make().items()}
    reason = ops.explain("selective_scan", **elsewhere).reasons["chunk_cpp"]
    assert reason == "x is on meta, expected cpu" or not ISAS


def test_return_codes_become_errors(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunk_cpp.KERNELS, "chunk", 0)
    monkeypatch.setattr(chunk_cpp.KERNELS, "_chunks", lambda *_: 1)
    for isa in ISAS:
        with (
            cpu_library.use_isa(isa),
            pytest.raises(ValueError, match="selective_scan_forward returned 1: an argument"),
        ):
            scan("chunk_cpp")(make())
