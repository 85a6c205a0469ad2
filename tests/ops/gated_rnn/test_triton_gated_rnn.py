"""The Triton kernels of gated recurrences against the reference: on a CUDA device, or else interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from seqarch import ops
from seqarch.ops.gated_rnn import CELLS, recurrent_triton
from seqarch.ops.triton import availability
from seqarch.testing import assert_close
from tests.ops.chunked.test_triton_recurrences import BOUND, DEVICE, EXACT
from tests.ops.gated_rnn.test_gated_rnn import NAMES, Sizes, call, make, with_gradients

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    """Kernels run: on the device, or else by the interpreter."""
    with nullcontext() if DEVICE == "cuda" else availability.interpreted():
        yield


def compare(cell: str, sizes: Sizes, rows: int | None = None, dtype: torch.dtype = EXACT, **options: Any) -> None:
    given = make(cell, sizes, rows, dtype)
    right = with_gradients(call(cell, "recurrent_torch", **options), [x.double() for x in given])
    found = with_gradients(call(cell, "recurrent_triton", **options), [x.to(DEVICE) for x in given])
    for name, one, other in zip(NAMES, found, right, strict=True):
        assert_close(one.cpu(), other, BOUND[dtype], name)


@pytest.mark.parametrize("cell", CELLS)
def test_packed_sequences_equal_the_reference(cell: str):
    compare(cell, (1, 6, 2, 5), 3, cu_seqlens=[0, 4, 4, 6])


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_other_shapes_and_dtypes_equal_the_reference(cell: str):
    compare(cell, (3, 20, 2, 33))
    compare(cell, (1, 1, 1, 1))
    compare(cell, (2, 9, 1, 16), dtype=torch.bfloat16)


def test_wide_heads_are_refused():
    x = make("gru", (1, 1, 1, 129), dtype=torch.float32)
    inputs = ops.OPS["gated_rnn"].inputs(*x[:3], cell="gru")
    assert recurrent_triton.unsupported(inputs) == "heads are 129 wide, expected at most 128"
