"""Word problems of finite groups: after each element of a word, the product of all elements so far.

Merrill et al. 2024, "The Illusion of State in State-Space Models", take A5, A4 x Z5 and Z60, all of 60 elements: a word
over A5 or S5 cannot be multiplied out by constantly many layers that work in parallel, one over Z60 can. S3 is the
smallest group that is not commutative: Siems et al. 2025, "DeltaProduct", whose two steps per token are two
reflections. Every prefix is labelled, as there; all elements occur, not only transpositions, which would be easier.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache, reduce
from itertools import combinations, permutations

import numpy as np

from experiments.tasks.generated import Draws, GeneratedConfig, GeneratedTask, positions
from experiments.tasks.task import Batch

MOST_ELEMENTS = 1000


@dataclass(frozen=True)
class WordProblemConfig(GeneratedConfig):
    """Options of :class:`WordProblem`; T is the number of elements.

    Attributes:
        group: ``s3`` (permutations of 3 things), ``a5`` (even permutations of 5), ``z60`` (addition modulo 60), or a
            product of such: ``a4xz5``.
    """

    length: int = 32
    group: str = "s3"

    def __post_init__(self):
        super().__post_init__()
        if not re.fullmatch(r"[saz][1-9]\d{0,2}(x[saz][1-9]\d{0,2})*", self.group):
            raise ValueError(f"group must be like s3, a5, z60 or a4xz5, got {self.group!r}")
        if order(self.group) > MOST_ELEMENTS:
            raise ValueError(
                f"group {self.group} has {order(self.group)} elements; choose one of up to {MOST_ELEMENTS}"
            )


class WordProblem(GeneratedTask):
    Config = WordProblemConfig
    name = "word_problem"
    title = "Word problem of a group"
    reading = (
        "After every element of a word the model names the product of all elements so far; accuracy is the share of"
        " positions at which it is right. The state needed is one element, but each step must be taken exactly."
    )
    guesses = "any element, at random"
    config: WordProblemConfig

    def __init__(self, config: WordProblemConfig):
        super().__init__(config, vocab_size=order(config.group))

    def generate(self, draws: Draws, length: int) -> Batch:
        elements = draws.integers("elements", length, self.vocab_size)
        targets = prefix_products(elements, multiplication(self.config.group))
        return Batch(elements, targets, groups=positions(targets))

    def guess(self, batch: Batch, draws: Draws) -> np.ndarray:
        return draws.integers("", batch.targets.shape[1], self.vocab_size)


def prefix_products(elements: np.ndarray, table: np.ndarray) -> np.ndarray:
    """``[B, T]``: entry t is the product of entries 0 to t. Spans double, so it takes log2 T look-ups."""
    products, span = elements.copy(), 1
    while span < products.shape[1]:
        products[:, span:] = table[products[:, :-span], products[:, span:]]
        span *= 2
    return products


def order(group: str) -> int:
    """The number of elements of a group."""
    sizes = []
    for kind, number in _factors(group):
        sizes.append({"z": number, "s": math.factorial(number), "a": max(math.factorial(number) // 2, 1)}[kind])
    return math.prod(sizes)


def _factors(group: str) -> list[tuple[str, int]]:
    return [(factor[0], int(factor[1:])) for factor in group.split("x")]


@cache
def multiplication(group: str) -> np.ndarray:
    """``[n, n]``: the number of the element ``i j``, which is i and then j; element 0 changes nothing."""
    tables = [_cyclic(number) if kind == "z" else _permuting(number, kind) for kind, number in _factors(group)]
    return reduce(_together, tables)


def _cyclic(number: int) -> np.ndarray:
    return np.add.outer(np.arange(number), np.arange(number)) % number


def _permuting(things: int, kind: str) -> np.ndarray:
    elements = [each for each in permutations(range(things)) if kind == "s" or _is_even(each)]
    numbers = {element: number for number, element in enumerate(elements)}
    return np.array([[numbers[tuple(then[image] for image in first)] for then in elements] for first in elements])


def _is_even(permutation: tuple[int, ...]) -> bool:
    return sum(left > right for left, right in combinations(permutation, 2)) % 2 == 0


def _together(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The table of pairs, numbered by the first and then the second."""
    both = one[:, None, :, None] * len(other) + other[None, :, None, :]
    return both.reshape(len(one) * len(other), -1)
