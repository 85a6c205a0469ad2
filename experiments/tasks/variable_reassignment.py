"""Variables that are assigned again and again, hidden in a long text: which value does each hold at its end?

The statements are those of ``variable_tracking``, after Hsieh et al. 2024, "RULER": ``VAR ABCDE = 12345`` states a
number, ``VAR FGHIJ = ABCDE`` copies what a variable holds at that time. There every name is assigned once, so that
nothing is ever out of date and everything may be kept; here each of N variables is assigned R times more after its
first time, in random order with the others, and only the newest assignment counts: a state must overwrite. The text
ends with Q questions, ``Now FGHIJ is 12345.``, whose numbers are to be predicted. What a variable was copied from may
change afterwards, and the copy does not.

All numbers of a text differ. Accuracy is the share of whole numbers: an old value is as wrong as any other, however its
digits are found.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.tasks.generated import Draws, GeneratedConfig, WholeAnswersTask, at_least
from experiments.tasks.haystack import BYTES, depths, distinct, noise, plant, reading, sentence, written
from experiments.tasks.task import Batch
from experiments.tasks.variable_tracking import BEGINNING, DIGITS, LETTERS, MIDDLE, STATEMENT, WIDTH
from experiments.tasks.variable_tracking import END as LINE_END

NOW, IS, END = b"Now ", b" is ", b".\n"
QUESTION = len(NOW) + len(IS) + len(END) + 2 * WIDTH


@dataclass(frozen=True)
class VariableReassignmentConfig(GeneratedConfig):
    """Options of :class:`VariableReassignment`; T counts bytes.

    Attributes:
        variables: N.
        reassignments: R, how often each is assigned after its first time.
        copied: share of the assignments that copy another variable, where that one has been assigned.
        questions: Q, of different variables.
    """

    length: int = 512
    variables: int = 4
    reassignments: int = 3
    copied: float = 0.5
    questions: int = 2
    test_examples: int = 256

    def __post_init__(self):
        at_least(self, 2, "variables")
        at_least(self, 0, "reassignments")
        at_least(self, 1, "questions")
        if self.questions > self.variables:
            raise ValueError(f"questions must be at most variables ({self.variables}), got {self.questions}")
        if not 0 <= self.copied <= 1:
            raise ValueError(f"copied must lie between 0 and 1, got {self.copied}")
        super().__post_init__()

    @property
    def statements(self) -> int:
        return self.variables * (1 + self.reassignments)

    def hay(self, length: int) -> int:
        """Bytes of the haystack without its statements: the last question ends with its digits."""
        return length + 1 + len(END) - self.questions * QUESTION - self.statements * STATEMENT

    def check_length(self, length: int) -> None:
        if self.hay(length) < 0:
            raise ValueError(
                f"length ({length}) must be at least {length - self.hay(length)}: {self.statements} statements of"
                f" {STATEMENT} bytes, and {self.questions} questions of {QUESTION}"
            )


class VariableReassignment(WholeAnswersTask):
    Config = VariableReassignmentConfig
    name = "variable_reassignment"
    tokens = "bytes"
    title = "Variables that are reassigned"
    reading = (
        "Variables are assigned numbers, and each other's values, again and again in a long text; accuracy is the share"
        " of variables whose last value is named right. What is out of date must be overwritten, and copies kept."
    )
    guesses = "any number of the text, at random"
    answer_tokens = WIDTH
    config: VariableReassignmentConfig

    def __init__(self, config: VariableReassignmentConfig):
        super().__init__(config, vocab_size=BYTES)

    def generate(self, draws: Draws, length: int) -> Batch:
        config, count = self.config, self.config.statements
        names = written(distinct(draws, "names", config.variables, 26**WIDTH), WIDTH, LETTERS)
        numbers = written(distinct(draws, "numbers", count, 10**WIDTH), WIDTH, DIGITS)
        listed = np.repeat(np.arange(config.variables), 1 + config.reassignments)
        assigned = listed[np.argsort(draws.uniforms("order", count), axis=1)]
        others = 1 + draws.integers("sources", count, config.variables - 1)
        sources = (assigned + others) % config.variables
        copies, holds, hops = trace(assigned, sources, draws.uniforms("copied", count) < config.copied)

        right = np.where(copies[:, :, None], np.take_along_axis(names, sources[:, :, None], axis=1), numbers)
        left = np.take_along_axis(names, assigned[:, :, None], axis=1)
        statements = sentence(BEGINNING, left, MIDDLE, right, LINE_END)
        text, begins = plant(draws, noise(draws, config.hay(length)), statements)
        asked = distinct(draws, "questions", config.questions, config.variables)
        stated = np.take_along_axis(holds, asked, axis=1)
        answers = np.take_along_axis(numbers, stated[:, :, None], axis=1)
        questions = sentence(NOW, np.take_along_axis(names, asked[:, :, None], axis=1), IS, answers, END)

        end, shown = text.shape[1], np.take_along_axis(begins, stated, axis=1)
        digits = end + QUESTION * np.arange(config.questions) + len(NOW) + WIDTH + len(IS)
        groups = {
            "hops": np.take_along_axis(hops, asked, axis=1),
            "depth": depths(shown, STATEMENT, end),
            "gap": digits - 1 - (shown + len(BEGINNING) + WIDTH + len(MIDDLE)),
        }
        text = np.concatenate([text, questions.reshape(draws.size, -1)], axis=1)[:, : length + 1]
        return reading(text, self.answers(length), groups)

    def answers(self, length: int) -> np.ndarray:
        """``[T + 1]``: whether a byte of the text is a digit that is asked for."""
        ends = length + 1 - QUESTION * np.arange(self.config.questions)
        asked = np.zeros(length + 1, dtype=bool)
        asked[(ends[:, None] - 1 - np.arange(WIDTH)).ravel()] = True
        return asked

    def guess(self, batch: Batch, draws: Draws) -> np.ndarray:
        size, length = batch.tokens.shape
        is_digit = (batch.tokens >= DIGITS[0]) & (batch.tokens <= DIGITS[-1])
        begins = np.zeros_like(is_digit)
        begins[:, 2:] = is_digit[:, 2:] & (batch.tokens[:, :-2] == ord("="))
        nth = np.cumsum(begins, axis=1)
        chosen = (draws.uniforms("", self.config.questions) * nth[:, -1:]).astype(np.int64)
        places = np.argmax(nth[:, None] == chosen[:, :, None] + 1, axis=2)
        digits = (places[:, :, None] + np.arange(WIDTH)).reshape(size, -1)
        guesses = np.zeros((size, length), dtype=np.int64)
        guesses[:, self.answers(length)[1:]] = np.take_along_axis(batch.tokens, digits, axis=1)
        return guesses


def trace(assigned: np.ndarray, sources: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What variables hold after S assignments.

    Args:
        assigned: ``[B, S]``, which variable each step assigns; all of them occur.
        sources: ``[B, S]``, which variable a step copies if it copies.
        wanted: ``[B, S]``, whether it is to, which it does where the source has been assigned.

    Returns:
        ``[B, S]``, whether each step copies; ``[B, N]``, the step that stated the number that each variable holds at
        the end; and ``[B, N]``, how often that number was copied on the way.
    """
    size, steps = assigned.shape
    holds = np.full((size, int(assigned.max()) + 1), -1, dtype=np.int64)
    hops, copies, rows = np.zeros_like(holds), np.zeros_like(wanted), np.arange(size)
    for step in range(steps):
        variable, source = assigned[:, step], sources[:, step]
        copies[:, step] = wanted[:, step] & (holds[rows, source] >= 0)
        holds[rows, variable] = np.where(copies[:, step], holds[rows, source], step)
        hops[rows, variable] = np.where(copies[:, step], hops[rows, source] + 1, 0)
    return copies, holds, hops
