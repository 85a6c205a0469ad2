"""The compiled library ``csrc``, loaded and called through ctypes. Only backends that call it import this module,
and what reports on it.

It is built once for every instruction set (``baseline``, ``avx2``, ``avx512``), each a shared library with the same
plain C interface (``csrc/include/seqarch.h``). The kernels of the best one that the processor runs are called; the
environment variable ``SEQARCH_ISA`` names an older one. That a library is missing or stale is a reason which
:func:`unavailable` gives, never an error on import.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import seqarch
from seqarch.ops.dispatch.checks import accumulation_dtype, unknown_name
from seqarch.ops.dispatch.inputs import RecurrenceInputs
from seqarch.ops.dispatch.scoped import Scoped
from seqarch.ops.native.arguments import NUMBERS, packer, structures_beside

INTERFACE = 22
"""``SEQARCH_INTERFACE`` of the header that the calls in this package were written against."""

ISAS = ("baseline", "avx2", "avx512")
"""The instruction sets, oldest first."""

DTYPES = {dtype: NUMBERS[dtype] for dtype in (torch.float32, torch.bfloat16, torch.float64)}
"""The header's number of each activation dtype that the CPU's kernels take."""

int64, float64 = ctypes.c_int64, ctypes.c_double
address, reference, size = ctypes.addressof, ctypes.byref, ctypes.sizeof

ERRORS = {1: (ValueError, "an argument is outside its domain"), 2: (MemoryError, "out of memory")}


class LibraryError(RuntimeError):
    """The compiled library cannot be used; the message says why."""


def _open(isa: str, folders: Iterable[str]) -> ctypes.CDLL:
    files = [file for folder in folders for file in Path(folder, "lib").glob(f"libseqarch_cpu_{isa}.*")]
    if not files:
        raise LibraryError(
            "the compiled library is not installed: building it failed when seqarch was installed, most often for want"
            " of a C++ compiler; install one, then seqarch again"
        )
    return load("compiled", files[0], "seqarch_interface", INTERFACE)


def load(kind: str, file: Path, version: str, expected: int) -> ctypes.CDLL:
    """The library in this file, whose function ``version`` gives the interface that it was built with.

    Raises:
        LibraryError: it is stale or broken, or so is the header beside it.
    """
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        raise LibraryError(f"the {kind} library cannot be loaded: {error}") from error
    if (found := getattr(library, version)()) != expected:
        raise LibraryError(
            f"the {kind} library has interface {found}, expected {expected}: it was built from other sources than this"
            " Python code; install seqarch again"
        )
    _check_header(kind, file.with_name("seqarch.h"))
    return library


def _check_header(kind: str, header: Path) -> None:
    """Raise unless the header beside a library, which says how arguments are laid out, has the library's interface."""
    try:
        found = re.findall(r"^#define SEQARCH_INTERFACE (\d+)$", header.read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeError) as error:
        raise LibraryError(f"the {kind} library lacks its header: {error}; install seqarch again") from error
    if found != [str(INTERFACE)]:
        shown = ", ".join(found) or "no interface"
        raise LibraryError(
            f"the header {header} beside the {kind} library has interface {shown}, expected {INTERFACE}: they were not"
            " installed together; install seqarch again"
        )


def open_libraries(folders: Iterable[str]) -> dict[str, ctypes.CDLL]:
    """The libraries of all instruction sets that this processor runs, oldest first, from ``FOLDER/lib``.

    Raises:
        LibraryError: one is missing, stale or broken.
    """
    folders = list(folders)
    baseline = _open("baseline", folders)
    baseline.seqarch_best_isa.restype = ctypes.c_char_p
    best = ISAS.index(baseline.seqarch_best_isa().decode())
    return {"baseline": baseline} | {isa: _open(isa, folders) for isa in ISAS[1 : best + 1]}


# On import and not on first use, so that torch.compile, which reads Python but not C, sees the outcome as a constant.
_reason: str | None = None
_libraries: dict[str, ctypes.CDLL] = {}
try:
    _libraries = open_libraries(seqarch.__path__)  # of an editable install, also the folder that holds what was built
except LibraryError as error:
    _reason = str(error)

_asked = os.environ.get("SEQARCH_ISA")
if _asked is not None and _asked not in ISAS:
    raise unknown_name("instruction set in SEQARCH_ISA", _asked, ISAS)
if _asked is not None and _libraries and _asked not in _libraries:
    _reason = f"SEQARCH_ISA is {_asked}, but this processor runs only {', '.join(_libraries)}"
_isa = Scoped("isa", _asked or (list(_libraries) or ISAS)[-1])


def unavailable() -> str | None:
    """Why no compiled kernel can run here, or ``None`` if they can."""
    return _reason


def supported_isas() -> tuple[str, ...]:
    """The instruction sets that this processor runs, oldest first; empty without the library."""
    return tuple(_libraries)


def library() -> ctypes.CDLL:
    """The library whose kernels run.

    Raises:
        LibraryError: there is none; the message is that of :func:`unavailable`.
    """
    if _reason is not None:
        raise LibraryError(_reason)
    return _libraries[_isa.get()]


def chosen_isa() -> str:
    """The instruction set whose kernels run."""
    return _isa.get()


def use_isa(isa: str) -> AbstractContextManager[None]:
    """Within the block, the kernels of this instruction set run, one of :func:`supported_isas`."""
    if isa not in _libraries:
        raise unknown_name("instruction set of this processor", isa, _libraries)
    return _isa.set(isa)


def library_hash() -> str:
    """SHA-256 of the library file whose kernels run, for the records of experiments."""
    return hashlib.sha256(Path(library()._name).read_bytes()).hexdigest()


def openmp_version() -> int:
    """The OpenMP version that the library was built with, a date such as 201511; 0 without OpenMP."""
    return library().seqarch_openmp()


def array(structure: str, count: int) -> Any:
    """So many of the header's ``seqarch_STRUCTURE`` side by side, all zeros: to C, a pointer to the first."""
    return (structures_beside(library()._name)[structure] * count)()


def call(name: str, *arguments: object, threads: int | None = None) -> None:
    """Call ``seqarch_NAME`` with C's arguments and, last, the number of threads: by default torch's.

    Raises:
        LibraryError, ValueError, MemoryError: as the library's return code says.
    """
    code = getattr(library(), f"seqarch_{name}")(*arguments, threads or torch.get_num_threads())
    if code:
        error, text = ERRORS[code]
        raise error(f"the compiled kernel {name} returned {code}: {text}")


class Kernel:
    """One function of the library that takes structures, and runs on as many threads as torch, or on those given.

    Args:
        name: the function's name in the header, without ``seqarch_``.
        structures: those it takes, likewise. A call gives the fields of each by name
            (:mod:`seqarch.ops.native.arguments`).

    Raises:
        LibraryError, TypeError, ValueError, MemoryError: on a call, as :class:`Packer` and :func:`call` say.
    """

    def __init__(self, name: str, *structures: str):
        self.name, self.structures = name, structures

    def __call__(self, *structures: Mapping[str, Any], threads: int | None = None) -> None:
        file, held = library()._name, []
        packed = [
            packer(file, name)(self.name, fields, "cpu", held)
            for name, fields in zip(self.structures, structures, strict=True)
        ]
        call(self.name, *packed, threads=threads)


def rows(tensor: Tensor) -> Tensor:
    """The tensor itself if the numbers of its last dimension lie side by side, else a copy in which they do."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def common_dtype(*inputs: Tensor) -> torch.dtype:
    """The dtype in which a kernel takes these inputs: bfloat16 if they all are, else that of their sums."""
    narrow = all(tensor.dtype == torch.bfloat16 for tensor in inputs)
    return torch.bfloat16 if narrow else accumulation_dtype(*inputs)


def activation_dtype(state: Tensor, *inputs: Tensor) -> torch.dtype:
    """The dtype in which a recurrence takes these inputs: bfloat16 if they all are, else that of its state."""
    narrow = state.dtype == torch.float32 and all(tensor.dtype == torch.bfloat16 for tensor in inputs)
    return torch.bfloat16 if narrow else state.dtype


def recurrence_fields(inputs: RecurrenceInputs) -> dict[str, Any]:
    """The fields that the inputs of both recurrences' kernels have, copied where the last dimension is strided."""
    q, v, log_decay, state = inputs.q, inputs.v, inputs.log_decay, inputs.state
    per_key = log_decay is not None and log_decay.ndim == 4
    return {
        "dtype": DTYPES[v.dtype],
        "q": rows(q),
        "k": rows(inputs.k),
        "v": rows(v),
        "log_decay": rows(log_decay) if log_decay is not None and per_key else log_decay,
        "decay_per_key": per_key,
        "scale": inputs.scale,
        "state": state.contiguous(),
        "offsets": inputs.offsets,
        "sequences": state.shape[0],
        "length": q.shape[1],
        "groups": q.shape[2],
        "heads": v.shape[2],
        "keys": q.shape[3],
        "values": v.shape[3],
    }
