"""Compiles the Triton kernels ahead of time, as calls would launch them, for machines that need not be here.

    python -m tests.support.triton_resources [--all] [FILE]    renews tests/data/triton_resources.json: what each needs

No GPU is needed: an operation is called on a CPU with its launches noted down instead of run, and each of them is
compiled for each compute capability. Which kernels there are, with which types and constants, is thereby what the
operations say. Kernels whose code, types and constants are those that FILE was made from are not compiled again, unless
all are asked for or Triton is another.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import multiprocessing
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from seqarch.ops.attention import chunk_triton as attention
from seqarch.ops.attention.inputs import AttentionInputs
from seqarch.ops.block_sparse_attention import grouped_triton as blocks
from seqarch.ops.block_sparse_attention.inputs import ListInputs
from seqarch.ops.delta_rule import chunk_triton as delta_chunks
from seqarch.ops.delta_rule import recurrent_triton as delta_steps
from seqarch.ops.delta_rule.inputs import DeltaRuleInputs
from seqarch.ops.experts import grouped_triton as experts
from seqarch.ops.gated_rnn import CELLS
from seqarch.ops.gated_rnn import recurrent_triton as gated_rnn
from seqarch.ops.gated_rnn.operators import KernelInputs as GatedInputs
from seqarch.ops.linear_attention import chunk_triton as linear_chunks
from seqarch.ops.linear_attention import recurrent_triton as linear_steps
from seqarch.ops.linear_attention.inputs import LinearAttentionInputs
from seqarch.ops.native.custom_op import Upstream
from seqarch.ops.triton import launch
from tests.support.paths import ROOT

RECORD = ROOT / "tests" / "data" / "triton_resources.json"
CAPABILITIES = (80, 90)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WIDTH, WIDTHS = 128, (64, 128)
"""Of heads of the recurrences, and of softmax attention."""

DECAYS: dict[str, tuple[int, ...] | None] = {"none": None, "head": (1, 128, 2), "key": (1, 128, 2, -1)}


@dataclass(frozen=True)
class Launch:
    """One kernel with the types of its arguments and its constants, under a name that tells them apart."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, int]
    name: str = field(compare=False)

    @classmethod
    def of(cls, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Launch:
        options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
        if isinstance(kernel, launch.Tuned):
            chosen, kernel = kernel.configurations[0], kernel.kernel
            constants |= chosen.tiles
            options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
        names = kernel.arg_names
        # As Triton does where a call is run: an integer that is 1 becomes part of the code.
        changing = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        given = [(name, x) for name, x in zip(names, arguments, strict=False) if name not in changing]
        constants |= {name: 1 for name, x in given if type(x) is int and x == 1}
        signature = dict(zip(names, map(kind, arguments), strict=False)) | dict.fromkeys(constants, "constexpr")
        divisible = {
            (place,): [["tt.divisibility", 16]]
            for place, argument in enumerate(arguments)
            if isinstance(argument, Tensor)
            or (isinstance(argument, int) and argument % 16 == 0 and names[place] not in changing)
        }
        flags = [f"{key}={getattr(value, 'name', value)}" for key, value in sorted(constants.items())]
        types = sorted({kind.removeprefix("*") for kind in signature.values() if kind.startswith("*")} - {"i64"})
        return cls(kernel, signature, constants, divisible, options, f"{kernel.__name__}({','.join(types + flags)})")

    @property
    def made_from(self) -> str:
        """A digest of all that the machine code depends on, but for Triton and the GPU."""
        parts = (
            code(self.kernel),
            self.signature,
            sorted(map(str, self.constants.items())),
            self.divisible,
            self.options,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def compile(self, capability: int) -> Any:
        source = ASTSource(self.kernel, self.signature, self.constants, self.divisible)
        options = self.options | {"enable_fp_fusion": True}
        with launch.multiplying(self.constants):
            return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def kind(argument: Any) -> str:
    """Triton's name for an argument's type."""
    if isinstance(argument, Tensor):
        names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64"}
        return f"*{names[argument.dtype]}"
    return "fp32" if isinstance(argument, float) else "i32"


def code(function: JITFunction, seen: frozenset[str] = frozenset()) -> str:
    """The syntax of a kernel, of the functions that it calls and of the constants that it reads; without comments and
    places, so that a kernel that was moved is the same."""
    tree, texts = function.parse(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            value = function.fn.__globals__.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            value = getattr(function.fn.__globals__.get(node.value.id), node.attr, None)
        else:
            continue
        if isinstance(value, JITFunction) and value.__name__ not in seen:
            texts.append(code(value, seen | {function.__name__}))
        elif isinstance(value, (bool, int, float, str, tl.constexpr)):
            texts.append(f"{ast.unparse(node)}={value}")
    return "\n".join(dict.fromkeys([ast.unparse(tree), *texts]))


def resources(compiled: Any) -> dict[str, int]:
    """Registers and spilled bytes of a thread, and shared memory of a block in bytes.

    Raises:
        RuntimeError: the kernel does what Triton from 3.4 on gets wrong on Hopper: it transposes in registers, or
            hands numbers to the tensor cores in the layout that this leads to; or its machine code addresses operands
            of the tensor cores by numbers that are no addresses.
    """
    code = compiled.asm["ttgir"]
    if re.search(r"tt\.trans .*order = array<i32: 1, 0>", code):
        raise RuntimeError(f"{compiled.metadata.name} transposes in registers: read the tile transposed instead")
    if re.search(r"warp_group_dot .*#linear", code):
        raise RuntimeError(f"{compiled.metadata.name} multiplies a matrix that was reshaped in registers")
    if wrong := stray_descriptors(disassembled(compiled.asm["cubin"], "nvdisasm", "-c")):
        raise RuntimeError(f"{compiled.metadata.name} takes for the address of a matrix: {'; '.join(wrong)}")
    text = disassembled(compiled.asm["cubin"], "cuobjdump", "-res-usage")
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"], "shared": compiled.metadata.shared}


def disassembled(cubin: bytes, tool: str, *options: str) -> str:
    """What a tool that comes with Triton says of machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


MOVES = r"(U?MOV|R2UR|U?LEA|U?IADD3?|VIADD|IMAD|U?SHF|U?SGXT|U?LOP3|U?SEL)\b"
"""Operations of machine code that make one address of another."""

SOURCES = r"(S2U?R|U?LDC|LDL|CS2R)\b"
"""Those where one may begin: a special register, a constant, or the stack, where it was put by."""


def stray_descriptors(code: str) -> list[str]:
    """The instructions whose result a product of a group of warps takes for the address of its second operand, though
    it is a number read from memory, one of an operation on floats, or the stack's own address.

    Definitions are followed backwards, in the order of the code and by their first operand.
    """
    lines = [found[1].strip() for found in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", code)]
    instructions = [re.sub(r"^@!?U?P\w+\s+", "", line).partition(" ") for line in lines]
    wrong: dict[str, None] = {}
    for place, line in enumerate(lines):
        if not (found := re.match(r"HGMMA\S*\s+\S+ \S+ gdesc\[UR(\d+)\]", line)):
            continue
        register = f"UR{int(found[1]) + 2}"
        for at in range(place - 1, -1, -1):
            name, _, operands = instructions[at]
            target, _, read = operands.partition(",")
            if target.strip() != register:
                continue
            if re.match(SOURCES, name):
                break
            first = re.search(r"\bU?R\d+\b", read)
            if not re.match(MOVES, name) or (first and first[0] == "R1"):
                wrong[lines[at]] = None
            if not re.match(MOVES, name) or not first or first[0] == "R1":
                break
            register = first[0]
    return list(wrong)


@functools.cache
def launches() -> list[Launch]:
    """Each launch of forward and backward passes, in every dtype and kind of decay, for heads of those widths."""
    noted: dict[str, Launch] = {}

    def note(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        launch = Launch.of(kernel, arguments, constants)
        noted.setdefault(launch.name, launch)

    before, launch.launch = launch.launch, note
    try:
        for dtype in DTYPES.values():
            for decay in DECAYS.values():
                recurrences(dtype, WIDTH, decay)
            gated(dtype, WIDTH)
            for width in WIDTHS:
                softmax(dtype, width)
            products(dtype)
    finally:
        launch.launch = before
    return list(noted.values())


def recurrences(dtype: torch.dtype, width: int, decay: tuple[int, ...] | None) -> None:
    """Both operations on 128 tokens of two heads, in chunks and in steps, forward and backward."""
    x, state = torch.zeros(1, 128, 2, width, dtype=dtype), torch.zeros(1, 2, width, width)
    log_decay = None if decay is None else torch.zeros([width if size < 0 else size for size in decay])
    beta = torch.zeros(1, 128, 2, dtype=dtype)
    linear = LinearAttentionInputs(x, x, x, log_decay, 0.5, state, None)
    delta = DeltaRuleInputs(x, x, x, beta, log_decay, None, None, 0.5, state, None)
    for chunks, steps, inputs in ((linear_chunks, linear_steps, linear), (delta_chunks, delta_steps, delta)):
        chunks.forward(inputs)
        chunks.backward(inputs, Upstream([], [x, state], []))
        steps.forward(inputs)


def gated(dtype: torch.dtype, width: int) -> None:
    """Each cell over 16 tokens of two heads, forward with the states of every step and backward."""
    for cell, (gates, states) in CELLS.items():
        x, weight = torch.zeros(1, 16, 2, gates, width, dtype=dtype), torch.zeros(2, gates, width, width)
        inputs = GatedInputs(x, weight, weight[..., 0], torch.zeros(1, states, 2, width), cell, None, True)
        o, last, steps = gated_rnn.forward(inputs)
        gated_rnn.backward(inputs, Upstream([steps], [o, last], []))


def softmax(dtype: torch.dtype, width: int) -> None:
    """Attention over all keys and, with a gradient of its sums, over a window from where rows begin; over blocks with
    one head per list; of few queries: of one over its keys in one part and in many, of several with heads that share
    keys; with a bias of each key and without."""
    x, start = torch.zeros(1, 256, 2, width, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    one, several = x[:, :1], torch.zeros(1, 16, 16, width, dtype=dtype)
    for window, key_start, biased in ((0, None, False), (100, start, False), (0, None, True)):
        inputs = AttentionInputs(x, x, x, True, window, 0.5, None, key_start)
        inputs = inputs.replace(key_bias=torch.zeros(1, 256, 2)) if biased else inputs
        o, log_sum = attention.forward(inputs)
        attention.backward(inputs, Upstream([o, log_sum], [o, log_sum] if window else [o], [True] * 3))
        for queries, keys in ((one, x[:, :16]), (one, x), (several, x)):
            bias = torch.zeros(1, keys.shape[1], queries.shape[2]) if biased else None
            attention.forward(inputs.replace(q=queries, k=keys, v=keys, key_bias=bias))
    entries, first = torch.zeros(1, 256, 2, 3, dtype=torch.int64), torch.zeros(1, 256, dtype=torch.int64)
    inputs = ListInputs(x, x, x, entries, first, 64, 0, 0.5)
    o, log_sum = blocks.forward(inputs)
    blocks.backward(inputs, Upstream([o, log_sum], [o], [True] * 3))
    blocks.forward(inputs.replace(q=one, lists=entries[:, :1], first=first[:, :1]))


def products(dtype: torch.dtype) -> None:
    """Rows of two experts times their matrices and these transposed, and the gradient of the matrices."""
    rows, weight, starts = torch.zeros(256, 512, dtype=dtype), torch.zeros(2, 512, 512, dtype=dtype), [0, 128, 256]
    for matrices in (weight, weight.transpose(1, 2)):
        experts.grouped_matmul(rows, matrices, torch.tensor(starts))
    experts.grouped_outer(rows, rows, torch.tensor(starts))


def needs(index: int) -> tuple[str, dict[str, Any]]:
    """The name of a launch, and what it needs on each compute capability."""
    launch = launches()[index]
    found = {f"{capability / 10}": resources(launch.compile(capability)) for capability in CAPABILITIES}
    return launch.name, found | {"made_from": launch.made_from}


def record(kept: dict[str, Any], every: int = 1) -> dict[str, Any]:
    """What each launch needs, and the version of Triton: of those launches that ``kept``, an older record, has as they
    are now, its own words, unless its Triton is another. Of the others one in ``every`` is compiled, the rest left out.
    """
    names = {launch.name: launch.made_from for launch in launches()}
    kept = kept if kept.get("triton") == triton.__version__ else {}
    same = {name: kept[name] for name, made_from in names.items() if kept.get(name, {}).get("made_from") == made_from}
    new = [index for index, name in enumerate(names) if name not in same][::every]
    with multiprocessing.get_context("spawn").Pool() as pool:
        return {"triton": triton.__version__} | dict(sorted((same | dict(pool.map(needs, new, chunksize=1))).items()))


def main() -> None:
    command = argparse.ArgumentParser(
        "python -m tests.support.triton_resources", description=(__doc__ or "").splitlines()[0]
    )
    command.add_argument("file", nargs="?", type=Path, default=RECORD, help=f"which is renewed; default: {RECORD}")
    command.add_argument("--all", action="store_true", help="compile what has not changed, too")
    command.add_argument("--every", type=int, default=1, metavar="N", help="compile one in N, and leave the others out")
    given = command.parse_args()
    kept = {} if given.all or not given.file.exists() else json.loads(given.file.read_text(encoding="utf-8"))
    lines = [f"{json.dumps(name)}: {json.dumps(each)}" for name, each in record(kept, given.every).items()]
    given.file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
