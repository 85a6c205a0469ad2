"""Large results in huge pages, where Linux has them for the asking."""

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
