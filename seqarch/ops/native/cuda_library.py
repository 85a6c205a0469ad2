"""The compiled library of CUDA kernels (``csrc/cuda``), loaded and called through ctypes. Only backends that call it
import this module, and what reports on it.

It is built on request where ``nvcc`` is, when seqarch is installed; its interface is ``csrc/include/seqarch_cuda.h``.
That it is missing or stale is a reason which :func:`unavailable` gives, never an error on import. Tests load the same
sources, built for the processor, in its place, by :func:`emulated`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import seqarch
from seqarch.ops.native import cpu_library
from seqarch.ops.native.arguments import NUMBERS, packer
from seqarch.ops.native.cpu_library import ERRORS, LibraryError

INTERFACE = 2
"""``SEQARCH_CUDA_INTERFACE`` of the header that the calls in this package were written against."""

CHUNK = 16
"""``SEQARCH_CUDA_CHUNK`` of the header: steps between states that the selective scan keeps."""

STATES = {torch.float32: 128, torch.float64: 64}
"""``SEQARCH_CUDA_STATES`` and ``SEQARCH_CUDA_STATES64`` of the header: by the dtype of sums, the most states per
channel that the selective scan takes."""

CAPABILITY = 8, 0
"""The oldest compute capability that the library is built for."""

FAILED = 1000
"""``SEQARCH_CUDA_ERROR`` of the header: return codes from here on are those of the CUDA runtime."""

MISSING = (
    "the CUDA library is not installed: it is built on request, by installing seqarch with"
    " --config-settings=cmake.define.SEQARCH_CUDA=ON, where nvcc is; nobody asked for it, or nvcc is missing or failed"
)


def open_library(file: Path) -> ctypes.CDLL:
    """The library in this file.

    Raises:
        LibraryError: it is stale or broken.
    """
    library = cpu_library.load("CUDA", file, "seqarch_cuda_interface", INTERFACE)
    library.seqarch_cuda_error.restype = ctypes.c_char_p
    return library


# On import and not on first use, so that torch.compile, which reads Python but not C, sees the outcome as a constant.
_reason: str | None = MISSING
_library: ctypes.CDLL | None = None
_emulated = False
for _file in (file for folder in seqarch.__path__ for file in Path(folder, "lib").glob("libseqarch_cuda.*")):
    try:
        _library, _reason = open_library(_file), None
    except LibraryError as _error:
        _reason = str(_error)


def unavailable() -> str | None:
    """Why no CUDA kernel can run on this machine, or ``None`` if they can."""
    if _reason is not None or _emulated:
        return _reason
    return None if torch.cuda.is_available() else "there is no CUDA device"


def library() -> ctypes.CDLL:
    """The library whose kernels run.

    Raises:
        LibraryError: there is none; the message is that of :func:`unavailable`.
    """
    if _library is None:
        raise LibraryError(str(_reason))
    return _library


def library_hash() -> str:
    """SHA-256 of the library file whose kernels run, for the records of experiments."""
    return hashlib.sha256(Path(library()._name).read_bytes()).hexdigest()


@contextmanager
def emulated(file: Path) -> Iterator[None]:
    """Within the block, the kernels of this library run, which takes tensors of the CPU: for tests."""
    global _library, _reason, _emulated
    before = _library, _reason, _emulated
    _library, _reason, _emulated = open_library(file), None, True
    try:
        yield
    finally:
        _library, _reason, _emulated = before


def unsupported(**activations: Tensor | None) -> str | None:
    """Why the kernels cannot serve these activations, of which the first is always there."""
    device = next(tensor.device for tensor in activations.values() if tensor is not None)
    expected = "cpu" if _emulated else "cuda"
    if device.type != expected:
        return f"{next(iter(activations))} is on {device}, expected {expected}"
    for name, tensor in activations.items():
        if tensor is not None and tensor.dtype not in NUMBERS:
            return f"{name} has dtype {tensor.dtype}, expected one of {', '.join(map(str, NUMBERS))}"
    if not _emulated and torch.cuda.get_device_capability(device) < CAPABILITY:
        found, oldest = (
            ".".join(map(str, version)) for version in (torch.cuda.get_device_capability(device), CAPABILITY)
        )
        return f"{device} has compute capability {found}, expected {oldest} or newer"
    return None


def offsets(cu_seqlens: Sequence[int] | None, device: torch.device) -> Tensor | None:
    """Two tables ``[2, sequences + 1]`` on the device: the first row of each packed sequence, and its first chunk."""
    return None if cu_seqlens is None else _tables(tuple(cu_seqlens), device)


@functools.lru_cache(maxsize=32)
def _tables(cu_seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    chunks = (-(-(end - start) // CHUNK) for start, end in pairwise(cu_seqlens))
    tables = [list(cu_seqlens), list(accumulate(chunks, initial=0))]
    return torch.tensor(tables, dtype=torch.int64).to(device)


class Kernel:
    """One function of the library, called on the current stream of its tensors' device, with its workspace from torch.

    Args:
        name: the function's name in the header, without ``seqarch_cuda_``.
        structures: those it takes, as of :class:`cpu_library.Kernel`.

    Raises:
        LibraryError, TypeError, ValueError, RuntimeError: on a call, as :class:`Packer` and the library's return code
            say. What fails while a kernel runs is reported by a later call, as always with CUDA.
    """

    def __init__(self, name: str, *structures: str):
        self.name, self.structures = name, structures

    def __call__(self, *structures: Mapping[str, Any]) -> None:
        tensor = next(value for fields in structures for value in fields.values() if isinstance(value, Tensor))
        file, held = library()._name, []
        with torch.cuda.device_of(tensor):
            packed = [
                packer(file, name)(self.name, fields, tensor.device.type, held)
                for name, fields in zip(self.structures, structures, strict=True)
            ]
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream if tensor.is_cuda else None)
            needed = ctypes.c_int64(0)
            self._call(*packed, None, ctypes.byref(needed), stream)
            workspace = torch.empty(needed.value, dtype=torch.uint8, device=tensor.device)
            self._call(*packed, ctypes.c_void_p(workspace.data_ptr()), ctypes.byref(needed), stream)

    def _call(self, *arguments: object) -> None:
        code = getattr(library(), f"seqarch_cuda_{self.name}")(*arguments)
        if code >= FAILED:
            text = library().seqarch_cuda_error(code).decode()
            raise RuntimeError(f"the CUDA kernel {self.name} could not be launched: {text}")
        if code:
            error, text = ERRORS[code]
            raise error(f"the CUDA kernel {self.name} returned {code}: {text}")
