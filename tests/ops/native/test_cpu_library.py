"""The compiled library's loader: what it refuses, and what it says then."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import seqarch
from seqarch import ops
from seqarch.ops.causal_conv1d import parallel_cpp
from seqarch.ops.causal_conv1d.inputs import CausalConv1dInputs
from seqarch.ops.delta_rule import chunk_cpp as delta_cpp
from seqarch.ops.delta_rule.inputs import DeltaRuleInputs
from seqarch.ops.linear_attention import chunk_cpp as attention_cpp
from seqarch.ops.linear_attention.inputs import LinearAttentionInputs
from seqarch.ops.native import cpu_library, linear
from seqarch.ops.selective_scan import chunk_cpp as scan_cpp
from seqarch.ops.selective_scan.operators import KernelInputs
from tests.support.paths import ROOT

INPUTS = torch.ones(1, 2, 3), torch.ones(3, 2)


def import_native(isa: str) -> subprocess.CompletedProcess[str]:
    program = "from seqarch.ops.native import cpu_library; print(cpu_library.unavailable() or cpu_library.chosen_isa())"
    environment = os.environ | {"SEQARCH_ISA": isa}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


def test_a_missing_library_is_a_reason(tmp_path):
    with pytest.raises(cpu_library.LibraryError, match=r"not installed.* C\+\+ compiler"):
        cpu_library.open_libraries([str(tmp_path)])


def test_a_broken_library_is_a_reason(tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libseqarch_cpu_baseline.so").write_text("not a library")
    with pytest.raises(cpu_library.LibraryError, match="cannot be loaded"):
        cpu_library.open_libraries([str(tmp_path)])


def test_a_stale_library_is_a_reason(monkeypatch):
    monkeypatch.setattr(cpu_library, "INTERFACE", -1)
    with pytest.raises(cpu_library.LibraryError, match=r"expected -1|not installed"):
        cpu_library.open_libraries(seqarch.__path__)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "lacks its header"),
        ("", "has interface no interface"),
        ("#define SEQARCH_INTERFACE 6\n", "has interface 6, expected"),
    ],
)
def test_a_header_that_is_not_the_librarys_is_a_reason(tmp_path, header, message):
    (folder := tmp_path / "lib").mkdir()
    if cpu_library.unavailable() is None:
        shutil.copy(cpu_library.library()._name, folder / "libseqarch_cpu_baseline.so")
    if header is not None:
        (folder / "seqarch.h").write_text(header)
    with pytest.raises(cpu_library.LibraryError, match=f"{message}|not installed: building"):
        cpu_library.open_libraries([str(tmp_path)])


def test_auto_passes_over_a_library_that_is_absent(monkeypatch):
    monkeypatch.setattr(cpu_library, "_reason", "it was never built")
    assert ops.explain("causal_conv1d", *INPUTS).reasons["parallel_cpp"] == "it was never built"
    with ops.record_backends() as ran:
        ops.causal_conv1d(*INPUTS)
    assert ran == {"causal_conv1d": {"parallel_torch": 1}}
    with pytest.raises(ops.BackendError, match="it was never built"):
        ops.causal_conv1d(*INPUTS, backend="parallel_cpp")
    with pytest.raises(cpu_library.LibraryError, match="it was never built"):
        cpu_library.library_hash()


def test_the_environment_chooses_the_instruction_set():
    chosen, unknown = import_native("baseline"), import_native("avx3")
    assert chosen.stdout.strip() == (cpu_library.unavailable() or "baseline")
    assert unknown.returncode == 1
    assert "unknown instruction set in SEQARCH_ISA 'avx3': expected one of avx2, avx512, baseline" in unknown.stderr


def test_the_library_agrees_with_its_header_and_shares_torchs_openmp():
    header = (ROOT / "csrc" / "include" / "seqarch.h").read_text()
    assert f"#define SEQARCH_INTERFACE {cpu_library.INTERFACE}\n" in header
    if cpu_library.unavailable() is None:
        assert len(cpu_library.library_hash()) == 64
        cpu_library.library()
        maps = Path("/proc/self/maps")
        files = {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
        assert len({file for file in files if "gomp" in file or "libomp" in file}) <= 1


def test_an_instruction_set_that_does_not_run_here_is_an_error():
    with (
        pytest.raises(ValueError, match="unknown instruction set of this processor 'sse9'"),
        cpu_library.use_isa("sse9"),
    ):
        pass


def test_return_codes_become_errors():
    x, state = torch.ones(1, 2, 3), torch.ones(1, 8, 3)
    for isa in cpu_library.supported_isas():
        with cpu_library.use_isa(isa), pytest.raises(ValueError, match="causal_conv1d_forward returned 1: an argument"):
            parallel_cpp.run(CausalConv1dInputs(x, torch.ones(3, 9), None, state, False, None))


def test_a_size_that_nothing_has_is_refused():
    """tests/sanitize has all sizes of all kernels."""
    x, empty = torch.ones(1, 1, 1, 1), torch.empty(0)
    for isa in cpu_library.supported_isas():
        for wrong in (-1, -(2**63), 2**60, 2**63 - 1):
            inputs = cpu_library.recurrence_fields(LinearAttentionInputs(x, x, x, None, 1.0, x, None)) | {"keys": wrong}
            with cpu_library.use_isa(isa), pytest.raises(ValueError, match="linear_attention_forward returned 1"):
                attention_cpp._forward(inputs, {"o": empty, "state_out": empty})


def test_running_out_of_memory_is_an_error():
    huge, x, empty = 2**45, torch.ones(1, 1, 1, 1), torch.empty(0)
    for isa in cpu_library.supported_isas():
        with cpu_library.use_isa(isa):
            with pytest.raises(MemoryError, match="linear returned 2: out of memory"):
                linear._linear(
                    {
                        "dtype": 0,
                        "x": empty,
                        "weight": empty,
                        "bias": None,
                        "y": empty,
                        "rows": huge,
                        "depth": 1,
                        "width": 0,
                    }
                )
            A, row = x[0, 0], x[0]
            given = KernelInputs(row, row, A, x, x, None, None, None, False, True, row, None, keep=False)
            inputs = scan_cpp.KERNELS._fields(given)
            with pytest.raises(MemoryError, match="selective_scan_forward returned 2"):
                scan_cpp._forward(inputs | {"state_width": huge}, {"y": row, "state_out": empty, "starts": None})
            outputs = {"o": empty, "state_out": empty}
            inputs = cpu_library.recurrence_fields(LinearAttentionInputs(x, x, x, None, 1.0, x, None))
            with pytest.raises(MemoryError, match="linear_attention_forward returned 2"):
                attention_cpp._forward(inputs | {"keys": huge}, outputs)
            inputs = delta_cpp._fields(DeltaRuleInputs(x, x, x, x[..., 0], None, None, None, 1.0, x, None))
            with pytest.raises(MemoryError, match="delta_rule_forward returned 2"):
                delta_cpp._forward(inputs | {"keys": huge}, outputs)
