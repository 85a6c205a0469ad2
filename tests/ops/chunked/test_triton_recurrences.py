"""The Triton kernels of the recurrences against the reference: on a CUDA device where there is one, else interpreted.

Interpreted, a tile operation costs what a call of numpy does, so shapes are the smallest that have each feature: two
chunks, the second ragged; several sub-chunks; widths that are no power of two; heads that share keys.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seqarch import ops
from seqarch.ops import OPS
from seqarch.ops.triton import availability
from seqarch.testing import assert_close
from tests.ops.chunked.test_compiled_recurrences import call, gradients, make
from tests.support.surrounded import surrounded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = torch.float32 if DEVICE == "cuda" else torch.float64
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 3e-3}
BACKENDS = ("chunk_triton", "recurrent_triton")
SMALL = {"B": 1, "G": 1, "H": 2, "K": 5, "V": 3}
QUICK = [
    ("linear_attention", "none", {"T": 66}),
    ("linear_attention", "head", {"T": 66, "B": 2, "H": 1}),
    ("linear_attention", "step", {"T": 66}),
    ("linear_attention", "key", {"T": 35, "H": 1}),
    ("delta_rule", "none", {"T": 1}),
    ("delta_rule", "step", {"T": 66, "H": 1}),
    ("delta_rule_read", "key", {"T": 18, "H": 1}),
]
"""Operation, decay and shape, for every run of the tests."""

THOROUGH = [
    (op, decay, shape)
    for op in ("linear_attention", "delta_rule", "delta_rule_read")
    for decay in ("none", "head", "step", "key")
    for shape in ({"T": 131, "B": 2, "H": 1}, {"T": 20, "K": 70, "V": 69}, {"T": 2, "K": 1, "V": 1})
]
THOROUGH += [(op, decay, {"T": 66}) for op, decay in (("delta_rule", "step"), ("linear_attention", "key"))]
"""Rows in the longest shape, heads in most others: a program takes one head of one row, so that each pays for itself.
Several heads of several chunks are where what is kept of a chunk has a stride of its own."""


pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
"""Which Triton 3.6's interpreter does; with numpy 2.4 it fails for that."""


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    """Kernels run: on the device, or else by the interpreter."""
    with nullcontext() if DEVICE == "cuda" else availability.interpreted():
        yield


def compare(op: str, backend: str, inputs: dict[str, Any], dtype: torch.dtype = EXACT, **options: Any) -> None:
    """Values and gradients of a backend on inputs of this dtype, against the float64 reference on the same numbers."""
    given = {name: x.to(dtype) if isinstance(x, Tensor) and name != "state" else x for name, x in inputs.items()}
    if dtype != torch.float64:
        given["state"] = given["state"].float()
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in given.items()}
    placed = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in given.items()}
    found = gradients(op, backend, placed, **options)
    for name, expected in gradients(op, "recurrent_torch", exact, **options).items():
        assert_close(found[name].cpu(), expected, BOUND[dtype], f"{op}, {options}: {name}")


@pytest.mark.parametrize(("op", "decay", "shape"), QUICK)
def test_chunks_equal_the_reference(op: str, decay: str, shape: dict[str, int]):
    compare(op, "chunk_triton", make(op, decay, **SMALL | shape))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("op", "decay", "shape"), THOROUGH)
def test_chunks_of_more_shapes_equal_the_reference(op: str, decay: str, shape: dict[str, int]):
    compare(op, "chunk_triton", make(op, decay, **SMALL | shape))


@pytest.mark.parametrize(("op", "decay"), [("linear_attention", "step"), ("delta_rule_read", "key")])
def test_single_steps_equal_the_reference(op: str, decay: str):
    inputs = make(op, decay, **SMALL | {"T": 3})
    o, last = call(op, "recurrent_triton", **{n: x if x is None else x.to(DEVICE, EXACT) for n, x in inputs.items()})
    expected, state = call(op, "recurrent_torch", **inputs)
    assert_close(o.cpu(), expected, BOUND[EXACT], "output")
    assert_close(last.cpu(), state, BOUND[EXACT], "last state")


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["none", "head", "step", "key"])
@pytest.mark.parametrize("op", ["linear_attention", "delta_rule", "delta_rule_read"])
def test_steps_differentiate_like_the_reference(op: str, decay: str):
    for packed in ({}, {"cu_seqlens": (0, 1, 1, 5)}):
        rows = len(packed["cu_seqlens"]) - 1 if packed else 1
        compare(op, "recurrent_triton", make(op, decay, **SMALL | {"T": 5, "K": 20}, rows=rows), **packed)


def test_packed_sequences():
    """Empty ones, of one token, and one that a whole chunk and a token fill."""
    offsets = (0, 0, 1, 66, 66, 70)
    compare("linear_attention", "chunk_triton", make("linear_attention", "step", **SMALL | {"T": 70}, rows=5),
            cu_seqlens=offsets)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("decay", ["none", "key"])
@pytest.mark.parametrize("op", ["linear_attention", "delta_rule"])
def test_packed_sequences_of_other_kinds(op: str, decay: str):
    offsets = (0, 0, 1, 66, 66, 70)
    compare(op, "chunk_triton", make(op, decay, **SMALL | {"T": 70, "H": 1}, rows=5), cu_seqlens=offsets)


def test_no_tokens_leave_the_state():
    for op in ("linear_attention", "delta_rule"):
        for backend in BACKENDS:
            inputs = {n: None if x is None else x.to(DEVICE, EXACT) for n, x in make(op, "key", **SMALL, T=0).items()}
            o, last = call(op, backend, **inputs)
            assert o.shape == (1, 0, 2, 3)
            assert torch.equal(last, inputs["state"])


@pytest.mark.parametrize("decay", ["step", pytest.param("key", marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", ["linear_attention", pytest.param("delta_rule", marks=pytest.mark.slow)])
def test_strong_decay_in_float32(op: str, decay: str):
    """Weak decays among very strong ones, to -inf."""
    strengths = (float("inf"),) if (op, decay) == ("linear_attention", "step") else (20.0, 1e4, float("inf"))
    for strength in strengths:
        inputs = make(op, decay, **SMALL | {"T": 34})
        some = torch.rand_like(inputs["log_decay"]) < 0.3
        inputs["log_decay"] = torch.where(some, -strength, -0.01 * torch.rand_like(inputs["log_decay"]))
        compare(op, "chunk_triton", inputs, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    ("op", "decay"),
    [("linear_attention", "step")]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("delta_rule", "step"), ("delta_rule", "key"))],
)
def test_low_precision(op: str, decay: str, dtype: torch.dtype):
    inputs = make(op, decay, **SMALL | {"T": 34, "K": 16, "V": 16})
    compare(op, "chunk_triton", inputs, dtype)


@pytest.mark.parametrize(("op", "decay"), [("linear_attention", "step"), ("delta_rule", "key")])
def test_nothing_is_read_beyond_the_tensors(op: str, decay: str):
    inputs = make(op, decay, **SMALL | {"T": 18, "H": 1}, dtype=EXACT)
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    around = {name: x if name == "state" else surrounded(x) for name, x in inputs.items()}
    plain, found = (call(op, "chunk_triton", **each) for each in (inputs, around))
    assert torch.equal(plain[0], found[0])
    assert torch.equal(plain[1], found[1])


FAR = [("linear_attention", "chunk_triton"), ("linear_attention", "recurrent_triton"), ("delta_rule", "chunk_triton")]


@pytest.mark.skipif(DEVICE == "cuda", reason="a device would need the memory, a sparse file does not")
@pytest.mark.parametrize(
    ("op", "backend"), [FAR[0], *(pytest.param(*each, marks=pytest.mark.slow) for each in FAR[1:])]
)
def test_offsets_beyond_32_bits(op: str, backend: str, tmp_path: Path):
    """66 rows that lie 2^25 numbers apart."""
    inputs = make(op, "none", **SMALL | {"T": 66}, dtype=torch.float32)
    far = torch.from_file(str(tmp_path / "rows"), shared=True, size=66 * 2**25, dtype=torch.float32)
    far = far.as_strided(inputs["v"].shape, (66 * 2**25, 2**25, 3, 1))
    far.copy_(inputs["v"])
    plain, found = (call(op, backend, **inputs | {"v": v}) for v in (inputs["v"], far))
    assert torch.equal(plain[0], found[0])


def test_what_the_kernels_refuse():
    wide = make("linear_attention", "none", T=2, K=257, dtype=torch.float32)
    arguments = OPS["linear_attention"].inputs(**{n: x if x is None else x.to(DEVICE) for n, x in wide.items()})
    for backend in BACKENDS:
        reason = OPS["linear_attention"].backends[backend].unsupported(arguments)
        assert reason == "K is 257, expected at most 256"
    erasing = {n: x if x is None else x.to(DEVICE) for n, x in make("delta_rule_erase", "none", T=2).items()}
    with pytest.raises(ops.BackendError, match=r"chunk_triton.* erase is given, expected None"):
        ops.delta_rule(**erasing, backend="chunk_triton")


def test_a_machine_without_triton_or_device_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(availability, "_interpret", False)
    x = torch.ones(1, 1, 1, 1)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        assert availability.unsupported_recurrence(x, x, x) == "q is on cpu, expected cuda"
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert "no CUDA device" in str(availability.unavailable())
    monkeypatch.setattr(availability, "_missing", "the package triton is not installed")
    assert availability.unavailable() == "the package triton is not installed"


def test_importing_the_library_loads_no_triton():
    code = "import sys, seqarch; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("op", ["linear_attention", "delta_rule"])
def test_the_custom_operators_keep_torchs_rules(op: str):
    inputs = {n: x.to(DEVICE) for n, x in make(op, "step", **SMALL | {"T": 2}, dtype=torch.float32).items()}
    for backend in BACKENDS:
        operator = OPS[op].backends[backend].module.operator
        leaves = {name: x.requires_grad_() for name, x in inputs.items()}
        torch.library.opcheck(operator.operator, OPS[op].inputs(**leaves, scale=0.5).values())
