"""Operators that act number by number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from seqarch.decoding.lowering import WHOLE, Group, Lowering, Rule, is_tensor, lowers, number, shape_of
from seqarch.ops.native.view import Unserved

aten = torch.ops.aten

PLAIN = {
    "absolute": aten.abs.default,
    "copy": aten.clone.default,
    "cos": aten.cos.default,
    "erf": aten.erf.default,
    "exp": aten.exp.default,
    "expm1": aten.expm1.default,
    "floor": aten.floor.default,
    "log": aten.log.default,
    "log1p": aten.log1p.default,
    "not": aten.logical_not.default,
    "rsqrt": aten.rsqrt.default,
    "sigmoid": aten.sigmoid.default,
    "sign": aten.sign.default,
    "silu": aten.silu.default,
    "sin": aten.sin.default,
    "sqrt": aten.sqrt.default,
    "tanh": aten.tanh.default,
}
"""Steps that are an operator of one tensor."""


def _plain(code: str) -> Rule:
    def rule(low: Lowering, node: fx.Node) -> None:
        low.elementwise(node, lambda group: group.step(code, low.source(group, node.args[0])))

    return rule


for name, target in PLAIN.items():
    lowers(target)(_plain(name))


USUAL: dict[Any, list[float]] = {aten.softplus.default: [1, 20], aten.elu.default: [1, 1, 1]}
"""Options that a formula holds for."""


def _formula(*targets: Any) -> Callable[[Callable[[Group, int], int]], Callable[[Group, int], int]]:
    """The rule of operators of one tensor, from what they make of its source."""

    def register(formula: Callable[[Group, int], int]) -> Callable[[Group, int], int]:
        @lowers(*targets)
        def rule(low: Lowering, node: fx.Node) -> None:
            if list(node.args[1:]) != USUAL.get(node.target, [])[: len(node.args) - 1] or node.kwargs:
                raise Unserved(f"{node.target} has options")
            low.elementwise(node, lambda group: formula(group, low.source(group, node.args[0])))

        return formula

    return register


@_formula(aten.neg.default)
def _negative(group: Group, x: int) -> int:
    return group.affine(x, -1)


@_formula(aten.reciprocal.default)
def _reciprocal(group: Group, x: int) -> int:
    return group.step("over", x, number=1)


@_formula(aten.relu.default)
def _relu(group: Group, x: int) -> int:
    return group.step("clamp", x, number=0, other=math.inf)


@_formula(aten.softplus.default)
def _softplus(group: Group, x: int) -> int:
    return group.step("softplus", x)


@_formula(aten.exp2.default)
def _exp2(group: Group, x: int) -> int:
    return group.step("exp", group.affine(x, math.log(2)))


@_formula(aten.elu.default)
def _elu(group: Group, x: int) -> int:
    return group.step("where", group.step("less", _constant(group, x, 0), x), x, group.step("expm1", x))


@lowers(aten.log_sigmoid_forward.default)
def _log_sigmoid(low: Lowering, node: fx.Node) -> None:
    (first,) = (user for user in node.users if user.args[1] == 0)
    low.read(node.args[0])

    def write(group: Group) -> int:
        return group.affine(group.step("softplus", group.affine(low.source(group, node.args[0]), -1)), -1)

    low.elementwise(first, write)
    low.values[node] = [low.values[first]]


@lowers(aten.gelu.default)
def _gelu(low: Lowering, node: fx.Node) -> None:
    def write(group: Group) -> int:
        x = low.source(group, node.args[0])
        if node.kwargs.get("approximate", "none") == "none":
            bent = group.step("erf", group.affine(x, math.sqrt(0.5)))
        else:
            cube = group.step("multiply", group.step("multiply", x, x), x)
            bent = group.step("tanh", group.affine(group.step("add", x, cube, number=0.044715), math.sqrt(2 / math.pi)))
        return group.step("multiply", group.affine(x, 0.5), group.affine(bent, 1, 1))

    low.elementwise(node, write)


@lowers(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.add_.Tensor, aten.add_.Scalar)
def _add(low: Lowering, node: fx.Node) -> None:
    x, y = node.args[:2]
    factor = number(node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1))
    factor = -factor if "sub" in str(node.target) else factor
    _check_in_place(low, node)

    def write(group: Group) -> int:
        if not is_tensor(y):
            return group.affine(low.source(group, x), 1, factor * number(y))
        if not is_tensor(x):
            return group.affine(low.source(group, y), factor, number(x))
        return group.step("add", low.source(group, x), low.source(group, y), number=factor)

    low.elementwise(node, write)


@lowers(aten.remainder.Scalar)
def _remainder(low: Lowering, node: fx.Node) -> None:
    by = number(node.args[1])
    low.elementwise(node, lambda group: group.step("remainder", low.source(group, node.args[0]), number=by))


@lowers(aten.rsub.Scalar)
def _subtract_from(low: Lowering, node: fx.Node) -> None:
    low.elementwise(node, lambda group: group.affine(low.source(group, node.args[0]), -1, number(node.args[1])))


@lowers(aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor, aten.mul_.Scalar)
def _multiply(low: Lowering, node: fx.Node) -> None:
    x, y = node.args
    _check_in_place(low, node)

    def write(group: Group) -> int:
        if not is_tensor(y):
            return group.affine(low.source(group, x), number(y))
        if not is_tensor(x):
            return group.affine(low.source(group, y), number(x))
        return group.step("multiply", low.source(group, x), low.source(group, y))

    low.elementwise(node, write)


@lowers(aten.div.Tensor, aten.div.Scalar)
def _divide(low: Lowering, node: fx.Node) -> None:
    x, y = node.args
    if not is_tensor(y) and number(y) == 0:
        raise Unserved("a division by 0")

    def write(group: Group) -> int:
        if not is_tensor(y):
            x_source = low.source(group, x)
            if group.wide:  # a whole number over another one, whose fraction counts
                return group.step("divide", x_source, _constant(group, x_source, number(y)))
            return group.affine(x_source, 1 / number(y))
        if not is_tensor(x):
            return group.step("over", low.source(group, y), number=number(x))
        return group.step("divide", low.source(group, x), low.source(group, y))

    low.elementwise(node, write)


def _check_in_place(low: Lowering, node: fx.Node) -> None:
    if str(node.target).split(".")[1].endswith("_"):
        low.replaces(node.args[0], node)  # type: ignore[arg-type]


@lowers(aten.pow.Tensor_Scalar)
def _power(low: Lowering, node: fx.Node) -> None:
    exponent = number(node.args[1])

    def write(group: Group) -> int:
        x = low.source(group, node.args[0])
        if exponent == 2:
            return group.step("multiply", x, x)
        roots = {0.5: "sqrt", -0.5: "rsqrt"}
        return group.step(roots[exponent], x) if exponent in roots else group.step("power", x, number=exponent)

    low.elementwise(node, write)


@lowers(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
def _clamp(low: Lowering, node: fx.Node) -> None:
    bounds = [*node.args[1:], None, None]
    if node.target is aten.clamp_max.default:
        bounds.insert(0, None)
    least, most = (node.kwargs.get(name, bound) for name, bound in zip(("min", "max"), bounds, strict=False))
    low_end, high_end = -math.inf if least is None else number(least), math.inf if most is None else number(most)

    def write(group: Group) -> int:
        return group.step("clamp", low.source(group, node.args[0]), number=low_end, other=high_end)

    low.elementwise(node, write)


@lowers(aten.where.self)
def _where(low: Lowering, node: fx.Node) -> None:
    low.elementwise(node, lambda group: group.step("where", *(low.source(group, each) for each in node.args)))


@lowers(aten.masked_fill.Scalar)
def _masked_fill(low: Lowering, node: fx.Node) -> None:
    x, mask, value = node.args

    def write(group: Group) -> int:
        given = low.source(group, x)
        return group.step("where", low.source(group, mask), _constant(group, given, number(value)), given)

    low.elementwise(node, write)


def _constant(group: Group, like: int, value: float) -> int:
    """A number, beside a source: 0 times an infinity would be none, so that is compared away first."""
    return group.affine(group.step("less", like, like), 1, value)


@lowers(aten.lerp.Tensor, aten.lerp.Scalar)
def _between(low: Lowering, node: fx.Node) -> None:
    start, end, weight = node.args

    def write(group: Group) -> int:
        x = low.source(group, start)
        way = group.step("add", low.source(group, end), x, number=-1)
        gone = (
            group.step("multiply", low.source(group, weight), way)
            if is_tensor(weight)
            else group.affine(way, number(weight))
        )
        return group.step("add", x, gone, number=1)

    low.elementwise(node, write)


@lowers(aten.maximum.default, aten.minimum.default)
def _extreme(low: Lowering, node: fx.Node) -> None:
    code = "maximum" if node.target is aten.maximum.default else "minimum"
    low.elementwise(node, lambda group: group.step(code, *(low.source(group, each) for each in node.args)))


@lowers(aten.logical_and.default, aten.bitwise_and.Tensor)
def _both(low: Lowering, node: fx.Node) -> None:
    low.elementwise(node, lambda group: group.step("multiply", *(low.source(group, each) for each in node.args)))


COMPARED = {
    "lt": ("less", False, False),
    "le": ("less_equal", False, False),
    "gt": ("less", True, False),
    "ge": ("less_equal", True, False),
    "eq": ("equal", False, False),
    "ne": ("equal", False, True),
}
"""By operator: the step, whether its operands change places, and whether the contrary is asked for."""


@lowers(*(getattr(getattr(aten, name), kind) for name in COMPARED for kind in ("Tensor", "Scalar")))
def _compare(low: Lowering, node: fx.Node) -> None:
    code, turned, contrary = COMPARED[str(node.target).split(".")[1]]
    x, y = node.args

    def write(group: Group) -> int:
        a = low.source(group, x)
        b = low.source(group, y) if is_tensor(y) else _constant(group, a, number(y))
        found = group.step(code, *((b, a) if turned else (a, b)))
        return group.step("not", found) if contrary else found

    low.elementwise(node, write)


@lowers(aten._to_copy.default)
def _convert(low: Lowering, node: fx.Node) -> None:
    def write(group: Group) -> int:
        x = low.source(group, node.args[0])
        if node.meta["val"].dtype == torch.bool:
            return group.step("not", group.step("not", x))
        if node.meta["val"].dtype in WHOLE and node.args[0].meta["val"].is_floating_point():  # type: ignore[union-attr]
            return group.step("multiply", group.step("sign", x), group.step("floor", group.step("absolute", x)))
        return group.step("copy", x)

    low.elementwise(node, write)


@lowers(aten.glu.default)
def _gated(low: Lowering, node: fx.Node) -> None:
    (view,) = low.reads(node.args[0])
    dim = int(node.args[1] if len(node.args) > 1 else -1) % view.rank  # type: ignore[arg-type]
    size = view.sizes[dim] // 2
    x, gate = view.part(dim, 0, size), view.part(dim, size, size)
    low.elementwise(node, lambda group: group.step("multiply", group.read(x), group.step("sigmoid", group.read(gate))))


def _filled(value: float | None, place: int = 1) -> Rule:
    def rule(low: Lowering, node: fx.Node) -> None:
        low.values[node] = low.tape.filled(shape_of(node), number(node.args[place]) if value is None else value)

    return rule


lowers(aten.new_ones.default, aten.ones_like.default)(_filled(1.0))
lowers(aten.new_zeros.default, aten.zeros_like.default)(_filled(0.0))
lowers(aten.full_like.default)(_filled(None))
lowers(aten.new_full.default)(_filled(None, 2))
