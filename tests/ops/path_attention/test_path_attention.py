"""Path attention against its definition, matrix by matrix, and every backend against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch import ops
from seqarch.testing import assert_close
from tests.support.backends import available

BACKENDS = available("path_attention")
EXACT = 1e-11


def make(
    queries: int, keys: int | None = None, rows: int = 2, heads: int = 4, groups: int = 2, bias: bool = False
) -> dict[str, Any]:
    torch.manual_seed(0)
    keys = queries if keys is None else keys
    shapes = {"q": (rows, queries, heads, 5), "k": (rows, keys, groups, 5), "v": (rows, keys, groups, 3)}
    given: dict[str, Any] = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    given["w"] = F.normalize(torch.randn(rows, queries, groups, 5, dtype=torch.float64), dim=-1)
    given["beta"] = 2 * torch.rand(rows, queries, groups, dtype=torch.float64)
    return given | ({"key_bias": torch.randn(rows, keys, heads, dtype=torch.float64)} if bias else {})


def with_gradients(given: dict[str, Any], **options: Any) -> list[Tensor]:
    leaves: dict[str, Any] = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    results = ops.path_attention(**leaves, **options)
    total = sum((each * torch.linspace(-1, 1, each.numel()).double().cos().view_as(each)).sum() for each in results)
    assert isinstance(total, Tensor)
    return [*(each.detach() for each in results), *torch.autograd.grad(total, list(leaves.values()))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_go_by_the_matrices_of_the_tokens_between(backend: str):
    """Section 2: the score of t and j is ``q_t^T H_t ... H_{j+1} k_j``."""
    given = make(9, bias=True)
    o, keys = ops.path_attention(**given, scale=0.7, backend=backend)
    for row in range(2):
        for head in range(4):
            q, bias = given["q"][row, :, head], given["key_bias"][row, :, head]
            k, v, w, beta = (given[name][row, :, head // 2] for name in ("k", "v", "w", "beta"))
            factors = torch.eye(5).double() - beta[:, None, None] * w.unsqueeze(-1) * w.unsqueeze(-2)
            for t in range(9):
                turned = []
                for j in range(t + 1):
                    product = torch.eye(5).double()
                    for factor in factors[j + 1 : t + 1]:
                        product = factor @ product
                    turned.append(product @ k[j])
                weights = (0.7 * torch.stack(turned) @ q[t] + bias[: t + 1]).softmax(0)
                torch.testing.assert_close(o[row, t, head], weights @ v[: t + 1], rtol=0, atol=1e-12)
            torch.testing.assert_close(keys[row, :, head // 2], torch.stack(turned), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "recurrent_torch"])
def test_every_backend_equals_the_reference(backend: str):
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (make(150), {}),
        (make(20, 190, bias=True), {"scale": 0.4}),
        (make(1, 40), {"key_start": torch.tensor([0, 33])}),
        (make(30, 30, bias=True), {"key_start": torch.tensor([7, 30])}),
        (make(140, rows=1), {"cu_seqlens": [0, 1, 1, 132, 140]}),
    ]
    for given, options in cases:
        expected = with_gradients(given, **options, backend="recurrent_torch")
        found = with_gradients(given, **options, backend=backend)
        for what, a, b in zip(("o", "keys", *given), found, expected, strict=True):
            assert_close(a, b, EXACT, f"{what}, {options}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_goes_on_from_the_keys_of_the_one_before(backend: str):
    given = make(200)
    o, keys = ops.path_attention(**given, backend=backend)
    begun: dict[str, Any] = {name: x[:, :130] for name, x in given.items()}
    first, after = ops.path_attention(**begun, backend=backend)
    k = torch.cat([after, given["k"][:, 130:]], dim=1)
    new: dict[str, Any] = {name: given[name][:, 130:] for name in ("q", "w", "beta")}
    second, last = ops.path_attention(**new, k=k, v=given["v"], backend=backend)
    assert_close(torch.cat([first, second], dim=1), o, EXACT)
    assert_close(last, keys, EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_factors_are_attention_and_reflections_keep_lengths(backend: str):
    given = make(150)
    plain = ops.attention(given["q"], given["k"], given["v"])
    still: dict[str, Any] = given | {"beta": torch.zeros_like(given["beta"])}
    o, keys = ops.path_attention(**still, backend=backend)
    assert_close(o, plain, EXACT)
    assert_close(keys, given["k"], EXACT)
    low: dict[str, Any] = {name: x.float() for name, x in given.items()} | {"beta": torch.full((2, 150, 2), 2.0)}
    _, keys = ops.path_attention(**low, backend=backend)
    assert_close(keys.double().norm(dim=-1), given["k"].norm(dim=-1), 1e-5)


def test_float32_and_bfloat16_beside_float64_over_many_tokens():
    """Products of 2500 matrices."""
    given = make(2500, rows=1, heads=2, groups=1)
    expected, turned = ops.path_attention(**given)
    o, keys = ops.path_attention(**{name: x.float() for name, x in given.items()})
    assert_close(o.double(), expected, 1e-5)
    assert_close(keys.double(), turned, 1e-5)
    low: dict[str, Any] = {name: x.bfloat16() for name, x in given.items()}
    o, keys = ops.path_attention(**low)
    expected, turned = ops.path_attention(**{name: x.double() for name, x in low.items()})
    assert o.dtype == keys.dtype == torch.bfloat16
    assert_close(o.double(), expected, 0.01)
    assert_close(keys.double(), turned, 0.01)


def test_gradcheck():
    given = [x.requires_grad_() for x in make(5, rows=1, heads=2, groups=1).values()]
    assert torch.autograd.gradcheck(lambda *x: ops.path_attention(*x, backend="recurrent_torch"), given)


def test_wrong_arguments_are_named():
    given = make(4)
    with pytest.raises(ValueError, match="there are 4 queries and 3 keys, expected no more than keys"):
        ops.path_attention(**given | {"k": given["k"][:, :3], "v": given["v"][:, :3]})
    with pytest.raises(ValueError, match="cu_seqlens packs queries and keys alike, got 4 and 6"):
        ops.path_attention(**make(4, 6, rows=1), cu_seqlens=[0, 4])
    with pytest.raises(ValueError, match="w"):
        ops.path_attention(**given | {"w": given["w"][:, :3]})
