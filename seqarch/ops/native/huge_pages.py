"""Large results in huge pages, where Linux has them for the asking, and memory that is kept from call to call."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

from torch import Tensor

LEAST_BYTES = 2**22
"""Less is kept by the C library's allocator from call to call, and its pages with it."""

_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
if _ADVICE is not None:
    _madvise = ctypes.CDLL(None).madvise
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def like(tensor: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """An unwritten contiguous tensor of this dtype, and of this shape where none is given."""
    return in_huge_pages(tensor.new_empty(tensor.shape if shape is None else shape))


def in_huge_pages(tensor: Tensor) -> Tensor:
    """The tensor itself, which nobody has written to: its new pages will be 2 MiB and not 4 KiB, if it is large.

    Memory that is new to a process costs a fault a page, which can take as long as the work that fills it
    (docs/log.md). It is advice: where it is not taken nothing else changes.
    """
    if _ADVICE is not None and type(tensor) is Tensor and tensor.is_cpu and tensor.nbytes >= LEAST_BYTES:
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise(first, end - first, _ADVICE)
    return tensor


HUGE = 2**21
"""Bytes of a huge page."""

_COLLAPSE = 25
"""``MADV_COLLAPSE`` of Linux from 6.1 on, for which Python has no name."""


def collapse(tensor: Tensor) -> None:
    """Put a tensor that is written, and will be read again and again, into huge pages, where Linux does that.

    Reading weights then goes 1.4 to 1.8 times as fast (docs/log.md). Numbers and addresses stay; it takes as long as a
    few copies of the memory. What is left of a page at either end stays as it is.
    """
    if _ADVICE is not None and tensor.is_cpu:
        first = -(-tensor.data_ptr() // HUGE) * HUGE
        end = (tensor.data_ptr() + tensor.nbytes) // HUGE * HUGE
        if end > first:
            _madvise(first, end - first, _ADVICE)
            _madvise(first, end - first, _COLLAPSE)


KEPT_BYTES = 2**30
"""Of memory that is free at the end of the heap, what a process keeps for its next allocation."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of the GNU C library


def keep_freed_memory() -> bool:
    """Have this process keep freed memory for its next allocations; whether its C library can be told to.

    As it is set up, the GNU C library gives the memory of large tensors back to the system when they are freed, and
    each step of a training run then maps the same pages anew, at a fault each (docs/log.md). A process that keeps them
    holds up to :data:`KEPT_BYTES` that it does not use. For programs, which own their process: the library does not
    call this.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_M_MMAP_THRESHOLD: KEPT_BYTES, _M_TRIM_THRESHOLD: KEPT_BYTES, _M_TOP_PAD: 2**26}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
