"""Recall over several hops: pairs ``a b``, ``b c``, ... in any order, and what one comes to from a in so many steps.

A synthetic form of reasoning by look-ups that need each other: Zhang et al. 2022, "Unveiling Transformers with LEGO",
whose chains of assignments zoology generates as well, and the k-hop induction of Sanford et al. 2024. A sequence has C
chains of H + 1 distinct tokens, and shows their C H links as pairs, shuffled. Each question is a token for the number
of hops, 1 .. H, and one of a chain, at which the token so many links further is to be predicted.

With ``passes`` all pairs are shown again, in another order: Arora et al. 2024, "Just Read Twice". zoology's
``stacked_mqar`` is one hop with several passes, of pairs that are one vector each; here they are two tokens, since
models read tokens. LEGO asks for a sign, which is right half of the time by luck, and draws from a global state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.tasks.generated import Draws, GeneratedConfig, GeneratedTask, at_least, placed
from experiments.tasks.haystack import distinct
from experiments.tasks.task import IGNORED, Batch, Metric


@dataclass(frozen=True)
class MultiHopRecallConfig(GeneratedConfig):
    """Options of :class:`MultiHopRecall`; T is at least 2 C H P + 2 Q.

    Attributes:
        vocab_size: V, the tokens that chains are made of, besides a blank and H that ask for a number of hops.
        chains: C.
        hops: H, links of a chain, and the most that are asked for at once.
        passes: P, how often all pairs are shown.
        questions: Q, at random places after the pairs.
    """

    length: int = 64
    vocab_size: int = 64
    chains: int = 4
    hops: int = 3
    passes: int = 1
    questions: int = 8

    def __post_init__(self):
        at_least(self, 1, "chains", "hops", "passes", "questions")
        if self.vocab_size < self.chains * (self.hops + 1):
            raise ValueError(
                f"vocab_size must be at least {self.chains * (self.hops + 1)}, for {self.chains} chains of"
                f" {self.hops + 1} tokens; got {self.vocab_size}"
            )
        super().__post_init__()

    @property
    def links(self) -> int:
        """Of all chains."""
        return self.chains * self.hops

    def check_length(self, length: int) -> None:
        least = 2 * self.links * self.passes + 2 * self.questions
        if length < least:
            raise ValueError(
                f"length ({length}) must be at least {least}: two tokens for each of {self.links} links, in"
                f" {self.passes} passes, and for each of {self.questions} questions"
            )


class MultiHopRecall(GeneratedTask):
    Config = MultiHopRecallConfig
    name = "multi_hop_recall"
    title = "Recall over several hops"
    reading = (
        "Pairs are shown that form chains, and what a token leads to in one or several steps is asked for; accuracy is"
        " the share of answers that are right. Each hop is a look-up by what the one before has found."
    )
    metric = Metric("accuracy", "Recall accuracy", "", higher_is_better=True)
    guesses = "the second token of any pair, at random"
    config: MultiHopRecallConfig

    def __init__(self, config: MultiHopRecallConfig):
        super().__init__(config, config.vocab_size + config.hops + 1)
        self.blank = config.vocab_size + config.hops

    def generate(self, draws: Draws, length: int) -> Batch:
        config, links, size = self.config, self.config.links, draws.size
        shown = 2 * links * config.passes
        nodes = distinct(draws, "nodes", config.chains * (config.hops + 1), config.vocab_size)
        nodes = nodes.reshape(size, config.chains, config.hops + 1)
        order = np.argsort(draws.uniforms("order", config.passes * links).reshape(size, config.passes, links), axis=2)
        tokens = np.full((size, length), self.blank, dtype=np.int64)
        for place, ends in enumerate((nodes[:, :, :-1], nodes[:, :, 1:])):
            tokens[:, place:shown:2] = np.take_along_axis(ends.reshape(size, links), order.reshape(size, -1), axis=1)

        hops = 1 + draws.integers("hops", config.questions, config.hops)
        start = (draws.uniforms("start", config.questions) * (config.hops - hops + 1)).astype(np.int64)
        chain = draws.integers("chain", config.questions, config.chains)
        asked = shown + 2 * draws.places("places", (length - shown) // 2, config.questions) + 1
        begin = chain * (config.hops + 1) + start
        every = nodes.reshape(size, -1)
        targets = np.full((size, length), IGNORED, dtype=np.int64)
        np.put_along_axis(tokens, asked - 1, config.vocab_size + hops - 1, axis=1)
        np.put_along_axis(tokens, asked, np.take_along_axis(every, begin, axis=1), axis=1)
        np.put_along_axis(targets, asked, np.take_along_axis(every, begin + hops, axis=1), axis=1)
        # Where the last pass shows the link that ends in the answer.
        link = np.take_along_axis(np.argsort(order[:, -1], axis=1), chain * config.hops + start + hops - 1, axis=1)
        gap = asked - (2 * links * (config.passes - 1) + 2 * link + 1)
        groups = {"hops": placed(targets, asked, hops), "gap": placed(targets, asked, gap)}
        return Batch(tokens, targets, groups=groups)

    def guess(self, batch: Batch, draws: Draws) -> np.ndarray:
        columns = 1 + 2 * draws.integers("", batch.targets.shape[1], self.config.links)
        return np.take_along_axis(batch.tokens, columns, axis=1)
