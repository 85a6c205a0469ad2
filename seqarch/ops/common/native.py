"""The compiled library ``csrc``: found, loaded and called through ctypes, on first use.

It is built once for every instruction set (``baseline``, ``avx2``, ``avx512``), each a shared library with the same
plain C interface (``csrc/include/seqarch.h``). The best one that the processor runs is loaded; the environment variable
``SEQARCH_ISA`` names another. A library that is missing or stale is a reason, never an error on import.

Argument types in a signature: ``pointer`` takes a tensor or ``None``, ``int64`` and ``int32`` an integer, ``offsets`` a
sequence of integers or ``None``.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import seqarch
from seqarch.ops.common.checks import unknown_name

INTERFACE = 1
"""``SEQARCH_INTERFACE`` of the header that the calls in this package were written against."""

ISAS = ("baseline", "avx2", "avx512")
"""The instruction sets, oldest first."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
"""The header's number of each activation dtype that the kernels take."""

ERRORS = {1: "an argument outside the kernel's domain", 2: "out of memory"}

int32, int64 = ctypes.c_int32, ctypes.c_int64


class pointer:
    """Argument type: the address of a tensor's first element; null for ``None``."""

    @classmethod
    def from_param(cls, tensor: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class offsets:
    """Argument type: an array of 64-bit integers; null for ``None``."""

    @classmethod
    def from_param(cls, values: Sequence[int] | None) -> ctypes.Array[ctypes.c_int64] | None:
        return None if values is None else (ctypes.c_int64 * len(values))(*values)


class LibraryMissing(RuntimeError):
    """The compiled library cannot be used; the message says why."""


def library_file(isa: str) -> Path:
    """The library of one instruction set, beside the package or where an editable install put it."""
    for folder in seqarch.__path__:
        for found in Path(folder, "lib").glob(f"libseqarch_cpu_{isa}.*"):
            return found
    raise LibraryMissing(
        f"the compiled library for {isa} is not installed: building it failed when seqarch was installed, most often"
        " for want of a C++ compiler; install one and then seqarch again"
    )


@cache
def _load(isa: str) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(library_file(isa)))
    except OSError as error:
        raise LibraryMissing(f"the compiled library for {isa} cannot be loaded: {error}") from error
    library.seqarch_best_isa.restype = ctypes.c_char_p
    if library.seqarch_interface() != INTERFACE:
        raise LibraryMissing(
            f"the compiled library for {isa} has interface {library.seqarch_interface()}, expected {INTERFACE}: it was"
            " built from other sources than this Python code; install seqarch again"
        )
    return library


def supported_isas() -> tuple[str, ...]:
    """The instruction sets that this processor runs, oldest first.

    Raises:
        LibraryMissing: there is no library to ask.
    """
    best = _load("baseline").seqarch_best_isa().decode()
    return ISAS[: ISAS.index(best) + 1]


_forced: list[str] = []


@contextmanager
def use_isa(isa: str) -> Iterator[None]:
    """Within the block, kernels of this instruction set run: how tests and benchmarks compare them."""
    _forced.append(isa)
    try:
        yield
    finally:
        _forced.pop()


def chosen_isa() -> str:
    """The instruction set whose kernels run: of :func:`use_isa`, of ``SEQARCH_ISA``, or the best one.

    Raises:
        ValueError: the one asked for does not exist.
        LibraryMissing: there is no library, or the processor does not run the one asked for.
    """
    supported = supported_isas()
    asked = _forced[-1] if _forced else os.environ.get("SEQARCH_ISA")
    if asked is None:
        return supported[-1]
    if asked not in ISAS:
        raise unknown_name("instruction set (SEQARCH_ISA)", asked, ISAS)
    if asked not in supported:
        raise LibraryMissing(f"this processor does not run {asked} (SEQARCH_ISA), expected one of {supported}")
    return asked


def unavailable() -> str | None:
    """Why no compiled kernel can run here, or ``None`` if they can."""
    try:
        _load(chosen_isa())
    except LibraryMissing as error:
        return str(error)
    return None


def library_hash() -> str:
    """SHA-256 of the library file whose kernels run, for records of experiments."""
    return hashlib.sha256(library_file(chosen_isa()).read_bytes()).hexdigest()


def openmp_version() -> int:
    """The OpenMP version that the library was built with, a date such as 201511; 0 without OpenMP."""
    return _load(chosen_isa()).seqarch_openmp()


class Kernel:
    """One function of the library, called with ``torch.get_num_threads()`` as its last argument.

    Args:
        name: the function's name in the header, without ``seqarch_``.
        argument_types: those of the header, without ``num_threads``.
    """

    def __init__(self, name: str, *argument_types: type):
        self.name, self.argument_types = name, (*argument_types, int32)
        self._functions: dict[str, Callable[..., int]] = {}

    def _function(self) -> Callable[..., int]:
        isa = chosen_isa()
        if isa not in self._functions:
            function = getattr(_load(isa), f"seqarch_{self.name}")
            function.argtypes, function.restype = self.argument_types, int32
            self._functions[isa] = function
        return self._functions[isa]

    def __call__(self, *arguments: object) -> None:
        code = self._function()(*arguments, torch.get_num_threads())
        if code:
            error = MemoryError if code == 2 else RuntimeError
            raise error(f"{self.name}: the compiled kernel returned {code}: {ERRORS.get(code, 'an unknown code')}")
