"""The record of what the CUDA kernels need of a GPU; ``make cuda-check`` compares it with the compiler's word."""

from __future__ import annotations

import json
import re
import shutil

from tests.support.cuda_resources import CAPABILITIES, RECORD, build_flags, read

RECORDED = json.loads(RECORD.read_text(encoding="utf-8"))
KERNELS = {name: needs for name, needs in RECORDED.items() if name != "nvcc"}
MOST_REGISTERS = 65536
"""Of a multiprocessor (CUDA C++ programming guide, table of compute capabilities)."""


SPILLING = {
    "8.0": {
        "scan_segments<false, float, Lanes<4, 1, 4, 3> >",
        "scan_segments<false, float, Lanes<4, 2, 4, 3> >",
    },
    "9.0": {
        "convolve<float, 6>",
        "scan_backward<float, Lanes<4, 1, 4, 3> >",
    },
    "12.0": {
        "convolve<float, 2>",
        "convolve<float, 3>",
        "convolve<float, 4>",
        "differentiate<float, 7>",
        "scan_backward<float, Lanes<4, 4, 8, 2> >",
        "scan_forward<float, Lanes<4, 1, 4, 3> >",
    },
}
"""By compute capability, the kernels of float32 sums in which a thread runs out of registers: what is left to mend."""


def single(name: str) -> bool:
    """Whether a kernel's sums are float32."""
    return "<float" in name or ", float" in name


def test_the_record_names_every_kernel_for_every_generation():
    assert len(KERNELS) > 50
    for needs in KERNELS.values():
        assert set(needs) == {f"{capability / 10}" for capability in CAPABILITIES}


def test_which_threads_run_out_of_registers():
    found = {
        capability: {name for name, needs in KERNELS.items() if single(name) and needs[capability]["spilled"]}
        for capability in SPILLING
    }
    assert found == SPILLING
    assert max(KERNELS[name]["9.0"]["spilled"] for name in SPILLING["9.0"]) <= 12


def test_the_backward_pass_leaves_room_for_two_blocks():
    """For the usual 16 states, of 256 threads."""
    (name,) = [name for name in KERNELS if re.fullmatch(r"scan_backward<float, Lanes<4, 4, 8, 2>\s*>", name)]
    for capability, needs in KERNELS[name].items():
        assert needs["registers"] * 256 * 2 <= MOST_REGISTERS
        assert needs["spilled"] == 0 or capability == "12.0"


def test_reports_are_read():
    report = """ptxas info    : Compiling entry function '_Z4stepIfEvPf' for 'sm_90'
ptxas info    : Function properties for _Z4stepIfEvPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""
    for _ in range(shutil.which("c++filt") is not None):
        assert list(read(report)) == [("step<float>", {"registers": 40, "spilled": 12})]
    assert "-ftz=true" in build_flags()
