"""The language of weight tables: every step and its inverse, and what is wrong named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seqarch.interop.settings import pattern_of
from seqarch.interop.weights import (
    WeightMap,
    concatenate,
    pairs_to_halves,
    reorder,
    reshape,
    rule,
    split,
    squeeze,
    transpose,
    under,
)

A, B = torch.arange(6.0).reshape(3, 2), 10 + torch.arange(4.0).reshape(2, 2)

STEPS = [
    (rule("a", "x"), {"x": A}),
    (rule(("a", "b"), "x", concatenate(3, 2)), {"x": torch.cat([A, B])}),
    (rule("a", ("x", "y"), split(1, 2)), {"x": A[:1], "y": A[1:]}),
    (rule("a", ("x", "y"), transpose(), split(1, 2, dim=1)), {"x": A.T[:, :1], "y": A.T[:, 1:]}),
    (rule("a", "x", reorder([2, 0, 1])), {"x": A[[2, 0, 1]]}),
    (rule(("a", "b"), ("x", "y"), reorder([1, 0], dim=1)), {"x": A.flip(1), "y": B.flip(1)}),
    (rule(("a", "b"), ("x", "y"), transpose(), pairs_to_halves(2, 1)), {"x": A.T, "y": B.T}),
    (rule("d", "x", pairs_to_halves(4, 1)), {"x": torch.tensor([0.0, 2, 1, 3, 4, 6, 5, 7])}),
    (rule(("d", "b"), ("x", "y"), pairs_to_halves(8, 1)), {"x": torch.tensor([0.0, 2, 4, 6, 1, 3, 5, 7]), "y": B}),
    (rule("c", "x", squeeze(1)), {"x": torch.ones(2, 3)}),
    (rule("a", "x", reshape((3, 2), (6,))), {"x": torch.arange(6.0)}),
]


@pytest.mark.parametrize(("each", "expected"), STEPS)
def test_a_rule_goes_there_and_back(each, expected: dict[str, Tensor]):
    theirs = {
        name: tensor
        for name, tensor in {"a": A, "b": B, "c": torch.ones(2, 1, 3), "d": torch.arange(8.0)}.items()
        if name in each.theirs
    }
    made = WeightMap([each]).to_seqarch(theirs)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in expected.items())
    back = WeightMap([each]).to_transformers(made)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())


def test_gradients_pass_through_a_table():
    leaf = A.clone().requires_grad_()
    made = WeightMap([rule("a", ("x", "y"), reorder([2, 0, 1]), split(1, 2))]).to_seqarch({"a": leaf})
    (made["x"].sum() + 2 * made["y"].sum()).backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[2, 2], [2, 2], [1, 1]]


def test_names_may_have_a_prefix_on_each_side():
    table = WeightMap(under("m.", "n.", [rule("a", "x"), rule(("b", "c"), "y", concatenate(2, 2))]))
    made = table.to_seqarch({"m.a": A, "m.b": B, "m.c": B})
    assert made.keys() == {"n.x", "n.y"}
    assert table.to_transformers(made).keys() == {"m.a", "m.b", "m.c"}


def test_tied_tensors_may_be_absent_and_must_agree():
    table = WeightMap([rule("a", "x"), rule("b", "y")], tied={"b": "a"})
    made = table.to_seqarch({"a": A})
    assert made["y"] is A
    assert torch.equal(table.to_seqarch({"a": A, "b": A.clone()})["y"], A)
    assert table.to_transformers(made).keys() == {"a", "b"}
    with pytest.raises(ValueError, match="b and a are one tensor in the other model, but differ here"):
        table.to_seqarch({"a": A, "b": A + 1})
    with pytest.raises(ValueError, match="b and a are one tensor"):
        table.to_transformers({"x": A, "y": A + 1})


def test_missing_and_left_over_tensors_are_listed():
    table = WeightMap([rule("a", "x"), rule("b", "y")])
    with pytest.raises(ValueError, match="  missing: a\n  missing: b\n  left over: c"):
        table.to_seqarch({"c": A})
    with pytest.raises(ValueError, match=r"seqarch's state dict does not match .*:\n  missing: y\n  left over: a"):
        table.to_transformers({"x": A, "a": A})


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (concatenate(2, 3), r"a: expected sizes along dimension 0 of \[2, 3\], got \[3\]"),
        (split(1, 1), "a: expected a size along dimension 0 of 2, got 3"),
        (reorder([1, 0]), "a: expected a size along dimension 0 of 2, got 3"),
        (squeeze(1), "a: expected a size along dimension 1 of 1, got 2"),
        (reshape((2, 3), (6,)), r"a: expected the shape of \[2, 3\], got \[3, 2\]"),
    ],
)
def test_wrong_shapes_are_named(step, message: str):
    with pytest.raises(ValueError, match=message):
        WeightMap([rule("a", "x", step)]).to_seqarch({"a": A})


def test_no_tensor_stands_in_two_rules():
    with pytest.raises(ValueError, match="these tensors are in two rules: x"):
        WeightMap([rule("a", "x"), rule("b", "x")])


def test_a_pattern_is_the_shortest():
    assert pattern_of(["a", "b", "a", "b"]) == "a b"
    assert pattern_of(["a", "b", "a"]) == "a b a"
    assert pattern_of(["a"]) == "a"
