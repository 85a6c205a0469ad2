"""No kernel reads or writes outside its tensors: interpreted, with inputs that end where memory may not be touched.

In processes of their own, which a stray access ends by a signal.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

GUARDED = """
import ctypes, mmap, sys
import torch
from seqarch import ops
from seqarch.ops import OPS

libc = ctypes.CDLL(None, use_errno=True)
kept = []

def guarded(x, first):
    '''The numbers in pages of their own: at the end of them, or at the start, and past that nothing may be touched.'''
    size, page = x.numel() * x.element_size(), mmap.PAGESIZE
    room = -(-size // page) * page
    area = mmap.mmap(-1, room + 2 * page)
    kept.append(area)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for edge in (start, start + page + room):
        assert libc.mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(page), 0) == 0
    offset = page if first else page + room - size
    out = torch.frombuffer(area, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
    return out.copy_(x).requires_grad_(x.is_floating_point())
"""

CALLS = {
    "linear_attention": """
x = torch.randn(3, 1, 66, 2, 5)
decay = -torch.rand(1, 66, 2)
call = lambda q, k, v, g: ops.linear_attention(q, k, v, g, backend="chunk_triton")[0]
inputs = [*x, decay]
""",
    "delta_rule": """
x = torch.randn(3, 1, 18, 1, 5)
call = lambda q, k, v, b, g: ops.delta_rule(q, k, v, b, g, backend="chunk_triton")[0]
inputs = [*x, torch.rand(1, 18, 1), -torch.rand(1, 18, 1, 5)]
""",
    "steps": """
x = torch.randn(3, 2, 1, 2, 5)
call = lambda q, k, v, g: ops.linear_attention(q, k, v, g, backend="recurrent_triton")[0]
inputs = [*x, -torch.rand(2, 1, 2, 5)]
""",
    "attention": """
call = lambda q, k, v, b: ops.attention(q, k, v, window=20, key_bias=b, backend="chunk_triton")
inputs = [torch.randn(1, 70, 2, 5), torch.randn(1, 75, 1, 5), torch.randn(1, 75, 1, 3), torch.randn(1, 75, 2)]
""",
    "attention_of_one_query": """
call = lambda q, k, v, b: ops.attention(q, k, v, key_bias=b, backend="chunk_triton")
inputs = [torch.randn(2, 1, 2, 5), torch.randn(2, 375, 1, 5), torch.randn(2, 375, 1, 3), torch.randn(2, 375, 2)]
""",
    "block_sparse_attention": """
call = lambda q, k, v, i: ops.block_sparse_attention(q, k, v, i, 16, window=5, backend="grouped_triton")
index = torch.randint(-1, 3, (1, 37, 1, 2))
inputs = [torch.randn(1, 37, 2, 5), torch.randn(1, 37, 1, 5), torch.randn(1, 37, 1, 3), index]
""",
    "blocks_of_one_query": """
call = lambda q, k, v, i: ops.block_sparse_attention(q, k, v, i, 16, window=5, backend="grouped_triton")
index = torch.tensor([[[[2, -1]]], [[[0, 1]]]])
inputs = [torch.randn(2, 1, 2, 5), torch.randn(2, 37, 1, 5), torch.randn(2, 37, 1, 3), index]
""",
    "gated_rnn": """
call = lambda x, w, b, s: ops.gated_rnn(x, w, b, cell="slstm", state=s, backend="recurrent_triton")[0]
inputs = [torch.randn(2, 3, 2, 4, 5), torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5), torch.rand(2, 4, 2, 5)]
""",
    "experts": """
index = torch.randint(-1, 3, (20, 2))
call = lambda x, a, b: ops.experts(x, a, b, index, torch.ones(20, 2), backend="grouped_triton")
inputs = [torch.randn(20, 5), torch.randn(3, 5, 7), torch.randn(3, 7, 5)]
""",
}

RUN = """
torch.manual_seed(0)
for first in (False, True):
    leaves = [guarded(x, first) for x in inputs]
    call(*leaves).sum().backward()
"""

STRAY = """
import triton, triton.language as tl
@triton.jit
def stray(x, out, n):
    tl.store(out + tl.arange(0, 16), tl.load(x + tl.arange(0, 16) + n))
x = guarded(torch.zeros(16), False).detach()
stray[(1,)](x, torch.empty(16), int(sys.argv[1]))
"""


def run(program: str, *arguments: str, folder: Path) -> int:
    """The exit status of a program in which kernels are interpreted."""
    file = folder / "program.py"  # kernels are read from a file
    file.write_text(GUARDED + program)
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, file, *arguments], env=environment, cwd=ROOT).returncode


QUICK = ("block_sparse_attention", "blocks_of_one_query")
EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CALLS]


@pytest.mark.parametrize("name", EACH)
def test_inputs_may_end_where_memory_does(name: str, tmp_path: Path):
    assert run(CALLS[name] + RUN, folder=tmp_path) == 0


def test_a_stray_read_would_show(tmp_path: Path):
    assert run(STRAY, "0", folder=tmp_path) == 0
    assert run(STRAY, "1", folder=tmp_path) == -signal.SIGSEGV
