"""The CUDA kernels against the references, through the backends that call them: on a GPU where one is, else emulated.

An emulated kernel runs thread by thread in an order drawn at random (``tests/emulation``), on tensors of the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seqarch import ops
from seqarch.layers import MIXERS
from seqarch.ops import OPS
from seqarch.ops.causal_conv1d import parallel_cuda
from seqarch.ops.causal_conv1d.inputs import CausalConv1dInputs
from seqarch.ops.native import cuda_library
from seqarch.ops.native.cpu_library import LibraryError
from seqarch.ops.selective_scan import OP, chunk_cuda
from seqarch.testing import Case, laws
from tests import emulation
from tests.ops import test_oracles as oracles
from tests.ops.causal_conv1d import test_causal_conv1d as conv
from tests.ops.selective_scan import test_selective_scan as scans
from tests.support.paths import ROOT
from tests.support.surrounded import surrounded

pytestmark = pytest.mark.slow

REAL = cuda_library.unavailable() is None
DEVICE = "cuda" if REAL else "cpu"
HERE = REAL or emulation.compiler() is not None
CONVOLUTIONS = conv.CASES if HERE else {}
WIDE_STATE = {"N": 40, "D": 9}
SCANS = {name: case for name, case in scans.CASES.items() if name != "many_states"} if HERE else {}
LONG: dict[str, Any] = {
    "segments": ({"T": 300, "D": 9}, {}),
    "segments_of_one_state": ({"B": 1, "T": 290, "D": 5, "N": 1, "full": False}, {"scale_input": False}),
    "segments_of_groups": ({"B": 3, "T": 140, "D": 12, "N": 16, "G": 3}, {}),
    "packed_segments": (
        {"B": 1, "T": 700, "D": 5, "sequences": 7},
        {"cu_seqlens": [0, 0, 40, 41, 200, 650, 650, 700]},
    ),
    "packed_segments_with_borders": ({"B": 1, "T": 512, "D": 5, "sequences": 2}, {"cu_seqlens": [0, 256, 512]}),
    "wide_states": (WIDE_STATE, {}),
    "wide_states_segments": ({"T": 150, **WIDE_STATE}, {}),
    "states_of_eight": ({"N": 7, "D": 70}, {}),
    "states_of_thirty": ({"N": 30, "D": 20, "G": 2}, {}),
    "whole_sequences_where_there_are_many": ({"B": 86, "T": 129, "D": 1, "N": 9}, {}),
}
"""Beyond one segment, and lanes that other cases do not have."""


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    with nullcontext() if REAL or not HERE else cuda_library.emulated(emulation.build()):
        yield


def placed(inputs: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    return {name: x.to(DEVICE, dtype) if isinstance(x, Tensor) else x for name, x in inputs.items()}


def back(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.cpu() for name, x in found.items()}


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_equal_the_definition(case: str, activation: str | None):
    shape, offsets = CONVOLUTIONS[case]
    inputs, options = conv.make(**shape), {"activation": activation, "cu_seqlens": offsets}
    found = conv.gradients(lambda leaves: conv.convolve("parallel_cuda", leaves, **options), placed(inputs))
    expected = conv.gradients(lambda leaves: conv.definition(**leaves, **options), inputs)
    torch.testing.assert_close(back(found), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", [*SCANS, *(LONG if HERE else ())])
def test_scans_equal_the_reference(case: str):
    sizes, options = (SCANS | LONG)[case]
    inputs = scans.make(**sizes)
    found = scans.gradients(scans.scan("chunk_cuda", **options), placed(inputs))
    expected = scans.gradients(scans.scan("recurrent_torch", **options), inputs)
    unreached = {name: torch.zeros_like(value) for name, value in back(found).items()}  # by the reference, of no token
    torch.testing.assert_close(back(found), unreached | expected, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        y, state = scans.scan("chunk_cuda", **options)(placed(inputs))
    torch.testing.assert_close((y, state), (found["y"], found["state"]), rtol=1e-13, atol=1e-13)


BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4} if HERE else {}


@pytest.mark.parametrize("states", [1, 16, 70])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_scans_in_lower_precision(dtype: torch.dtype, states: int):
    inputs = scans.make(T=150, D=33, N=states, dtype=dtype)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    expected = scans.gradients(scans.scan("chunk_torch"), wide)
    for name, value in scans.gradients(scans.scan("chunk_cuda"), placed(inputs)).items():
        assert value.dtype == (torch.float32 if name in ("state", "dstate") else dtype)
        assert scans.relative_error(value.cpu(), expected[name]) < BOUNDS[dtype], name


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_convolutions_in_lower_precision(dtype: torch.dtype):
    inputs = conv.make(T=100, D=37, dtype=dtype)
    wide = {k: v.double() for k, v in inputs.items() if v is not None}
    found = conv.gradients(lambda leaves: conv.convolve("parallel_cuda", leaves, activation="silu"), placed(inputs))
    expected = conv.gradients(lambda leaves: conv.convolve("parallel_torch", leaves, activation="silu"), wide)
    for name, value in found.items():
        assert value.dtype == dtype
        assert conv.relative_error(value.cpu(), expected[name]) < BOUNDS[dtype], name


@pytest.mark.parametrize("record", ["causal_conv1d", "selective_scan"] if HERE and not REAL else ())
def test_oracles(record: str):
    for dtype, bound in oracles.BOUND.items():
        backend = "parallel_cuda" if record == "causal_conv1d" else "chunk_cuda"
        oracles.test_values_and_gradients(record, backend, DEVICE, dtype, bound)


@pytest.mark.parametrize("full", [False, True] if HERE else ())
def test_each_activation_has_a_dtype_of_its_own(full: bool):
    inputs = scans.make(D=20, full=full)
    dtypes = {"x": torch.bfloat16, "dt": torch.float16, "B": torch.bfloat16, "C": torch.float32, "z": torch.float16}
    kept = {name: dtype for name, dtype in dtypes.items() if name in inputs}
    for wide, others in ((torch.float64, set()), (torch.float32, inputs.keys() - kept.keys() - {"dt_softplus"})):
        mixed = inputs | {name: inputs[name].to(dtype) for name, dtype in kept.items()}
        mixed |= {name: inputs[name].float() for name in others}
        exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in mixed.items()}
        found = scans.gradients(scans.scan("chunk_cuda"), placed(mixed))
        expected = scans.gradients(scans.scan("chunk_torch"), exact)
        for name, value in found.items():
            assert value.dtype == (wide if name == "state" else mixed["x" if name == "y" else name[1:]].dtype), name
            assert scans.relative_error(value.cpu(), expected[name]) < 5e-3, name


def test_decays_of_0_and_1():
    """dt A from 0 to -inf in one sequence; what is forgotten is forgotten wholly."""
    steps = torch.tensor([0.0, 1e-9, 1.0, 80.0, 127.5, 1e4, 1e30, float("inf")])
    for states in (1, 2, 5, 16) if HERE else ():
        inputs = scans.make(T=8, D=4, N=states, full=False, dtype=torch.float32)
        inputs |= {"dt": steps[None, :, None].expand(2, 8, 4), "A": torch.full((4, states), -1.0)}
        found = scans.gradients(scans.scan("chunk_cuda", scale_input=False), placed(inputs))
        wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        expected = scans.gradients(scans.scan("recurrent_torch", scale_input=False), wide)
        for name in found.keys() - {"dA"}:  # inf times 0 in both
            assert scans.relative_error(found[name].cpu(), expected[name]) < 1e-6, (states, name)
        at_once = inputs | {"A": torch.full((4, states), -torch.inf), "dt": torch.ones(2, 8, 4)}
        forgotten = back(scans.gradients(scans.scan("chunk_cuda"), placed(at_once)))
        assert torch.equal(forgotten["state"], inputs["x"][:, -1, :, None] * inputs["B"][:, -1, None])
        assert all(value.isfinite().all() for value in forgotten.values())


def test_nan_and_inf_stay_in_their_channel_and_sequence():
    for _ in range(HERE):
        inputs = scans.make(B=1, T=300, D=6, N=16, sequences=2, dtype=torch.float32)
        inputs["x"][0, 131, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        y, _ = scans.scan("chunk_cuda", cu_seqlens=[0, 200, 300])(placed(inputs))
        expected = torch.ones(1, 300, 6, dtype=torch.bool)
        expected[0, 131:200, :3] = False
        assert torch.equal(y.isfinite().cpu(), expected)
        convolved, _ = conv.convolve("parallel_cuda", placed(conv.make(B=1, T=300, D=6) | {"x": inputs["x"].double()}))
        assert torch.equal(convolved.isfinite().all(2).cpu()[0], (torch.arange(300) - 132.5).abs() > 2)


def test_nothing_is_read_beyond_the_tensors():
    for _ in range(HERE):
        inputs = placed(scans.make(T=37, D=10, N=5, G=2))
        around = inputs | {name: surrounded(inputs[name]) for name in ("x", "dt", "B", "C", "z")}
        plain, found = (scans.gradients(scans.scan("chunk_cuda"), each) for each in (inputs, around))
        assert all(torch.equal(plain[name], found[name]) for name in plain)
        rows = placed(conv.make(T=37, D=10))
        plain, found = (conv.convolve("parallel_cuda", each) for each in (rows, rows | {"x": surrounded(rows["x"])}))
        assert torch.equal(plain[0], found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if HERE else (), ids=str)
def test_wide_loads_and_single_ones_agree(dtype: torch.dtype):
    """The same numbers at places where four lie aligned, and one element further."""
    inputs = placed(scans.make(T=20, D=8, N=4, dtype=dtype))
    shifted = {
        name: x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x) if isinstance(x, Tensor) else x
        for name, x in inputs.items()
    }
    plain, found = (scans.gradients(scans.scan("chunk_cuda"), each) for each in (inputs, shifted))
    assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_results_do_not_depend_on_the_order_of_threads():
    """Of which each run draws another, emulated; and on a GPU has another."""
    for _ in range(HERE):
        inputs = placed(scans.make(T=300, D=70, N=16, dtype=torch.float32))
        first, second = (scans.gradients(scans.scan("chunk_cuda"), inputs) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        rows = placed(conv.make(T=200, D=70, dtype=torch.float32))
        first, second = (conv.gradients(lambda leaves: conv.convolve("parallel_cuda", leaves), rows) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("op", ["causal_conv1d", "selective_scan"] if HERE and not REAL else ())
def test_offsets_beyond_32_bits(op: str, tmp_path: Path):
    """66 rows that lie 2^25 numbers apart, in a sparse file."""
    far = torch.from_file(str(tmp_path / "rows"), shared=True, size=66 * 2**25, dtype=torch.float32)
    far = far.as_strided((1, 66, 5), (66 * 2**25, 2**25, 1))
    if op == "causal_conv1d":
        inputs = conv.make(B=1, T=66, dtype=torch.float32)
        plain, found = (
            conv.convolve("parallel_cuda", inputs | {"x": x}) for x in (inputs["x"], far.copy_(inputs["x"]))
        )
    else:
        inputs = scans.make(B=1, T=66, D=5, dtype=torch.float32)
        plain, found = (scans.scan("chunk_cuda")(inputs | {"x": x}) for x in (inputs["x"], far.copy_(inputs["x"])))
    assert torch.equal(plain[0], found[0])


@pytest.mark.parametrize("offsets", [None, [0, 3, 3, 7]] if HERE else ())
def test_the_custom_operators_keep_torchs_rules(offsets: list[int] | None):
    packed = {} if offsets is None else {"B": 1, "sequences": 3}
    inputs = placed(scans.make(T=7, D=5, dtype=torch.float32, **packed))
    scan = (*OP.inputs(**inputs, cu_seqlens=offsets).values(), True)
    rows = (*placed(conv.make(dtype=torch.float32, **packed)).values(), True, offsets)
    for kernels, plain in ((chunk_cuda.KERNELS, scan), (parallel_cuda.KERNELS, rows)):
        operator = kernels.operator
        leaves = [m.clone().requires_grad_() if isinstance(m, Tensor) else m for m in plain]
        torch.library.opcheck(operator.operator, tuple(leaves))
        results = list(operator.operator(*plain))
        kept, needed = results[2:], [isinstance(m, Tensor) for m in plain]
        torch.library.opcheck(operator.gradient, (*plain, *kept, *results[:2], needed))


def test_torch_compile_sees_one_graph():
    for _ in range(HERE):
        inputs = placed(scans.make(T=9, D=5, dtype=torch.float32))
        expected = scans.gradients(scans.scan("chunk_cuda"), inputs)
        compiled = torch.compile(scans.scan("chunk_cuda"), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(scans.gradients(compiled, inputs), expected)


LAWS = [("mamba", "selective_scan", "chunk_cuda"), ("mamba", "causal_conv1d", "parallel_cuda"),
        ("rg_lru", "selective_scan", "chunk_cuda")]  # fmt: skip


@pytest.mark.parametrize("law", [laws.packed, laws.split, laws.gradients, laws.lengths], ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", LAWS if HERE and not REAL else (), ids=str)
def test_mixers_obey_the_laws_on_them(case: tuple[str, str, str], law: Any):
    mixer, op, backend = case
    law(Case(MIXERS[mixer], op, backend))


def test_what_the_kernels_do_not_support():
    inputs = placed(scans.make(T=2, N=129, D=2, full=False, dtype=torch.float32))
    for _ in range(HERE):
        unsupported = OPS["selective_scan"].backends["chunk_cuda"].unsupported
        assert unsupported(OP.inputs(**inputs)) == "N is 129, expected at most 128 with sums in torch.float32"
        meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in scans.make().items()}
        assert unsupported(OP.inputs(**meta)) == f"x is on meta, expected {DEVICE}"


def test_return_codes_and_failed_launches_become_errors():
    for _ in range(HERE):
        x, state = torch.ones(1, 2, 3, device=DEVICE), torch.ones(1, 8, 3, device=DEVICE)
        with pytest.raises(ValueError, match="causal_conv1d_forward returned 1: an argument"):
            parallel_cuda.run(CausalConv1dInputs(x, torch.ones(3, 9, device=DEVICE), None, state, False, None))
        wide = placed(scans.make(B=1, T=1, D=4 * 65536, N=65, full=False, dtype=torch.float32))
        with pytest.raises(RuntimeError, match=r"selective_scan_forward could not be launched: invalid"):
            scans.scan("chunk_cuda")(wide)


def test_a_machine_without_library_or_device_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(cuda_library, "_emulated", False)
    monkeypatch.setattr(cuda_library, "_reason", None)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert cuda_library.unavailable() == "there is no CUDA device"
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
        x = torch.empty(1).as_subclass(OnCuda)
        assert cuda_library.unsupported(x=x) == "cuda:0 has compute capability 7.5, expected 8.0 or newer"
    monkeypatch.setattr(cuda_library, "_reason", cuda_library.MISSING)
    monkeypatch.setattr(cuda_library, "_library", None)
    reasons = ops.explain("selective_scan", **scans.make()).reasons
    assert "SEQARCH_CUDA=ON, where nvcc is" in reasons["chunk_cuda"]
    with pytest.raises(ops.BackendError, match="is built on request"):
        scans.scan("chunk_cuda")(scans.make())
    with pytest.raises(LibraryError, match="is built on request"):
        cuda_library.library()
    (tmp_path / "broken.so").write_text("not a library")
    with pytest.raises(LibraryError, match="cannot be loaded"):
        cuda_library.open_library(tmp_path / "broken.so")
    monkeypatch.setattr(cuda_library, "INTERFACE", -1)
    for _ in range(HERE and not REAL):
        with pytest.raises(LibraryError, match="expected -1"):
            cuda_library.open_library(emulation.build())


class OnCuda(Tensor):
    """A tensor that says that it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda:0")


def test_the_library_agrees_with_its_header():
    header = (ROOT / "csrc" / "include" / "seqarch_cuda.h").read_text()
    wide, double = cuda_library.STATES[torch.float32], cuda_library.STATES[torch.float64]
    assert f"#define SEQARCH_CUDA_INTERFACE {cuda_library.INTERFACE}\n" in header
    assert f"SEQARCH_CUDA_ERROR = {cuda_library.FAILED} " in header
    constants = f"CHUNK = {cuda_library.CHUNK}, SEQARCH_CUDA_STATES = {wide}, SEQARCH_CUDA_STATES64 = {double} "
    assert f"enum {{ SEQARCH_CUDA_{constants}}}" in header
