"""Stick-breaking attention against its definition, token by token, and every backend against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seqarch import ops
from seqarch.testing import assert_close
from tests.support.backends import available

BACKENDS = available("stick_breaking_attention")
EXACT = 1e-11


def make(queries: int, keys: int | None = None, rows: int = 2, heads: int = 4, groups: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(0)
    keys = queries if keys is None else keys
    shapes = {"q": (rows, queries, heads, 5), "k": (rows, keys, groups, 5), "v": (rows, keys, groups, 3)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def with_gradients(given: dict[str, Tensor], **options: Any) -> list[Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    results = ops.stick_breaking_attention(**leaves, **options)
    total = sum((each * torch.linspace(-1, 1, each.numel()).double().cos().view_as(each)).sum() for each in results)
    assert isinstance(total, Tensor)
    return [*(each.detach() for each in results), *torch.autograd.grad(total, list(leaves.values()))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_take_their_share_of_what_is_left(backend: str):
    """The stick of each query, broken key by key from the one before its own."""
    given = make(9)
    o, rest = ops.stick_breaking_attention(**given, scale=0.7, backend=backend)
    for row in range(2):
        for head in range(4):
            q, k, v = given["q"][row, :, head], given["k"][row, :, head // 2], given["v"][row, :, head // 2]
            for i in range(9):
                left, read = 1.0, torch.zeros(3, dtype=torch.float64)
                for j in reversed(range(i)):
                    taken = left * float(torch.sigmoid(0.7 * q[i] @ k[j]))
                    read, left = read + taken * v[j], left - taken
                torch.testing.assert_close(o[row, i, head], read, rtol=0, atol=1e-12)
                assert abs(float(rest[row, i, head]) - left) < 1e-12


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "recurrent_torch"])
def test_every_backend_equals_the_reference(backend: str):
    cases: list[tuple[dict[str, Tensor], dict[str, Any]]] = [
        (make(150), {}),
        (make(20, 190), {"scale": 0.4}),
        (make(1, 40), {"key_start": torch.tensor([0, 33])}),
        (make(30, 30), {"key_start": torch.tensor([7, 30])}),
        (make(140, rows=1), {"cu_seqlens": [0, 1, 1, 132, 140]}),
    ]
    for given, options in cases:
        expected = with_gradients(given, **options, backend="recurrent_torch")
        found = with_gradients(given, **options, backend=backend)
        for what, a, b in zip(("o", "rest", *given), found, expected, strict=True):
            assert_close(a, b, EXACT, f"{what}, {options}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_of_any_size_are_right(backend: str):
    given = make(40)
    for factor in (30.0, 1e4):
        strong = {"q": factor * given["q"], "k": given["k"], "v": given["v"]}
        o, rest = ops.stick_breaking_attention(**strong, backend=backend)
        expected, left = ops.stick_breaking_attention(**strong, backend="recurrent_torch")
        assert o.isfinite().all()
        torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(rest, left, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "recurrent_torch"])
def test_large_scores_are_right_in_float32(backend: str):
    """A weight is a product, whatever the scores: none is the difference of large numbers."""
    given = {name: x.float() for name, x in make(40).items()}
    for factor in (1e4, 1e8):
        strong = {"q": factor * given["q"], "k": given["k"], "v": given["v"]}
        expected = ops.stick_breaking_attention(**{n: x.double() for n, x in strong.items()}, backend="recurrent_torch")
        found = ops.stick_breaking_attention(**strong, backend=backend)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-2)


def test_gradcheck():
    given = [x.requires_grad_() for x in make(5, rows=1, heads=2, groups=1).values()]
    assert torch.autograd.gradcheck(lambda *x: ops.stick_breaking_attention(*x, backend="recurrent_torch"), given)


def test_wrong_arguments_are_named():
    given = make(4)
    with pytest.raises(ValueError, match="there are 4 queries and 3 keys, expected no more than keys"):
        ops.stick_breaking_attention(given["q"], given["k"][:, :3], given["v"][:, :3])
    with pytest.raises(ValueError, match="cu_seqlens packs queries and keys alike, got 4 and 6"):
        ops.stick_breaking_attention(**make(4, 6, rows=1), cu_seqlens=[0, 4])
