"""Where Python objects lie in memory, for a kernel that fetches them before Python looks at them again.

Weights that stream through the cache push all else out of it. A Python program of some thousand objects then waits for
memory at each of them, one after the other; a kernel fetches them all at once. Addresses are hints: they are fetched,
never read, so that it does no harm if an object has gone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, UntypedStorage

from seqarch.ops.native import cpu_library

LINE = 64
"""Bytes of a line of the cache."""

BEFORE = 32
"""Bytes of CPython's own before an object, of garbage collection and of attributes."""

MOST = 4096
"""Bytes of an object that are fetched."""

TENSOR, STORAGE = 256, 128
"""Bytes of what torch has for a tensor, and for its memory."""


def lines(objects: Iterable[Any]) -> list[int]:
    """Addresses, one in each line of the cache that these objects, the entries of dicts and lists, and tensors take."""
    if sys.implementation.name != "cpython":
        return []
    found: dict[int, None] = {}
    for each in objects:
        size = min(sys.getsizeof(each, LINE), MOST)
        spans = [(id(each) - BEFORE, BEFORE + min(size, 2 * LINE))]
        if isinstance(each, Tensor):
            spans += [(each._cdata, TENSOR), (each.untyped_storage()._cdata, STORAGE)]
        elif not isinstance(each, UntypedStorage | int | float | str):
            spans += [(at, size if isinstance(each, dict | list) else LINE) for at in _pointers(each)]
        for at, count in spans:
            found |= dict.fromkeys(range(at // LINE * LINE, at + count, LINE))
    return list(found)


def _pointers(each: Any) -> Sequence[int]:
    """The addresses that an object itself holds, as far as they can be such."""
    count = type(each).__basicsize__ // 8
    words = (cpu_library.int64 * count).from_address(id(each))
    return [word for word in words[2:] if word % 8 == 0 and 1 << 20 < word < 1 << 47]
