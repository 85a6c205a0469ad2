"""Large results are asked to lie in huge pages."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from seqarch.ops.native.huge_pages import LEAST_BYTES, in_huge_pages, like

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
