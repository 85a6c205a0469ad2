"""How the next token is chosen from logits, and what ends a continuation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from seqarch.layers.mixer import MOST_COUNTED
from seqarch.ops.dispatch.checks import accumulation_dtype, fits, show

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
"""``(tokens [1, T], logits [1, vocab]) -> logits``: of one row, its prompt included, as in ``transformers``."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """The options of :meth:`seqarch.LanguageModel.generate` that concern each row by itself.

    They have the meaning and the order of ``transformers``: penalty, processors, temperature, ``top_k``, ``top_p``,
    ``min_p``. At temperature 0 the last three change nothing.

    Attributes:
        max_new_tokens: tokens after the prompt, at most.
        temperature: 0 is greedy.
        top_k: sample from so many of the likeliest tokens; 0 from all.
        top_p: nucleus of each distribution that is sampled from, in (0, 1].
        min_p: sample from tokens that are at least so likely in relation to the likeliest, in [0, 1].
        repetition_penalty: above 1, tokens of the prompt and of what follows it become less likely.
        logits_processors: each is called for each row by itself, with its tokens so far ``[1, T]`` and its logits
            ``[1, vocab]``, and returns logits: those of ``transformers`` can be given as they are.
        stop_token: a row ends with this token, or any of several, which is kept.
        stop_sequences: lists of tokens; a row ends where its new tokens end with one of them, which is kept.
        generator: source of randomness, on the model's device.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logits_processors: Sequence[LogitsProcessor] = ()
    stop_token: int | Sequence[int] | None = None
    stop_sequences: Sequence[Sequence[int]] = ()
    generator: torch.Generator | None = None

    def __post_init__(self):
        most = MOST_COUNTED
        rules = [
            ("max_new_tokens", int, lambda n: 0 <= n <= most, f"an int of at least 0 (and at most {most})"),
            ("temperature", float, lambda t: t >= 0, "a float of at least 0"),
            ("top_k", int, lambda k: k >= 0, "an int of at least 0, where 0 keeps all"),
            ("top_p", float, lambda p: 0 < p <= 1, "a float in (0, 1]"),
            ("min_p", float, lambda p: 0 <= p <= 1, "a float in [0, 1]"),
            ("repetition_penalty", float, lambda r: 0 < r < float("inf"), "a positive float"),
        ]
        for name, kind, holds, expected in rules:
            value = getattr(self, name)
            if not fits(value, (kind,)) or not holds(value):
                raise ValueError(f"generate: {name} is {show(value)}, expected {expected}")
        if not fits(self.generator, (torch.Generator, NoneType)):
            raise ValueError(f"generate: generator is {show(self.generator)}, expected a torch.Generator or None")
        given = self.logits_processors
        if not isinstance(given, Sequence) or not all(map(callable, given)):
            raise ValueError(f"generate: logits_processors is {show(given)}, expected a list of callables")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise unless what ends a continuation is made of tokens.

        Raises:
            ValueError: something else is in it; it is named.
        """
        one = f"an int from 0 to {vocab_size - 1}"
        if not all(_is_token(token, vocab_size) for token in _listed(self.stop_token)):
            raise ValueError(f"generate: stop_token is {show(self.stop_token)}, expected {one}, or a list of such")
        given = self.stop_sequences
        right = isinstance(given, Sequence) and not isinstance(given, (str, bytes)) and all(map(_is_list, given))
        if not right or not all(each and all(_is_token(t, vocab_size) for t in each) for each in given):
            raise ValueError(f"generate: stop_sequences is {show(given)}, expected lists of tokens, each {one}")

    @property
    def reads_tokens(self) -> bool:
        """Whether the choice depends on the tokens before, and not on the logits alone."""
        return self.repetition_penalty != 1 or bool(self.logits_processors)

    @property
    def is_greedy(self) -> bool:
        """Whether the next token is the likeliest, whatever the tokens before."""
        return self.temperature == 0 and not self.reads_tokens

    @cached_property
    def ends(self) -> tuple[tuple[int, ...], ...]:
        """The sequences of new tokens, any of which ends a continuation and is kept."""
        return (*((token,) for token in _listed(self.stop_token)), *map(tuple, self.stop_sequences))

    def ended(self, new: Sequence[int]) -> bool:
        """Whether a continuation ends with the last of these new tokens, by what it is or by how many there are."""
        return len(new) >= self.max_new_tokens or any(tuple(new[-len(end) :]) == end for end in self.ends)

    def rows_ended(self, new: Sequence[Tensor]) -> Tensor:
        """The same, but for their number, of several rows: ``[B]`` from new tokens ``[B]`` each."""
        hit = torch.zeros_like(new[-1], dtype=torch.bool)
        for end in self.ends:
            if len(end) <= len(new):
                same = [tokens == token for tokens, token in zip(new[-len(end) :], end, strict=True)]
                hit |= torch.stack(same).all(0)
        return hit

    def adjusted(self, logits: Tensor, tokens: Sequence[Tensor]) -> Tensor:
        """The logits ``[B, vocab]`` after penalty and processors, given each row's tokens so far ``[T]``.

        The penalty divides positive logits of tokens that were there, and multiplies others (Keskar et al. 2019,
        "CTRL", section 4.1, as ``transformers`` has it).

        Raises:
            ValueError: a processor returned something else than logits, or none of a token that may follow.
        """
        logits = logits.to(accumulation_dtype(logits))
        if self.repetition_penalty != 1:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, own in zip(seen, tokens, strict=True):
                row[own] = True
            penalised = torch.where(logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        for number, process in enumerate(self.logits_processors):
            rows = [process(own[None], row[None]) for own, row in zip(tokens, logits, strict=True)]
            for row in rows:
                _check_processed(number, row, logits.shape[-1])
            logits = torch.cat(rows)
        return logits

    def probabilities(self, logits: Tensor) -> Tensor:
        """``[B, vocab]``, from which tokens are drawn: at temperature 0 all of it is at the largest logit."""
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
        return _probabilities(logits, self.temperature, self.top_k, self.top_p, self.min_p)

    def choose(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """One token per row of ``logits [B, vocab]``: ``[B]``."""
        return sample(logits, self.temperature, self.top_p, generator, top_k=self.top_k, min_p=self.min_p)


def sample(
    logits: Tensor,
    temperature: float,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    top_k: int = 0,
    min_p: float = 0.0,
) -> Tensor:
    """One token per row of ``logits [B, vocab]``: ``[B]``.

    Args:
        temperature: 0 takes the likeliest token; otherwise logits are divided by it.
        top_p: keep the likeliest tokens whose probabilities reach this sum (Holtzman et al. 2020, section 3.1).
        generator: source of randomness.
        top_k: keep so many of the likeliest tokens (Fan et al. 2018, section 5.1), and those that equal the last of
            them; 0 keeps all.
        min_p: keep tokens that are at least so likely in relation to the likeliest (Nguyen et al. 2024, "Turning Up
            the Heat", section 3).
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = _probabilities(logits, temperature, top_k, top_p, min_p)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def _probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    logits = logits.float()
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature  # overflows to -inf alone
    if 0 < top_k < logits.shape[-1]:
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k, dim=-1).values[..., -1:], -torch.inf)
    probabilities = scaled.softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    if min_p > 0:
        least = min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    return probabilities / probabilities.sum(-1, keepdim=True) if top_p < 1 or min_p > 0 else probabilities


def _listed(stop_token: Any) -> Sequence[Any]:
    if stop_token is None:
        return ()
    return stop_token if _is_list(stop_token) else (stop_token,)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_token(value: Any, vocab_size: int) -> bool:
    return fits(value, (int,)) and 0 <= value < vocab_size


def _check_processed(number: int, logits: Any, vocab_size: int) -> None:
    expected = f"logits [1, {vocab_size}], of which one at least is finite and none is NaN or infinity"
    if not isinstance(logits, Tensor) or logits.shape != (1, vocab_size) or not logits.is_floating_point():
        given = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, Tensor) else show(logits)
        raise ValueError(f"generate: logits processor {number} returned {given}, expected {expected}")
    if not bool(logits.amax().isfinite()):
        raise ValueError(
            f"generate: logits processor {number} returned a largest logit of {logits.amax():g}, expected {expected}"
        )
