"""Multi-query associative recall: Arora et al. 2023, "Zoology", section 3 and appendix.

A sequence of T tokens begins with K pairs ``key value key value ...`` and later asks for every key once: at the key's
second appearance the value is to be predicted. Keys are distinct and from [1, V/2), values distinct and from [V/2, V).
The second appearances are at even distances after the pairs: slots g = 1 .. (T - 2K) / 2, drawn without replacement
with probability proportional to g^(a - 1). Other positions hold the blank token 0, as in the published figures, or with
``filler: random`` any token at all, which is harder. In zoology's generator that noise is not seeded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.tasks.generated import Draws, GeneratedConfig, GeneratedTask, at_least, placed, smallest
from experiments.tasks.task import IGNORED, Batch, Metric


@dataclass(frozen=True)
class MQARConfig(GeneratedConfig):
    """Options of :class:`MQAR`.

    Attributes:
        vocab_size: V, even.
        pairs: K; T is even and at least 4K.
        power: a; the smaller, the sooner a key is asked for again.
        filler: ``blank`` or ``random``.
    """

    vocab_size: int = 8192
    pairs: int = 4
    power: float = 0.01
    filler: str = "blank"

    def __post_init__(self):
        at_least(self, 1, "pairs")
        super().__post_init__()
        if self.vocab_size % 2 or self.pairs >= self.vocab_size // 2:
            raise ValueError(f"vocab_size ({self.vocab_size}) must be even and more than twice pairs ({self.pairs})")
        if not self.power > 0:
            raise ValueError(f"power must be positive, got {self.power}")
        if self.filler not in ("blank", "random"):
            raise ValueError(f"filler must be 'blank' or 'random', got {self.filler!r}")

    def check_length(self, length: int) -> None:
        if length % 2 or 4 * self.pairs > length:
            raise ValueError(
                f"length ({length}) must be even and at least 4 * pairs (pairs is {self.pairs}):"
                " two tokens a pair, and as much room to ask for each"
            )


class MQAR(GeneratedTask):
    Config = MQARConfig
    name = "mqar"
    title = "Multi-query associative recall"
    reading = (
        "A sequence shows keys with their values, then asks for each key again; accuracy is the share of values that"
        " the model recalls. A model with a small state must choose what to keep, attention keeps everything."
    )
    metric = Metric("accuracy", "Recall accuracy", "", higher_is_better=True)
    config: MQARConfig

    def __init__(self, config: MQARConfig):
        super().__init__(config, config.vocab_size)

    def generate(self, draws: Draws, length: int) -> Batch:
        pairs, half, size = self.config.pairs, self.config.vocab_size // 2, draws.size
        slots = (length - 2 * pairs) // 2
        u_keys, u_values, u_gaps, u_filler = np.split(
            draws.uniforms("", (half - 1) + half + slots + length),
            np.cumsum([half - 1, half, slots]),
            axis=1,
        )
        keys = 1 + smallest(u_keys, pairs)
        values = half + smallest(u_values, pairs)
        gaps = power_law(u_gaps, pairs, self.config.power)

        tokens = np.zeros((size, length), dtype=np.int64)
        if self.config.filler == "random":
            tokens[:] = u_filler * self.config.vocab_size
        tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
        targets = np.full((size, length), IGNORED, dtype=np.int64)
        asked = 2 * pairs + 2 * gaps
        np.put_along_axis(tokens, asked, keys, axis=1)
        np.put_along_axis(targets, asked, values, axis=1)
        number = np.broadcast_to(np.arange(pairs), asked.shape)
        groups = {"gap": placed(targets, asked, asked - 2 * number - 1), "pair": placed(targets, asked, number + 1)}
        return Batch(tokens, targets, groups=groups)

    def chance(self, split: str = "test") -> tuple[float, str]:
        return 1 / self.config.pairs, f"guessing among the {self.config.pairs} values seen"


def power_law(uniforms: np.ndarray, count: int, power: float) -> np.ndarray:
    """``[B, count]`` different slots of 0 .. n - 1, slot g with probability proportional to (g + 1)^(power - 1).

    Args:
        uniforms: ``[B, n]`` in (0, 1).
    """
    # Adding Gumbel noise to log-weights and sorting draws without replacement, one after the other.
    weights = (power - 1) * np.log(np.arange(1, uniforms.shape[1] + 1))
    return smallest(np.log(-np.log(uniforms)) - weights, count)
