"""The Triton kernels compile for GPUs that are not here, and fit them.

In a process of its own: this one has loaded Triton to interpret.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

RECORD = ROOT / "tests" / "data" / "triton_resources.json"
MOST_SHARED = {"8.0": 163 * 1024, "9.0": 227 * 1024}
"""Shared memory that one block may have, in bytes (CUDA C++ programming guide, table of compute capabilities)."""

KERNELS = [
    path for path in sorted((ROOT / "seqarch").glob("**/*.py")) if "@triton.jit" in path.read_text(encoding="utf-8")
]


SPILLING = {
    "bf16": {"invert"},
    "fp16": {"invert"},
    "fp32": {
        *("corrected_gradients", "corrected_states", "invert", "scores", "value_gradients"),
        *("attend", "key_gradients", "query_gradients"),
    },
}
"""By dtype of the activations, the kernels in which some thread runs out of registers: what is left to mend."""


def test_the_record_fits_the_devices():
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    spilling: dict[str, set[str]] = {dtype: set() for dtype in SPILLING}
    for name, needs in record.items():
        for capability, most in MOST_SHARED.items() if name != "triton" else ():
            assert needs[capability]["shared"] <= most, (name, capability)
            if needs[capability]["spilled"]:
                dtype = next(dtype for dtype in SPILLING if dtype in name.partition("ACC")[0])
                spilling[dtype].add(name.partition("(")[0])
    assert spilling == SPILLING


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_transpose_only_as_they_read(path: Path):
    """Products of transposed products are what Triton 3.4 to 3.7.0 gets wrong on Hopper."""
    assert not re.search(r"tl\.(trans|permute)\b|\.(T|trans|permute)\b", path.read_text(encoding="utf-8"))


NAMES = """
import json
from tests.support.triton_resources import launches
print(json.dumps({launch.name: launch.made_from for launch in launches()}))
"""


def test_the_record_was_made_from_the_kernels_as_they_are():
    """Where it was not, ``python -m tests.support.triton_resources`` renews it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", NAMES], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert json.loads(done.stdout) == {name: needs["made_from"] for name, needs in record.items() if name != "triton"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_record_is_what_the_kernels_need(tmp_path: Path):
    """Exactly, of one kernel in eight, with the Triton that wrote it, since the same code gives the same machine code;
    with another one, all must compile and fit."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    same = record["triton"] == importlib.metadata.version("triton")
    command = [sys.executable, "-m", "tests.support.triton_resources", "--every", "8" if same else "1"]
    subprocess.run([*command, str(tmp_path / "found.json")], cwd=ROOT, env=environment, check=True)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert len(found) - 1 == (-(-(len(record) - 1) // 8) if same else len(record) - 1)
    assert found["triton"] != record["triton"] or found.items() <= record.items()
    for name, needs in found.items():
        for capability, most in MOST_SHARED.items() if name != "triton" else ():
            assert needs[capability]["shared"] <= most, (name, capability)


FAULTY = """
        /*48b0*/                   MOV R143, UR8 ;
        /*4920*/                   R2UR UR8, R143 ;
        /*49d0*/                   UMOV UR6, UR8 ;
        /*4a90*/                   IADD3 R12, P1, R1, 0x2, RZ ;
        /*4ab0*/                   HGMMA.64x8x8.F32.TF32 R40, R36, gdesc[UR4], RZ, !UPT ;
        /*4af0*/                   R2UR UR6, R12 ;
        /*4b40*/                   HGMMA.64x8x8.F32.TF32 R40, R32, gdesc[UR4], R40 ;
        /*4b50*/              @!P0 LDG.E R19, desc[UR4][R4.64+0x33c0] ;
        /*4b60*/                   IADD3 R14, P4, R19, 0x4, RZ ;
        /*4b70*/                   R2UR UR10, R14 ;
        /*4b80*/                   HGMMA.64x8x8.F32.TF32 R40, R32, gdesc[UR8], R40 ;
"""
"""Of machine code that read illegal memory on an H200: the first product's address is right."""


def test_addresses_of_operands_are_followed_to_where_they_come_from():
    code = """
from tests.support.triton_resources import stray_descriptors
import sys
print(*stray_descriptors(sys.stdin.read()), sep="; ")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], input=FAULTY, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "IADD3 R12, P1, R1, 0x2, RZ; @!P0 LDG.E R19, desc[UR4][R4.64+0x33c0]"


PRODUCTS = """
import triton.language as tl
from seqarch.ops.delta_rule import kernels
from seqarch.ops.triton import launch
from tests.support.triton_resources import Launch
import torch

x, starts = torch.zeros(1, 1, 1), torch.zeros(1, dtype=torch.int64)
for work in (torch.float32, torch.bfloat16):
    tiles = {"D": 16, "BLOCK": 16, "DECAY": 0, "WORK": launch.TYPES[work], "ACC": tl.float32, "num_warps": 4}
    arguments = (x, x.to(work), x.to(work), x, x, x.to(work), starts, starts, 16, 16, 2, 2)
    one = Launch.of(kernels.solve, arguments, {**tiles, "PRECISION": launch.precision(exact=work == torch.float32)})
    code = one.compile(90).asm["ptx"]
    print(code.count("wgmma.mma_async") > 0, code.count("mma.sync") > 0)
"""


def test_float32_products_go_without_instructions_for_groups_of_warps(tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", PRODUCTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True", "False"]


GROWING = """
import torch
from seqarch.ops.attention.inputs import AttentionInputs
from seqarch.ops.block_sparse_attention.inputs import ListInputs
from tests.support import triton_resources
from tests.support.triton_resources import attention, blocks

def tokens():
    triton_resources.recurrences = triton_resources.products = triton_resources.gated = lambda *_: None
    triton_resources.DTYPES, triton_resources.WIDTHS = {"bfloat16": torch.bfloat16}, (64,)
    for keys in range(300, 340):
        q, k = (torch.zeros(1, length, 2, 64, dtype=torch.bfloat16) for length in (1, keys))
        entries, first = torch.zeros(1, 1, 2, 3, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)

        def softmax(*_):
            attention.forward(AttentionInputs(q, k, k, True, 0, 0.5, None, None))
            attention.forward(AttentionInputs(q, k, k, True, 1000, 0.5, None, first[0]))
            blocks.forward(ListInputs(q, k, k, entries, first, 64, 0, 0.5))

        triton_resources.softmax = softmax
        triton_resources.launches.cache_clear()
        yield {launch.name: launch.divisible for launch in triton_resources.launches()}

before, *others = tokens()
assert len(before) == 5, before.keys()
assert all(other == before for other in others)
"""


def test_nothing_is_compiled_anew_for_each_token():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", GROWING], cwd=ROOT, env=environment, check=True)


SPILLS = """
import torch
from seqarch.ops.attention import launches_triton
from tests.support import triton_resources

right = launches_triton.tiles
launches_triton.tiles = lambda width, wide: right(64, wide)  # tiles of half the width
triton_resources.DTYPES, triton_resources.DECAYS, triton_resources.WIDTHS = {"float32": torch.float32}, {}, (128,)
names = {each.name: each for each in triton_resources.launches()}
wanted = {"BIAS=False", "START=False"}
(name,) = [name for name in names if name.startswith("query_gradients(") and wanted <= {*name[:-1].split(",")}]
launch = names[name]
print(triton_resources.resources(launch.compile(80))["spilled"])
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_change_that_spills_shows(tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run([sys.executable, "-c", SPILLS], cwd=ROOT, env=environment, capture_output=True, text=True)
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    name = next(
        n
        for n in record
        if n.startswith("query_gradients(fp32,") and {"BIAS=False", "K=128", "START=False"} <= {*n[:-1].split(",")}
    )
    assert int(done.stdout) > 1000 > record[name]["8.0"]["spilled"]
