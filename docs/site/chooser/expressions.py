"""The library's own accounting as expressions: its functions are called with a length that is yet unknown.

A mixer counts bytes and FLOPs by arithmetic on whole numbers. Called with a :class:`Variable` in place of a length, the
same code gives the expression that it would have computed. Where it asks a question of the length (``if length == 1``),
both answers are followed, and the expression has both.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

Number = Any
"""An ``int``, or an :class:`Expression` of one."""


class Undecided(Exception):
    """The code asks a question whose answer depends on a variable."""

    def __init__(self, condition: Expression):
        super().__init__("the answer depends on a variable")
        self.condition = condition


class Expression:
    """A whole number that depends on variables: an operation, and the numbers that it is of."""

    def __init__(self, operation: str, *parts: Number):
        self.operation, self.parts = operation, parts

    def __bool__(self) -> bool:
        question = self if self.operation in QUESTIONS else Expression("!=", self, 0)
        if not _ANSWERS:
            raise Undecided(question)
        return _ANSWERS.pop(0)

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> Any:
        return Expression("==", self, other)

    def __ne__(self, other: object) -> Any:
        return Expression("!=", self, other)

    def __neg__(self) -> Expression:
        return Expression("*", self, -1)

    def __divmod__(self, size: Number) -> tuple[Expression, Expression]:
        whole = self // size
        return whole, self - whole * size

    def bit_length(self) -> Expression:
        """As that of an ``int``, of a number that is not negative."""
        return Expression("bits", self)


class Variable(Expression):
    """What is not known yet, by its name."""

    def __init__(self, name: str):
        super().__init__("variable", name)


QUESTIONS = ("==", "!=", "<", "<=", ">", ">=")
_OPERATIONS = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "lshift": "<<"}
_ANSWERS: list[bool] = []
"""To the questions that the code will ask next, while it is followed."""


def _methods(name: str, operation: str) -> None:
    def method(self: Expression, other: Number) -> Expression:
        return Expression(operation, self, other) if isinstance(other, int | Expression) else NotImplemented

    def reflected(self: Expression, other: Number) -> Expression:
        return Expression(operation, other, self) if isinstance(other, int) else NotImplemented

    setattr(Expression, f"__{name}__", method)
    if operation not in QUESTIONS:
        setattr(Expression, f"__r{name}__", reflected)


for _name, _operation in (_OPERATIONS | {"lt": "<", "le": "<=", "gt": ">", "ge": ">="}).items():
    _methods(_name, _operation)


def follow(cost: Callable[..., Number], *variables: Variable) -> Number:
    """What a function computes of variables: an expression, or a number where it does not depend on them.

    Raises:
        TypeError: the function does more with a variable than arithmetic on whole numbers.
    """
    with _least_and_most():
        return _follow(cost, variables, [])


def _follow(cost: Callable[..., Number], variables: tuple[Variable, ...], answers: list[bool]) -> Number:
    _ANSWERS[:] = answers
    try:
        return cost(*variables)
    except Undecided as asked:
        branches = (_follow(cost, variables, [*answers, answer]) for answer in (True, False))
        return Expression("if", asked.condition, *branches)
    finally:
        _ANSWERS.clear()


@contextmanager
def _least_and_most() -> Iterator[None]:
    """``min`` and ``max`` of expressions are expressions, rather than a question each."""
    with patch.object(builtins, "min", _chosen("min")), patch.object(builtins, "max", _chosen("max")):
        yield


def _chosen(name: str) -> Callable[..., Any]:
    plain = getattr(builtins, name)

    def choose(*given: Any, **options: Any) -> Any:
        among = given[0] if len(given) == 1 else given
        if isinstance(among, tuple) and any(isinstance(each, Expression) for each in among):
            if name == "min" and 0 in [each for each in among if isinstance(each, int)]:
                return 0  # what is counted is not negative
            first, *rest = among
            for other in rest:
                first = Expression(name, first, other)
            return first
        return plain(*given, **options)

    return choose
