"""One request to a :class:`~seqarch.serving.Generator`: its prompt, how to continue it, and what has come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from seqarch.models.generation import check_logits
from seqarch.models.sampling import GenerationOptions


class Cancelled(RuntimeError):
    """The request was cancelled before it was done."""


class Request:
    """What :meth:`Generator.submit` returns. Iterating it gives its new tokens as they come, each time from the first.

    Whoever waits for a token here has the generator go on, for all requests; several threads may wait for theirs.

    Attributes:
        prompt: ``[T]``, on the model's device.
        options: how it is continued.
        new: its new tokens so far.
        read: tokens of the prompt that have been read.
        reused: of these, how many a prefix cache had read before.
        done: whether nothing more will come.
        error: why it failed, or ``None``.
    """

    def __init__(self, prompt: Tensor, options: GenerationOptions, advance: Callable[[], Any]):
        self.prompt, self.options = prompt, options
        self.new: list[int] = []
        self.read = self.reused = 0
        self.shared = 0  # tokens that others begin with, too, after which a prefix cache keeps a state
        self.done = not options.max_new_tokens
        self.error: BaseException | None = None
        self.state: Any = None
        self._advance = advance

    def __iter__(self) -> Iterator[int]:
        given = 0
        while True:
            while given < len(self.new):
                yield self.new[given]
                given += 1
            if self.done:
                break
            self._advance()
        if self.error is not None:
            raise self.error

    def result(self) -> Tensor:
        """The prompt and what follows it, ``[T + new]``, once it is done.

        Raises:
            Exception: what the request failed with, such as an error of one of its logits processors.
        """
        for _ in self:
            pass
        return torch.cat([self.prompt, torch.tensor(self.new, dtype=torch.int64, device=self.prompt.device)])

    def cancel(self) -> None:
        """End it here; what it has is kept, and whoever waits for more gets :class:`Cancelled`."""
        self.fail(Cancelled(f"the request was cancelled after {len(self.new)} new tokens"))

    def fail(self, error: BaseException) -> None:
        """End it with an error, unless it is done; its state is let go."""
        if not self.done:
            self.done, self.error, self.state = True, error, None

    def choose(self, logits: Tensor) -> None:
        """Take its next token, which may be its last, by logits ``[1, vocab]``; where that fails, it has failed."""
        if self.done:
            return
        try:
            check_logits(logits, torch.ones(1, dtype=torch.bool, device=logits.device), len(self.new))
            if self.options.reads_tokens:
                tokens = torch.cat([self.prompt, self.prompt.new_tensor(self.new)])
                logits = self.options.adjusted(logits, [tokens])
            self.new.append(int(self.options.choose(logits, self.options.generator)))
        except Exception as error:
            self.fail(error)
        else:
            self.done = self.options.ended(self.new)
