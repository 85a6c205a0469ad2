"""The structures of arguments: as the header lays them out, whole, and of memory that stays."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from seqarch.ops.native import cpu_library, fused, tape
from seqarch.ops.native.arguments import Heads, Packer, Pointer, Rows, fields_of, read_structures
from tests import emulation
from tests.support.paths import ROOT

HEADER = (ROOT / "csrc" / "include" / "seqarch.h").read_text(encoding="utf-8")
STRUCTURES = read_structures(HEADER)
TYPES = {"c_int": "int32_t", "c_long": "int64_t", "c_double": "double", "c_void_p": "a pointer"}
SIZES = "typedef struct { const void *x, *y; const int64_t* offsets; int64_t width; int32_t silu; } seqarch_sizes;"


def values(**changes: Any) -> dict[str, Any]:
    return {"x": torch.ones(2), "y": None, "offsets": (0, 2), "width": 3, "silu": True, **changes}


def test_every_structure_of_the_header_is_read():
    assert len(STRUCTURES) == HEADER.count("typedef struct") > 15


def test_fields_lie_where_the_c_compiler_puts_them(tmp_path: Path):
    """Each field's offset, size and kind, by a program that includes the header."""
    cases = [(name, field, kind) for name, each in STRUCTURES.items() for field, kind in fields_of(each)]
    lines = [f"SHOW(seqarch_{name}, {field})" for name, field, _ in cases]
    (tmp_path / "show.cpp").write_text(
        """#include <cstddef>
#include <cstdio>
#include <type_traits>
#include "seqarch.h"
template <class T> const char* kind() {
    return std::is_pointer_v<T> ? "a pointer" : std::is_same_v<T, int32_t> ? "int32_t" : std::is_same_v<T, int64_t> ?
           "int64_t" : std::is_same_v<T, double> ? "double" : "a structure or an array";
}
#define SHOW(S, F) std::printf("%zu %zu %zu %s\\n", sizeof(S), offsetof(S, F), sizeof(S::F), kind<decltype(S::F)>());
int main() {
""" + "\n".join(lines) + "\n}\n")  # fmt: skip
    for compiler in filter(None, [emulation.compiler()]):
        command = [compiler, "-std=c++17", f"-I{ROOT / 'csrc' / 'include'}", "show.cpp", "-o", "show"]
        subprocess.run(command, cwd=tmp_path, check=True)
        shown = subprocess.run([tmp_path / "show"], capture_output=True, text=True, check=True).stdout.splitlines()
        for (name, field, kind), line in zip(cases, shown, strict=True):
            place, structure = getattr(STRUCTURES[name], field), STRUCTURES[name]
            found = f"{ctypes.sizeof(structure)} {place.offset} {place.size}"
            assert line == f"{found} {TYPES.get(kind.__name__, 'a structure or an array')}", (name, field)


def test_every_structure_is_packed_as_it_is_laid_out():
    """Numbers from 1 on in all fields, by ``struct`` as by ``ctypes``."""
    for name, structure in STRUCTURES.items():
        if name in ("view", "tape_instruction"):  # arrays of them are written in place
            continue
        packer, numbers = Packer(structure), iter(range(1, 100))
        flat = [next(numbers) for _ in packer.struct.unpack(bytes(packer.struct.size))]
        found, expected = structure.from_buffer_copy(packer.struct.pack(*flat)), iter(flat)
        for field, kind in fields_of(structure):
            inner = getattr(found, field)
            each = (
                [getattr(inner, one) for one, _ in fields_of(kind)] if issubclass(kind, ctypes.Structure) else [inner]
            )
            assert each == [next(expected) for _ in each], (name, field)


def test_the_numbers_of_the_header_are_those_of_python():
    dtypes = "SEQARCH_FLOAT32 = {}, SEQARCH_BFLOAT16 = {}, SEQARCH_FLOAT64 = {}".format(*cpu_library.DTYPES.values())
    assert f"enum {{ {dtypes} }};" in HEADER
    assert "enum { SEQARCH_IDENTITY = 0, SEQARCH_SILU = 1, SEQARCH_SIGMOID = 3 };" in HEADER
    assert fused._ACTIVATIONS == {None: 0, "silu": 1, "sigmoid": 3}


def test_the_instructions_of_the_header_are_those_of_python():
    """In the same order, under names that may be longer there."""
    kinds, codes = re.findall(r"enum \{\s+(SEQARCH_(?:MAP|COPY).*?)\};", HEADER, re.DOTALL)
    for listed, names in ((kinds, tape.KINDS), (codes, tape.CODES)):
        found = re.findall(r"SEQARCH_(\w+)", re.sub(r"/\*.*?\*/", "", listed))
        assert len(found) == len(names)
        for theirs, ours in zip(found, names, strict=True):
            spelled = {"exp": "exponential", "sin": "sine", "cos": "cosine"}.get(ours, ours)
            assert spelled in theirs.lower(), (theirs, ours)


def test_a_field_that_is_missing_or_unknown_is_an_error():
    packer = Packer(read_structures(SIZES)["sizes"])
    missing = {name: value for name, value in values().items() if name != "width"}
    with pytest.raises(TypeError, match=r"scan: sizes lacks \[width\], does not know \[\]"):
        packer("scan", missing, "cpu", [])
    with pytest.raises(TypeError, match=r"scan: sizes lacks \[width\], does not know \[height, widht\]"):
        packer("scan", {**missing, "widht": 3, "height": 1}, "cpu", [])
    assert len(packer("scan", values(), "cpu", [])) == 40


def test_what_c_reads_is_what_was_given():
    structure, held = read_structures(SIZES)["sizes"], []
    given = values(x=torch.tensor([5.0, 6.0]))
    packed = Packer(structure)("scan", given, "cpu", held)
    assert ctypes.cast(packed, ctypes.c_void_p).value % 8 == 0  # type: ignore[operator]
    found: Any = structure.from_buffer_copy(packed)
    assert list((ctypes.c_float * 2).from_address(found.x)) == [5.0, 6.0]
    assert list((ctypes.c_int64 * 2).from_address(found.offsets)) == [0, 2]
    assert (found.y, found.width, found.silu) == (None, 3, 1)


def test_a_kernel_takes_no_tensor_whose_numbers_are_elsewhere():
    x, freed, lent = torch.ones(2, 4), torch.ones(2, 4), torch.ones(8).view(2, 4)
    freed.untyped_storage().resize_(0)
    lent.untyped_storage().resize_(16)
    with FakeTensorMode():
        fake = torch.ones(2, 4)
    wrong = [
        (Pointer, x.to("meta"), "memory on meta, expected cpu"),
        (Heads, fake, "memory on meta, expected cpu"),
        (Pointer, freed, "a storage of 0 bytes, expected at least 32"),
        (Rows, lent, "a storage of 16 bytes, expected at least 32"),
        (Pointer, x.t(), "gaps after its first 0 dimensions"),
        (Rows, torch.ones(2, 4, 6)[..., ::2], "gaps after its first 2 dimensions"),
    ]
    packers = {kind: Packer(STRUCTURES[name]) for kind, name in FIELDS.items()}
    for kind, tensor, message in wrong:
        with pytest.raises(ValueError, match=f"scan: a tensor of shape .* {message}"):
            packers[kind]("scan", full(packers[kind], kind, tensor), "cpu", [])
    with pytest.raises(ValueError, match="memory on cpu, expected cuda"):
        packers[Pointer]("scan", full(packers[Pointer], Pointer, x), "cuda", [])
    fits = x, x[:, 1:3].unsqueeze(2), x.expand(3, 2, 4), torch.ones(2, 0), torch.ones(4, 2).t()[..., None]
    for tensor in fits:
        Heads.check("scan", tensor, "cpu")


FIELDS: dict[type[Pointer], str] = {
    Pointer: "linear_arguments",
    Rows: "causal_conv1d_gradients",
    Heads: "linear_attention_gradients",
}
"""A structure whose first such field is of this kind."""


def full(packer: Packer, kind: type[Pointer], tensor: torch.Tensor) -> dict[str, Any]:
    """Its fields, of which the first of a kind is the tensor, and the others nothing."""
    first = next(name for name, each in packer.fields if each is kind)
    return {name: 0 if each is None else tensor if name == first else None for name, each in packer.fields}


def test_memory_is_held_while_a_kernel_runs():
    """Another thread may give a tensor other memory meanwhile."""
    for kind, name in FIELDS.items():
        x, held, packer = torch.full((1, 2, 3), 7.0), [], Packer(STRUCTURES[name])
        packed = packer("scan", full(packer, kind, x), "cpu", held)
        x.data = torch.zeros(1, 2, 3)
        address = held[0].data_ptr()
        assert address.to_bytes(8, "little") in packed
        assert list((ctypes.c_float * 6).from_address(address)) == [7.0] * 6


def test_the_header_beside_the_library_is_that_of_the_sources():
    for isa in cpu_library.supported_isas():
        with cpu_library.use_isa(isa):
            beside = Path(cpu_library.library()._name).with_name("seqarch.h")
        assert beside.read_text(encoding="utf-8") == HEADER
