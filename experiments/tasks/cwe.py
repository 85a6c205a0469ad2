"""Common words extraction: a numbered list of words, of which a few come often, and these are to be named at its end.

Hsieh et al. 2024, "RULER", ``cwe``, in bytes: ``1. qhzwek 2. tbnvoa 3. qhzwek ...`` in random order, in which
``num_cw`` words come ``freq_cw`` times and all others ``freq_ucw`` times, as many others as T has room for. The text
ends ``The 10 most common words are: tbnvoa ...``. RULER's lengths are 4096 to 131072; below 4096 it takes 6 and 1 for
the frequencies, which ``freq_cw`` and ``freq_ucw`` must be told here, since one can train short and test long.

RULER takes English words, which cannot be passed on, accepts them in any order and searches for them in the generated
text. Here words are six random letters, all different; the common ones are asked for in the order of their first
appearance, so that there is one answer, each after the true ones before it; and accuracy is the share of whole words.
The last of the other words comes fewer times where its share of the list is cut off, and spaces fill the text up.

A short list is no test of counting: of 4096 bytes 300 of 342 words are common, and whoever names the next new word of
the list each time is right in .75 of all answers; .30 at 8192, .14 at 16384 and .08 at 32768, which are about RULER's
4096 and 8192 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.tasks.coded_words import (
    WIDTH,
    answered,
    answers_begin,
    coded_words,
    guessed,
    is_answer,
    last_place,
)
from experiments.tasks.generated import Draws, GeneratedConfig, WholeAnswersTask, at_least
from experiments.tasks.haystack import BYTES, reading
from experiments.tasks.task import Batch

POINT = b". "


@dataclass(frozen=True)
class CWEConfig(GeneratedConfig):
    """Options of :class:`CWE`; T counts bytes.

    Attributes:
        freq_cw: how often a common word comes.
        freq_ucw: how often another word comes, fewer times than a common one.
        num_cw: how many common words there are, all of which are asked for.
    """

    length: int = 4096
    freq_cw: int = 30
    freq_ucw: int = 3
    num_cw: int = 10
    test_examples: int = 256

    def __post_init__(self):
        at_least(self, 1, "freq_ucw", "num_cw")
        if self.freq_cw <= self.freq_ucw:
            raise ValueError(f"freq_cw must be more than freq_ucw ({self.freq_ucw}), got {self.freq_cw}")
        super().__post_init__()

    @property
    def question(self) -> bytes:
        return f"\nThe {self.num_cw} most common words are:".encode()

    def places(self, length: int) -> np.ndarray:
        """``[n]``: where the words of the list begin in the text, as many as there is room for."""
        room = answers_begin(length, self.num_cw) - len(self.question)
        widths = _digits(1 + np.arange(max(room, 0) // WIDTH)) + len(POINT) + WIDTH + 1
        ends = np.cumsum(widths)
        return (ends - WIDTH - 1)[ends <= room]

    def check_length(self, length: int) -> None:
        count, least = len(self.places(length)), self.num_cw * self.freq_cw + self.freq_ucw
        if count < least:
            raise ValueError(
                f"length ({length}) has room for {count} words, and needs {least}: {self.num_cw} common ones"
                f" {self.freq_cw} times, another {self.freq_ucw} times; choose more, or a smaller freq_cw or num_cw"
            )


class CWE(WholeAnswersTask):
    Config = CWEConfig
    name = "cwe"
    tokens = "bytes"
    title = "Common words extraction"
    reading = (
        "A long list repeats some words more often than others, and the common ones are asked for; accuracy is the"
        " share of words named right. A model must count, or at least weigh, everything that it reads."
    )
    guesses = "any word of the list, at random"
    answer_tokens = WIDTH
    config: CWEConfig

    def __init__(self, config: CWEConfig):
        super().__init__(config, vocab_size=BYTES)

    def generate(self, draws: Draws, length: int) -> Batch:
        config, places = self.config, self.config.places(length)
        common, others = config.num_cw, len(places) - config.num_cw * config.freq_cw
        of_others = common + np.arange(others) // config.freq_ucw
        list_of = np.append(np.repeat(np.arange(common), config.freq_cw), of_others)
        ids = list_of[np.argsort(draws.uniforms("order", len(list_of)), axis=1)]
        words = coded_words(draws, "words", int(list_of[-1]) + 1)

        begin = answers_begin(length, common)
        text = np.broadcast_to(self._frame(length), (draws.size, begin)).copy()
        letters = np.take_along_axis(words, ids[:, :, None], axis=1)
        text[:, (places[:, None] + np.arange(WIDTH)).ravel()] = letters.reshape(draws.size, -1)
        # Common words in the order of their first appearance.
        order = np.argsort(len(places) - 1 - last_place(ids[:, ::-1], common), axis=1)
        last = places[np.take_along_axis(last_place(ids, common), order, axis=1)]
        asked = begin + (1 + WIDTH) * np.arange(common)
        groups = {"gap": asked - last, "position": np.broadcast_to(1 + np.arange(common), last.shape)}
        answers = answered(np.take_along_axis(words, order[:, :, None], axis=1))
        return reading(np.concatenate([text, answers], axis=1), is_answer(length, common), groups)

    def _frame(self, length: int) -> np.ndarray:
        """The text without its words and answers."""
        count, begin = len(self.config.places(length)), answers_begin(length, self.config.num_cw)
        numbered = "".join(f"{number}. {' ' * WIDTH} " for number in range(1, count + 1)).encode()
        question = self.config.question
        return np.frombuffer(numbered.ljust(begin - len(question)) + question, np.uint8)

    def guess(self, batch: Batch, draws: Draws) -> np.ndarray:
        places = self.config.places(batch.tokens.shape[1])
        return guessed(batch.tokens, places[draws.integers("", self.config.num_cw, len(places))])


def _digits(numbers: np.ndarray) -> np.ndarray:
    """How many digits whole numbers have, from 1 on."""
    return 1 + (numbers[:, None] >= 10 ** np.arange(1, 10)).sum(axis=1)
