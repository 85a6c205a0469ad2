"""The compiled library ``csrc``, loaded and called through ctypes. Only backends that call it import this module,
and what tells people about it.

It is built once for every instruction set (``baseline``, ``avx2``, ``avx512``), each a shared library with the same
plain C interface (``csrc/include/seqarch.h``). The kernels of the best one that the processor runs are called; the
environment variable ``SEQARCH_ISA`` names an older one. That a library is missing or stale is a reason which
:func:`unavailable` tells, never an error on import.

A kernel's argument types: :class:`Pointer`, :class:`Start`, :class:`Rows` and :class:`Heads` take a tensor or ``None``,
the last two with its strides, :class:`Offsets` a sequence of integers or ``None``, :class:`Instructions` an array of
them, ``int32`` and ``int64`` an integer, ``float64`` a float. A tensor's memory is held while its kernel runs, as
another thread may give the tensor other memory meanwhile.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import seqarch
from seqarch.ops.dispatch.checks import accumulation_dtype, unknown_name
from seqarch.ops.dispatch.scoped import Scoped

INTERFACE = 6
"""``SEQARCH_INTERFACE`` of the header that the calls in this package were written against."""

ISAS = ("baseline", "avx2", "avx512")
"""The instruction sets, oldest first."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
"""The header's number of each activation dtype that the CPU's kernels take."""

NUMBERS = {**DTYPES, torch.float16: 3}
"""The headers' number of each dtype; the CUDA kernels take them all."""

ERRORS = {1: (ValueError, "an argument is outside its domain"), 2: (MemoryError, "out of memory")}

_CPU = torch.device("cpu")

int32, int64, float64 = ctypes.c_int32, ctypes.c_int64, ctypes.c_double


class _Memory:
    """Argument type: a tensor whose dimensions after the first ``free`` lie side by side, or ``None``."""

    free: int

    @classmethod
    def check(cls, kernel: str, tensor: Tensor, device: str) -> None:
        """Raise unless all numbers of the tensor lie where a kernel for this type of device looks for them.

        Raises:
            ValueError: they are elsewhere or nowhere (meta and fake tensors, a storage that was resized), or have gaps.
        """
        shown = f"{kernel}: a tensor of shape {list(tensor.shape)} and strides {list(tensor.stride())}"
        memory = tensor.untyped_storage()
        if memory.device.type != device:
            raise ValueError(f"{shown} has its memory on {memory.device}, expected {device}")
        if tensor.numel() and memory.nbytes() < (needed := _bytes_to_end(tensor)):
            raise ValueError(f"{shown} has a storage of {memory.nbytes()} bytes, expected at least {needed}")
        if not _side_by_side(tensor, cls.free):
            raise ValueError(f"{shown} has gaps after its first {cls.free} dimensions, expected none")


def _bytes_to_end(tensor: Tensor) -> int:
    """From the start of the storage to the end of the last number."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (int(tensor.storage_offset()) + last + 1) * tensor.itemsize


def _side_by_side(tensor: Tensor, free: int) -> bool:
    if tensor.is_contiguous():
        return True
    step = 1
    for size, stride in zip(reversed(tensor.shape[free:]), reversed(tensor.stride()[free:]), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


class Pointer(_Memory):
    """Argument type: the address of a contiguous tensor's first element; null for ``None``."""

    free = 0

    @classmethod
    def from_param(cls, tensor: Tensor | None) -> ctypes.c_void_p:
        address = ctypes.c_void_p()
        if tensor is not None:
            address.memory = tensor.untyped_storage()  # type: ignore[attr-defined]
            address.value = tensor.data_ptr()
        return address


class Start(Pointer):
    """Argument type: the same of a tensor ``[B, T, D]`` whose strides the kernel is told beside it."""

    free = 2


class _RowsStructure(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("batch_stride", int64), ("time_stride", int64), ("dtype", int32))


class Rows(_Memory):
    """Argument type: ``seqarch_rows`` of a tensor ``[B, T, ...]`` whose dimensions after the second lie side by side;
    null for ``None``."""

    free = 2

    @classmethod
    def from_param(cls, tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        memory = tensor.untyped_storage()
        rows = _RowsStructure(tensor.data_ptr(), tensor.stride(0), tensor.stride(1), NUMBERS[tensor.dtype])
        rows.memory = memory
        return ctypes.byref(rows)


class _Heads(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch_stride", int64),
        ("time_stride", int64),
        ("head_stride", int64),
    ]


class Heads(_Memory):
    """Argument type: a tensor ``[B, T, H]`` or ``[B, T, H, D]`` with its strides, D's being 1; null for ``None``."""

    free = 3

    @classmethod
    def from_param(cls, tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        memory = tensor.untyped_storage()
        heads = _Heads(tensor.data_ptr(), *tensor.stride()[:3])
        heads.memory = memory
        return ctypes.byref(heads)


class Offsets:
    """Argument type: an array of 64-bit integers; null for ``None``."""

    @classmethod
    def from_param(cls, values: Sequence[int] | None) -> ctypes.Array[ctypes.c_int64] | None:
        return None if values is None else (ctypes.c_int64 * len(values))(*values)


class Operand(ctypes.Structure):
    """``seqarch_operand``: an address, and how far apart the rows of a batch lie."""

    _fields_ = (("data", ctypes.c_void_p), ("stride", int64))


class Instruction(ctypes.Structure):
    """``seqarch_instruction``: a step of ``seqarch_run_token``."""

    _fields_ = (
        *(("kind", int32), ("activation", int32), ("factor", float64)),
        *(("rows", int64), ("sizes", int64 * 2), ("operands", Operand * 9)),
    )


class Instructions:
    """Argument type: an array of :class:`Instruction`, as :meth:`of_length` makes it."""

    @staticmethod
    def of_length(count: int) -> Any:
        return (Instruction * count)()

    @classmethod
    def from_param(cls, instructions: Any) -> Any:
        return instructions


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
        LibraryError: it is stale or broken.
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
    return library


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


def check_memory(kernel: str, kinds: Sequence[type], arguments: Sequence[object], device: str) -> None:
    """Raise what :meth:`_Memory.check` does of a kernel's arguments."""
    for kind, argument in zip(kinds, arguments, strict=False):
        if isinstance(argument, Tensor) and not (device == "cpu" and _whole(argument)):
            kind.check(kernel, argument, device)  # type: ignore[attr-defined]


def _whole(tensor: Tensor) -> bool:
    """Whether it owns all of a storage in the CPU's memory, as most do: quicker than :meth:`_Memory.check`."""
    memory = tensor.untyped_storage()
    return memory.nbytes() == tensor.nbytes and tensor.is_contiguous() and memory.device == _CPU


class Kernel:
    """One function of the library, called with ``torch.get_num_threads()`` as its last argument.

    Args:
        name: the function's name in the header, without ``seqarch_``.
        argument_types: those of the header, without ``num_threads``.

    Raises:
        LibraryError, ValueError, MemoryError: on a call, as the library's return code says.
    """

    def __init__(self, name: str, *argument_types: type):
        self.name, self.argument_types = name, (*argument_types, int32)

    def __call__(self, *arguments: object) -> None:
        check_memory(self.name, self.argument_types, arguments, "cpu")
        function = getattr(library(), f"seqarch_{self.name}")
        if function.argtypes is None:
            function.argtypes, function.restype = self.argument_types, int32
        code = function(*arguments, torch.get_num_threads())
        if code:
            error, text = ERRORS[code]
            raise error(f"the compiled kernel {self.name} returned {code}: {text}")


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


def stepwise(log_decay: Tensor, v: Tensor) -> Tensor:
    """``[H]`` as a view ``[B, T, H]``; other decays as they are."""
    return log_decay.expand(v.shape[:3]) if log_decay.ndim == 1 else log_decay
