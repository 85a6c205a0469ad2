"""ListOps: the value of a nested formula, ``[MAX 2 9 [MIN 4 7 ] 0 ]``, in digits.

Tay et al. 2021, "Long Range Arena", after Nangia and Bowman 2018. Trees are those of its generator: an argument is an
operator with probability 1/4 and else a digit, an operator has 2 to 10 arguments and is a minimum, a maximum, a median
(rounded down) or a sum modulo 10, there are up to 10 levels, and trees of other lengths than asked for are drawn again:
500 to 2000 tokens there, a quarter of T to T here. The answer is asked for at the last bracket, or with ``asked: all``
at every bracket, which teaches more per sequence.

There trees come from an unseeded generator and the splits from the order of a Python set; each example here is a
function of (seed, split, index). Results are known to be fragile: they depend on the learning rate and the stopping
rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from experiments.tasks import trees
from experiments.tasks.generated import Draws, GeneratedConfig, GeneratedTask, at_least
from experiments.tasks.task import IGNORED, Batch, TaskError, stream

ASKED = ("last", "all")
ATTEMPTS = 10000
AT_ONCE = 256
"""Trees grown at a time: most of the time goes into calls, not into nodes."""


@dataclass(frozen=True)
class ListOpsConfig(GeneratedConfig):
    """Options of :class:`ListOps`; T is the length of the longest formula.

    Attributes:
        shortest: length of the shortest formula, as a share of T.
        depth: levels at most, the digits of the innermost formula counted.
        arguments: of an operator, at most.
        operators: the probability that an argument is an operator.
        asked: ``last`` for the value of the whole formula, ``all`` for that of every formula in it too.
    """

    length: int = 2000
    shortest: float = 0.25
    depth: int = 10
    arguments: int = 10
    operators: float = 0.25
    asked: str = "last"
    test_examples: int = 512

    def __post_init__(self):
        at_least(self, 2, "depth", "arguments")
        for name in ("shortest", "operators"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.asked not in ASKED:
            raise ValueError(f"asked must be 'last' or 'all', got {self.asked!r}")
        super().__post_init__()

    def check_length(self, length: int) -> None:
        largest = 1
        for _ in range(self.depth - 1):
            largest = 2 + self.arguments * largest
        if length < 4 or self.shortest * length > largest:
            raise ValueError(
                f"length must be at least 4, an operator and two digits, and shortest * length at most {largest}, all"
                f" that depth {self.depth} and {self.arguments} arguments make; got {length} and {self.shortest}"
            )


class ListOps(GeneratedTask):
    Config = ListOpsConfig
    name = "listops"
    title = "ListOps"
    reading = (
        "A nested formula of minima, maxima, medians and sums is to be worked out; accuracy is the share of formulas"
        " that are right. Intermediate results must be kept and used in the order of the brackets."
    )
    guesses = "the likeliest value in training"
    config: ListOpsConfig

    def __init__(self, config: ListOpsConfig):
        super().__init__(config, vocab_size=trees.BLANK + 1)

    def generate(self, draws: Draws, length: int) -> Batch:
        levels, _ = self.grow(self.roots(draws, length), length)
        tokens, ends, sizes = trees.write(levels, length)
        targets = np.full_like(tokens, IGNORED)
        tokens_of = np.zeros_like(tokens)  # The formula that ends here.
        for level, end, size, worth in zip(levels, ends, sizes, trees.evaluate(levels), strict=True):
            asked = level.arguments > 0
            targets[level.tree[asked], end[asked]] = worth[asked]
            tokens_of[level.tree[asked], end[asked]] = size[asked]
            if self.config.asked == "last":
                break
        return Batch(tokens, targets, tokens != trees.BLANK, {"size": tokens_of})

    def roots(self, draws: Draws, length: int) -> np.ndarray:
        """For each example the key of its first tree that has a length asked for.

        Raises:
            TaskError: such trees are too rare.
        """
        first = stream(draws.seed, draws.split, "trees").random_raw(1)
        firsts = trees.mixed(first + np.arange(draws.start, draws.start + draws.size).astype(np.uint64))
        found, pending, attempt = np.empty_like(firsts), np.arange(draws.size), 0
        while attempt < ATTEMPTS:
            tries = np.arange(attempt, attempt + max(1, AT_ONCE // len(pending))).astype(np.uint64)
            roots = trees.mixed(firsts[pending, None] + tries * trees.GOLDEN)
            _, sizes = self.grow(roots.ravel(), length)
            fits = ((sizes >= self.config.shortest * length) & (sizes <= length)).reshape(roots.shape)
            done = fits.any(axis=1)
            found[pending[done]] = roots[done, np.argmax(fits[done], axis=1)]
            pending, attempt = pending[~done], attempt + len(tries)
            if not len(pending):
                return found
        raise TaskError(
            f"task listops: of {ATTEMPTS} trees none had {self.config.shortest * length:.0f} to {length} tokens; choose"
            " another length, or more depth, arguments or operators"
        )

    def grow(self, roots: np.ndarray, length: int) -> tuple[list[trees.Level], np.ndarray]:
        config = self.config
        return trees.grow(roots, config.depth, config.arguments, config.operators, length)

    @cached_property
    def likeliest(self) -> int:
        targets = self.train_batch(0, 0, 512).targets
        return int(np.argmax(np.bincount(targets[targets != IGNORED])))

    def guess(self, batch: Batch, draws: Draws) -> np.ndarray:
        return np.full_like(batch.targets, self.likeliest)
