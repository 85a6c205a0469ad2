"""Large results are asked to lie in huge pages."""

from __future__ import annotations

import mmap
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from seqarch.ops.native.huge_pages import LEAST_BYTES, in_huge_pages, like
from tests.support.paths import ROOT

MAPS = Path("/proc/self/smaps")


def advised(address: int) -> bool:
    """Whether Linux was asked for huge pages at an address of this process."""
    for part in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", MAPS.read_text()):
        start, end = (int(each, 16) for each in part.split(maxsplit=1)[0].split("-"))
        if start <= address < end:
            return " hg" in part.rpartition("VmFlags:")[2]
    raise AssertionError("no such address")


@pytest.mark.skipif(not MAPS.exists() or not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux alone has them")
def test_large_results_are_asked_to_lie_in_huge_pages():
    """Of 64 MiB, which the allocator maps anew."""
    plain = torch.empty(2**24)
    large = like(plain)
    assert advised(large.data_ptr() + 2**25)
    assert not advised(plain.data_ptr() + 2**25)


def test_nothing_else_changes():
    for size in (0, 1, LEAST_BYTES // 4 - 1, LEAST_BYTES // 4, LEAST_BYTES):
        room = torch.empty(size)
        assert in_huge_pages(room) is room
        room.fill_(1)
    odd = torch.empty(LEAST_BYTES)[3:]
    assert in_huge_pages(odd) is odd
    meta = torch.empty(LEAST_BYTES, device="meta")
    assert in_huge_pages(meta) is meta
    with FakeTensorMode():
        fake = torch.empty(LEAST_BYTES)
        assert in_huge_pages(fake) is fake


STEPS = """
import resource, sys, torch
from seqarch.ops.native.huge_pages import keep_freed_memory
kept = sys.argv[1] == "kept" and keep_freed_memory()
def step():
    for each in [torch.ones(10 * 2**20) for _ in range(2)]:
        del each
for _ in range(10):  # Small things settle in the room between, and the heap has its size.
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of the GNU C library")
def test_a_process_that_keeps_freed_memory_maps_no_page_twice():
    """Two tensors of 42 MB a step are 20,000 pages; below 32 MB the C library learns by itself, more slowly."""
    found = {
        how: [int(each) for each in subprocess.check_output([sys.executable, "-c", STEPS, how], cwd=ROOT).split()]
        for how in ("kept", "given back")
    }
    assert found["kept"][0] == 1
    assert found["kept"][1] < 1000 < 10 * 1000 < found["given back"][1]
