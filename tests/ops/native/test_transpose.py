"""A matrix transposed into columns of another."""

from __future__ import annotations

import pytest
import torch

from seqarch.ops.native import cpu_library
from seqarch.ops.native.transpose import transpose_into

SHAPES = ((64, 64, 0, 0), (65, 70, 3, 2), (1, 5, 2, 0), (96, 130, 32, 1), (90, 70, 32, 70), (0, 4, 1, 1), (4, 0, 0, 0))
"""Rows, columns, and how many columns the result has before and after."""


@pytest.mark.parametrize("isa", cpu_library.supported_isas())
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_columns_are_the_rows_and_what_is_beside_them_stays(isa: str, dtype: torch.dtype):
    with cpu_library.use_isa(isa):
        for rows, columns, before, after in SHAPES:
            x, y = torch.randn(rows, columns).mul(9).to(dtype), torch.ones(columns, before + rows + after, dtype=dtype)
            expected = y.clone()
            expected[:, before : before + rows] = x.T
            for threads in (None, 1, 3):
                made = y.clone()
                transpose_into(x, made, before, threads=threads)
                assert torch.equal(made, expected), (rows, columns, before, after)


def test_strided_matrices_and_a_machine_without_the_library(monkeypatch: pytest.MonkeyPatch):
    x, y = torch.randn(6, 8)[:, ::2], torch.zeros(6, 4).T
    transpose_into(x, y)
    assert torch.equal(y, x.T)
    monkeypatch.setattr(cpu_library, "_reason", "not here")
    whole = torch.zeros(4, 8)
    transpose_into(x, whole, 2)
    assert torch.equal(whole[:, 2:], x.T)


@pytest.mark.parametrize(("shape", "first"), [((4, 5), 3), ((4, 5), -1), ((5, 5), 0)])
def test_a_place_beside_the_result_is_refused(shape: tuple[int, int], first: int):
    with pytest.raises(ValueError, match=f"columns {first} to {first + 2} of y "):
        transpose_into(torch.ones(3, 4), torch.ones(shape), first)
