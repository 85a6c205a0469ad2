"""Arithmetic modulo m, as a stream: ``3 + 4 * 2 - 1 ...``; after each number, the value of what has been written.

Deletang et al. 2022, "Neural Networks and the Chomsky Hierarchy", "modular arithmetic (simple)", without brackets
and so a regular language; Grazzi et al. 2024, "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues",
train on 3 to 40 tokens and test to 256. Multiplication binds first: the state is a sum and a running product. There, a
sequence has one label, at its end; here every prefix that ends in a number is labelled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.tasks.generated import Draws, GeneratedConfig, GeneratedTask, at_least, positions
from experiments.tasks.task import IGNORED, Batch

OPERATORS = "+-*"


@dataclass(frozen=True)
class ModularArithmeticConfig(GeneratedConfig):
    """Options of :class:`ModularArithmetic`; T counts numbers and operators, which alternate.

    Attributes:
        modulus: m.
        operators: those that occur, of ``+-*``.
    """

    length: int = 39
    modulus: int = 5
    operators: str = OPERATORS

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 2, "modulus")
        if not self.operators or set(self.operators) - set(OPERATORS) or len(set(self.operators)) < len(self.operators):
            raise ValueError(f"operators must be some of '{OPERATORS}', each once; got {self.operators!r}")


class ModularArithmetic(GeneratedTask):
    Config = ModularArithmeticConfig
    name = "modular_arithmetic"
    title = "Modular arithmetic"
    reading = (
        "After every number of a formula the model says what the formula is worth so far, modulo a small number;"
        " accuracy is the share of numbers at which it is right."
    )
    guesses = "always 0, the likeliest value"
    config: ModularArithmeticConfig

    def __init__(self, config: ModularArithmeticConfig):
        super().__init__(config, vocab_size=config.modulus + len(config.operators))

    def generate(self, draws: Draws, length: int) -> Batch:
        modulus, operators = self.config.modulus, self.config.operators
        numbers = draws.integers("numbers", (length + 1) // 2, modulus)
        chosen = draws.integers("operators", length // 2, len(operators))
        tokens = np.empty((draws.size, length), dtype=np.int64)
        tokens[:, ::2], tokens[:, 1::2] = numbers, modulus + chosen
        targets = np.full_like(tokens, IGNORED)
        targets[:, ::2] = values(numbers, np.array(list(operators))[chosen], modulus)
        return Batch(tokens, targets, groups=positions(targets))

    def guess(self, batch: Batch, draws: Draws) -> np.ndarray:
        return np.zeros_like(batch.targets)


def values(numbers: np.ndarray, operators: np.ndarray, modulus: int) -> np.ndarray:
    """``[B, N]``: what ``numbers[:, 0] operators[:, 0] numbers[:, 1] ...`` is worth after each of the N numbers."""
    found = np.empty_like(numbers)
    total, product = np.zeros_like(numbers[:, 0]), numbers[:, 0]
    found[:, 0] = product
    for place in range(1, numbers.shape[1]):
        number, operator = numbers[:, place], operators[:, place - 1]
        goes_on = operator == "*"
        total = np.where(goes_on, total, total + product) % modulus
        product = np.where(goes_on, product * number, np.where(operator == "-", -number, number)) % modulus
        found[:, place] = (total + product) % modulus
    return found
