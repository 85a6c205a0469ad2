"""Captured steps of every mixer at real widths, and what many of them leave in memory."""

from __future__ import annotations

import ctypes
import gc
import sys

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from seqarch import ops
from seqarch.decoding.program import Program
from seqarch.layers import MIXERS, clone_state
from seqarch.models import Stack
from seqarch.testing import assert_close
from tests.support.one_token import NOT_CAPTURED

ROWS, WIDTH, PROMPT, TOKENS, BOUND = 4, 768, 507, 12, 3e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_a_captured_step_equals_the_layers_at_real_widths(name: str, monkeypatch: pytest.MonkeyPatch):
    """12 heads, 4 rows, from before 512 tokens to beyond them, where blocks end."""
    torch.manual_seed(0)
    runs, run = [], Program.run
    monkeypatch.setattr(Program, "run", lambda *given: runs.append(1) or run(*given))
    stack = Stack(d_model=WIDTH, pattern=name, depth=1, channel="none")
    _, state = stack(torch.randn(ROWS, PROMPT, WIDTH), stack.init_state(ROWS, PROMPT + TOKENS))
    other = clone_state(state)
    for _ in range(TOKENS):
        x = torch.randn(ROWS, 1, WIDTH)
        y, state = stack(x, state)
        with ops.record_backends():  # whoever looks at operations sees the layers run in torch
            expected, other = stack(x, other)
        assert_close(y, expected, BOUND, "y")
        for own, theirs in zip(pytree.tree_leaves(state), pytree.tree_leaves(other), strict=True):
            if isinstance(own, Tensor) and own.numel():
                assert_close(own, theirs, BOUND, "state")
            elif not isinstance(own, Tensor):
                assert own == theirs
    assert len(runs) == (0 if name in NOT_CAPTURED else TOKENS)


class _Allocated(ctypes.Structure):
    """Of glibc: ``hblkhd`` and ``uordblks`` are bytes in use, mapped by themselves and others."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    ]


def _in_use() -> tuple[int, int]:
    """Bytes that C has allocated, and blocks that Python has, without garbage."""
    gc.collect()
    count = ctypes.CDLL(None).mallinfo2
    count.restype = _Allocated
    now = count()
    return now.hblkhd + now.uordblks, sys.getallocatedblocks()


@pytest.mark.parametrize("tokens", [1000, pytest.param(100_000, marks=pytest.mark.slow)])
@torch.no_grad()
def test_tokens_leave_nothing_in_memory(tokens: int):
    torch.manual_seed(0)
    stack = Stack(d_model=32, pattern="mamba2 gated_delta_net", depth=2, channel="none")
    x, state = torch.randn(1, 1, 32), stack.init_state(1)

    def decode(count: int) -> None:
        nonlocal state
        for _ in range(count):
            _, state = stack(x, state)

    decode(200)
    grown = []
    for _ in range(4):  # whatever else this process does meanwhile, it does once
        before = _in_use()
        decode(tokens // 4)
        grown.append([now - then for now, then in zip(_in_use(), before, strict=True)])
    assert min(own for own, _ in grown) <= 0
    assert min(blocks for _, blocks in grown) < tokens // 100  # a list of free ones is longer or shorter
