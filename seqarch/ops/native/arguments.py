"""The structures of arguments that the compiled kernels take, packed from fields by name.

``csrc/include/seqarch.h`` alone says which fields a structure has, in which order and of which type. It is installed
beside the library that was compiled from it and read there on the first call, so no field is described in Python: one
that a caller leaves out, or that the header does not have, is an error. What a field takes follows from its C type:

==========================  ==========================================================================================
``seqarch_heads``           a tensor ``[B, T, H]`` or ``[B, T, H, D]``, D's stride being 1, or ``None``
``seqarch_rows``            a tensor ``[B, T, ...]`` whose dimensions after the second lie side by side, or ``None``
a pointer                   a contiguous tensor, a sequence of 64-bit integers, or ``None``
``int32_t, int64_t``        an integer
``double``                  a float
==========================  ==========================================================================================
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2, torch.float16: 3}
"""The headers' number of each dtype."""

_NUMBER_TYPES = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "double": ctypes.c_double}
_STRUCTURE = re.compile(r"typedef struct(?: \w+)? \{(.*?)\} seqarch_(\w+);", re.DOTALL)
_DECLARATION = re.compile(r"\s*(?:const\s+)?(?:seqarch_)?(\w+)(.*)", re.DOTALL)
_FIELD = re.compile(r"(\*?)\s*(\w+)(?:\[(\d+)\])?")
_CPU = torch.device("cpu")


def read_structures(header: str) -> dict[str, type[ctypes.Structure]]:
    """Every structure of a header's text by its name without ``seqarch_``, laid out as the C compiler does."""
    found: dict[str, type[ctypes.Structure]] = {}
    types: dict[str, Any] = dict(_NUMBER_TYPES)
    for body, name in _STRUCTURE.findall(re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)):
        fields = []
        for declaration in body.split(";")[:-1]:
            type_name, declared = _DECLARATION.fullmatch(declaration).groups()  # type: ignore[union-attr]
            for star, field, count in _FIELD.findall(declared):
                kind = ctypes.c_void_p if star else types[type_name]
                fields.append((field, kind * int(count) if count else kind))
        found[name] = types[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


def fields_of(structure: type[ctypes.Structure]) -> list[tuple[str, Any]]:
    """The names and the types of its fields."""
    return [(str(field[0]), field[1]) for field in structure._fields_]


class Pointer:
    """A tensor all of whose numbers lie side by side, by the address of the first."""

    free = 0
    none: tuple[int, ...] = (0,)

    @classmethod
    def check(cls, kernel: str, tensor: Tensor, device: str) -> None:
        """Raise unless all numbers of the tensor lie where a kernel for this type of device looks for them.

        Raises:
            ValueError: they are elsewhere or nowhere (meta and fake tensors, a storage that was resized), or have gaps
                after the first ``free`` dimensions.
        """
        shown = f"{kernel}: a tensor of shape {list(tensor.shape)} and strides {list(tensor.stride())}"
        memory = tensor.untyped_storage()
        if memory.device.type != device:
            raise ValueError(f"{shown} has its memory on {memory.device}, expected {device}")
        if tensor.numel() and memory.nbytes() < (needed := _bytes_to_end(tensor)):
            raise ValueError(f"{shown} has a storage of {memory.nbytes()} bytes, expected at least {needed}")
        if not _side_by_side(tensor, cls.free):
            raise ValueError(f"{shown} has gaps after its first {cls.free} dimensions, expected none")

    @staticmethod
    def values(tensor: Tensor) -> tuple[int, ...]:
        return (tensor.data_ptr(),)


class Rows(Pointer):
    """``seqarch_rows``."""

    free = 2
    none = (0, 0, 0, 0)

    @staticmethod
    def values(tensor: Tensor) -> tuple[int, ...]:
        return tensor.data_ptr(), tensor.stride(0), tensor.stride(1), NUMBERS[tensor.dtype]


class Heads(Pointer):
    """``seqarch_heads``."""

    free = 3
    none = (0, 0, 0, 0)

    @staticmethod
    def values(tensor: Tensor) -> tuple[int, ...]:
        return tensor.data_ptr(), *tensor.stride()[:3]


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


_KINDS: dict[str, type[Pointer]] = {"c_void_p": Pointer, "rows": Rows, "heads": Heads}


class Packer:
    """Packs the fields of one structure of the header into the bytes that C reads.

    Bytes and not an object of ``ctypes``, which takes eight times as long; they lie at a multiple of eight.
    """

    def __init__(self, structure: type[ctypes.Structure]):
        self.name = structure.__name__
        kinds = dict(fields_of(structure))
        self.fields = [(name, _KINDS.get(kind.__name__)) for name, kind in kinds.items()]
        self._in_order, self._kinds = itemgetter(*kinds), [kind for _, kind in self.fields]
        self.struct = struct.Struct(f"@{_format(structure)}")
        assert self.struct.size == ctypes.sizeof(structure), self.name

    def __call__(self, kernel: str, fields: Mapping[str, Any], device: str, held: list[Any]) -> bytes:
        """The structure with these fields.

        Args:
            kernel: named in errors.
            device: the type of device whose memory the tensors must have.
            held: receives what must live while C reads the structure: the tensors' memory, as another thread may give a
                tensor other memory meanwhile.

        Raises:
            TypeError: a field is missing, or the header does not have it.
            ValueError: a tensor's numbers lie where the kernel does not look for them.
        """
        try:
            values = self._in_order(fields)
        except KeyError:
            raise self._misnamed(kernel, fields) from None
        if len(fields) != len(values):
            raise self._misnamed(kernel, fields)
        whole = _CPU if device == "cpu" else None
        flat: list[Any] = []
        for value, kind in zip(values, self._kinds, strict=True):
            if kind is None:
                flat.append(value)
            elif value is None:
                flat += kind.none
            elif isinstance(value, Tensor):
                held.append(memory := value.untyped_storage())
                # Most tensors own all of a storage of the CPU's, which is quicker to see than what check asks.
                if memory.nbytes() != value.nbytes or memory.device != whole or not value.is_contiguous():
                    kind.check(kernel, value, device)
                flat += kind.values(value)
            else:
                held.append((ctypes.c_int64 * len(value))(*value))
                flat.append(ctypes.addressof(held[-1]))
        return self.struct.pack(*flat)

    def _misnamed(self, kernel: str, fields: Mapping[str, Any]) -> TypeError:
        names, given = {name for name, _ in self.fields}, fields.keys()
        missing, unknown = (", ".join(sorted(each)) for each in (names - given, given - names))
        return TypeError(f"{kernel}: {self.name} lacks [{missing}], does not know [{unknown}]")


def _format(kind: Any) -> str:
    """The layout in the words of the module struct; ``0q`` pads a structure to whole words."""
    if issubclass(kind, ctypes.Structure):
        return "".join(_format(each) for _, each in fields_of(kind)) + "0q"
    return kind._type_


@functools.cache
def structures_beside(library: str) -> dict[str, type[ctypes.Structure]]:
    """The structures of the header in the library's folder."""
    return read_structures(Path(library).with_name("seqarch.h").read_text(encoding="utf-8"))


@functools.cache
def packer(library: str, name: str) -> Packer:
    """That of the structure ``seqarch_NAME``."""
    return Packer(structures_beside(library)[name])
