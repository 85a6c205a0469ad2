"""One decoded token after a context: a model's states at several contexts, and the seconds of a token from each.

A state of N tokens is made by reading N tokens as far as that is affordable. Beyond, caches repeat the keys and values
of the tokens that were read, and states of fixed size are those after the last of them: a token's time depends on the
sizes of a state and not on its numbers, as long as these are ordinary ones. That is why models need not be trained here
(a router's choice would depend on its weights, but every expert costs the same), and why memory must be written: pages
that nobody has written to are all one page of zeros, which stays in the processor's cache. Each condition with
``check_from`` measures beside a state that was read one that was filled.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.util.errors import RunnerError
from seqarch.layers.modules.kv_cache import KVCache
from seqarch.models import LanguageModel, LMConfig
from seqarch.models.sampling import sample

ROOM = 32
"""Tokens that a cache has room for behind the longest context: a burst decodes fewer."""

BURST = 0.03
"""Seconds after which a burst of tokens ends."""

SLOW = 0.3
"""Seconds of a token whose state is far beyond every cache: no token has to bring it nearer, and one is a burst."""

FILLED = "filled"
"""The key of the state that is filled where another of as many tokens was read."""


@dataclass(frozen=True)
class Condition:
    """What models are decoded under, and how it is measured.

    Attributes:
        name: for people and records.
        width, depth, vocabulary: of the models.
        dtype: of weights and caches, by its name in torch.
        batch: sequences that are decoded together.
        contexts: tokens before the one that is decoded, in ascending order.
        prefilled: the longest context that models read; beyond it states are filled.
        rounds: in each of which every model decodes at every context once.
        passes: how often reading the prompt is timed.
        check_from: where given, the state of ``prefilled`` tokens is measured a second time, filled from so many.
    """

    name: str
    width: int
    depth: int
    vocabulary: int
    contexts: tuple[int, ...]
    prefilled: int
    rounds: int
    dtype: str = "float32"
    threads: int = 2
    batch: int = 1
    passes: int = 0
    check_from: int = 0

    def __post_init__(self):
        if list(self.contexts) != sorted(set(self.contexts)):
            raise ValueError(f"contexts must ascend, got {self.contexts}")
        for name, context in (("prefilled", self.prefilled), ("check_from", self.check_from)):
            if context not in self.contexts and (name, context) != ("check_from", 0):
                raise ValueError(f"{name} must be one of the contexts {self.contexts}, got {context}")
        if self.check_from >= self.prefilled:
            raise ValueError(f"check_from must be below prefilled ({self.prefilled}), got {self.check_from}")

    @property
    def read(self) -> tuple[int, ...]:
        """The contexts that models read."""
        return tuple(context for context in self.contexts if context <= self.prefilled)


class Decoder:
    """A model that is ready to decode at each of several contexts, on the processor.

    Attributes:
        model: with random weights.
        states: by context, and ``FILLED``. Those of one cache share its memory, which holds the longest.
        prefill_seconds: until each context that was read.
    """

    def __init__(self, name: str, config: LMConfig, condition: Condition, longest: int):
        torch.manual_seed(0)
        self.name, self.condition = name, condition
        self.model = LanguageModel(config).to(getattr(torch, condition.dtype)).eval()
        self._prompt = torch.randint(config.vocab_size, (condition.batch, condition.prefilled))
        self._token = self._prompt[:, 0]
        read, longer = condition.read, [c for c in condition.contexts if condition.prefilled < c <= longest]
        self.states: dict[int | str, Any] = {}
        state = self.model.init_state(condition.batch, max_length=max(read[-1], longest) + ROOM)
        states, self.prefill_seconds = self.prefill(state)
        self.states |= states
        if longer:
            fill(states[read[-1]])
        self.states |= {context: at_length(states[read[-1]], context) for context in longer}
        if condition.check_from:
            self.states[FILLED] = self._filled(condition.check_from, condition.prefilled)

    @torch.no_grad()
    def prefill(self, state: Any = None) -> tuple[dict[int, Any], dict[int, float]]:
        """Read the prompt: the states at the contexts on the way, and the seconds until each of them."""
        if state is None:
            state = self.model.init_state(self.condition.batch, max_length=self.condition.prefilled)
        states, seconds, read, spent = {}, {}, 0, 0.0
        for context in self.condition.read:
            start = time.perf_counter()
            features, state = self.model.features(self._prompt[:, read:context], state)
            sample(self.model.logits(features[:, -1]), 0.0, 1.0)
            spent += time.perf_counter() - start
            states[context], seconds[context], read = at_length(state, context), spent, context
        return states, seconds

    @torch.no_grad()
    def _filled(self, source: int, context: int) -> Any:
        """A state of ``context`` tokens of which ``source`` were read."""
        state = self.model.init_state(self.condition.batch, max_length=context + ROOM)
        _, state = self.model.features(self._prompt[:, :source], state)
        fill(state)
        return at_length(state, context)

    @torch.no_grad()
    def seconds_per_token(self, key: int | str) -> float:
        """Of a burst of greedy decoding from a state, after one token that brings weights and state nearer.

        That one is the burst where it takes more than ``SLOW``. The next burst from a cache begins at the same length;
        a state of fixed size goes on from the last token.

        Raises:
            RunnerError: the logits are not finite, whose time would be another.
        """
        start = time.perf_counter()
        token, logits, state = self.decode(self._token, self.states[key])
        count, spent = 1, time.perf_counter() - start
        if spent < SLOW:
            start, count = time.perf_counter(), 0
            while count == 0 or (spent < BURST and count < ROOM - 2):
                token, logits, state = self.decode(token, state)
                count, spent = count + 1, time.perf_counter() - start
        self.states[key] = rewound(self.states[key], state)
        if not bool(logits.isfinite().all()):
            raise RunnerError(f"{self.name} decodes logits that are not finite at the context {key}")
        return spent / count

    @torch.no_grad()
    def warm_up(self) -> None:
        """One token from each state, which then is as it was: what is compiled for it need not be timed."""
        for key, state in self.states.items():
            _, _, after = self.decode(self._token, state)
            self.states[key] = rewound(state, after)

    def decode(self, token: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """The next token ``[B]``, its logits and the state, by the calls that ``LanguageModel.generate`` makes."""
        features, state = self.model.features(token.unsqueeze(1), state)
        logits = self.model.logits(features[:, 0])
        return sample(logits, 0.0, 1.0), logits, state

    @property
    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.model.parameters())

    @property
    def read_weight_bytes(self) -> int:
        """Of the weights that a token reads: all but the embedding, of which it reads a row."""
        tied = self.model.config.tie_embeddings
        return self.weight_bytes - (0 if tied else self.model.embedding.weight.nbytes)


def at_length(part: Any, context: int) -> Any:
    """A state as of ``context`` tokens: caches share their memory with it, all else is copied."""
    if isinstance(part, KVCache):
        return part._replace(length=context)
    if isinstance(part, Tensor):
        return part.clone()
    if isinstance(part, tuple):
        return _rebuilt(part, [at_length(each, context) for each in part])
    return part


def rewound(before: Any, after: Any) -> Any:
    """A state after some tokens, with its caches as long as before: what was written behind is written again."""
    if isinstance(before, KVCache):
        return before
    if isinstance(before, tuple):
        return _rebuilt(before, [rewound(old, new) for old, new in zip(before, after, strict=True)])
    return after


def fill(part: Any) -> None:
    """Repeat what a state's caches hold until they are full."""
    if isinstance(part, KVCache):
        for buffer in (part.keys, part.values):
            held = min(part.length, part.capacity)
            while held < part.capacity:
                count = min(held, part.capacity - held)
                buffer[:, held : held + count] = buffer[:, :count]
                held += count
    elif isinstance(part, tuple):
        for each in part:
            fill(each)


def used_bytes(part: Any) -> int:
    """Bytes of a state without the room that its caches have left."""
    if isinstance(part, KVCache):
        held = min(part.length, part.capacity)
        return part.keys[:, :held].nbytes + part.values[:, :held].nbytes
    if isinstance(part, Tensor):
        return part.nbytes
    return sum(used_bytes(each) for each in part) if isinstance(part, tuple) else 0


def _rebuilt(like: tuple[Any, ...], parts: list[Any]) -> Any:
    return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)


def needed_bytes(config: LMConfig, condition: Condition) -> tuple[int, dict[int, int]]:
    """Bytes of a model's weights, and of its state at each context."""
    with torch.device("meta"):
        model = LanguageModel(config).to(getattr(torch, condition.dtype))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return weights, {context: model.state_bytes(context, condition.batch) for context in condition.contexts}


def longest_contexts(configs: Mapping[str, LMConfig], condition: Condition, memory: float) -> dict[str, int]:
    """The longest context of each model, such that all of them fit into so many bytes at once.

    Where they do not, the model with the largest state gives up its longest context, one after another.

    Raises:
        RunnerError: they do not fit even at the contexts that models read.
    """
    found = {name: needed_bytes(config, condition) for name, config in configs.items()}
    room = memory - sum(weights for weights, _ in found.values())
    # the states that are filled for the check, and those of timed passes, are as long as what was read
    extra = sum(states[condition.prefilled] for _, states in found.values()) if condition.check_from else 0
    longest = dict.fromkeys(configs, condition.contexts[-1])

    def state_bytes(name: str) -> int:
        return found[name][1][longest[name]]

    while sum(map(state_bytes, configs)) + extra > room:
        shorter = [name for name in configs if longest[name] > condition.prefilled]
        if not shorter:
            raise RunnerError(f"{condition.name}: {memory / 2**30:.3g} GiB do not hold all models at once")
        largest = max(shorter, key=state_bytes)
        longest[largest] = max(context for context in condition.contexts if context < longest[largest])
    return longest


def points(decoders: Sequence[Decoder]) -> list[tuple[Decoder, int | str]]:
    """Each model with each of its states."""
    return [(decoder, key) for decoder in decoders for key in decoder.states]
