"""One decoded token of a model of bfloat16 in a compiled call: float32 but for what is stored."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from seqarch.models import Stack
from seqarch.testing import assert_close
from tests.support.one_token import CAPTURED, Runs, in_torch, make


def of_float32(state: Any) -> Any:
    """A copy in which what bfloat16 holds is float32."""
    return pytree.tree_map_only(Tensor, lambda t: t.float() if t.dtype == torch.bfloat16 else t.clone(), state)


@torch.no_grad()
def compare_bfloat16(stack: Stack, rows: int, runs: Runs, tokens: int = 4, context: int = 7) -> None:
    """Each token against float32, from the same weights, input and state: only what is stored is rounded."""
    wide, width = copy.deepcopy(stack).float(), stack.config.d_model
    _, state = stack(torch.randn(rows, context, width).bfloat16(), stack.init_state(rows, context + tokens + 1))
    for _ in range(tokens):
        x, before, expected_from = torch.randn(rows, 1, width).bfloat16(), runs.count, of_float32(state)
        y, state = stack(x, state)
        assert runs.count == before + 1
        expected, after = in_torch(wide, x.float(), expected_from)
        assert y.dtype == torch.bfloat16
        assert_close(y.float(), expected, ROUNDED, "y")
        for own, theirs in zip(pytree.tree_leaves(state), pytree.tree_leaves(after), strict=True):
            if isinstance(own, Tensor) and own.numel():
                assert_close(own.float(), theirs.float(), ROUNDED, "state")


ROUNDED = 5e-3
"""Of the largest number: a rounding to bfloat16, of 8 bits, and what a rounded key or value does to the output."""


QUICK = ("attention", "mla", "moba", "gla", "mamba", "mamba2", "gated_delta_net", "rg_lru", "lstm", "gated_short_conv")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CAPTURED])
def test_bfloat16_rounds_what_it_stores(name: str, runs: Runs):
    stack = make(name, depth=1, width=64).bfloat16()
    compare_bfloat16(stack, 2, runs, context=40)
    assert all(said.startswith("compiled") for said in stack.explain_one_token())


@pytest.mark.usefixtures("isa")
def test_bfloat16_on_every_instruction_set(runs: Runs):
    shared = {"attention": {"num_heads": 12, "num_kv_heads": 1, "head_dim": 56}}
    options = {"channels": {"mlp": {"activation": "gelu", "bias": True}}, "branch_norm": True, "mixers": shared}
    for pattern in ("mamba/swiglu", "gated_delta_net+attention/mlp", "mla"):
        stack = make(pattern, **options).bfloat16()
        for rows in (1, 8):
            compare_bfloat16(stack, rows, runs)
