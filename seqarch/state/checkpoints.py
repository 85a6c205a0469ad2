"""One sequence that is read on and of which the last tokens can be taken back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqarch.layers.mixer import clone_state, first_tensor
from seqarch.layers.rows import row_count
from seqarch.models import LanguageModel
from seqarch.ops.dispatch.checks import fits, show
from seqarch.state.files import StateError


@dataclass
class _Snapshot:
    """The state after some tokens, and the calls since the one before it.

    Attributes:
        at: how many tokens.
        calls: the tokens ``[1, T]`` of each call after it, up to the next snapshot or the end.
    """

    at: int
    state: Any
    calls: list[Tensor]


class Checkpoints:
    """A sequence of a model's, read call by call, with copies of its state along the way.

    A state of fixed size holds no earlier one. :meth:`rollback` therefore goes back to the last copy before the place
    that is wanted and reads from there again, in the calls in which it was read, the last of them cut. So the state is
    to the bit that of a sequence which was read in these calls and has never seen what was taken back; where tokens are
    read one at a time, that is the state of plain decoding.

    Args:
        state: to begin from, of one row: it is consumed; ``None`` for the state before the first token.
        every: a copy is made before a call where the last is at least so many tokens old.
        keep: copies that are kept, the last ones.

    Attributes:
        length: tokens read so far.
        state: after them. To be read on here alone; clone it to branch.
    """

    def __init__(self, model: LanguageModel, state: Any = None, *, every: int = 16, keep: int = 4):
        for name, count in (("every", every), ("keep", keep)):
            if not fits(count, (int,)) or count < 1:
                raise ValueError(f"Checkpoints: {name} is {show(count)}, expected an int of at least 1")
        self.model, self.every, self.keep = model, every, keep
        self.state = model.init_state(1) if state is None else state
        if (rows := row_count(self.state)) != 1:
            raise ValueError(f"Checkpoints: the state has {rows} rows, expected 1")
        self.length = 0
        self._snapshots: list[_Snapshot] = []
        self.mark()

    @property
    def oldest(self) -> int:
        """The length down to which the sequence can be taken back."""
        return self._snapshots[0].at

    def mark(self) -> None:
        """Copy the state as it is, so that going back to here costs a copy alone."""
        if self._snapshots and self._snapshots[-1].at == self.length:
            return
        self._snapshots.append(_Snapshot(self.length, clone_state(self.state), []))
        del self._snapshots[: -self.keep]

    @torch.no_grad()
    def read(self, tokens: Sequence[int] | Tensor, last: int | None = None) -> Tensor:
        """Read tokens ``[T]`` in one call: the logits after each, or after the ``last`` of them, ``[last, vocab]``."""
        given = torch.as_tensor(tokens, dtype=torch.int64, device=first_tensor(self.model).device)[None]
        if self.length - self._snapshots[-1].at >= self.every:
            self.mark()
        features, self.state = self.model.features(given, self.state)
        self._snapshots[-1].calls.append(given)
        self.length += given.shape[1]
        return self.model.logits(features[0, 0 if last is None else given.shape[1] - last :])

    @torch.no_grad()
    def rollback(self, count: int) -> None:
        """Take the last ``count`` tokens back.

        Raises:
            StateError: they reach back beyond the oldest copy; nothing is changed.
        """
        if not fits(count, (int,)) or not 0 <= count <= self.length - self.oldest:
            raise StateError(
                f"rollback by {show(count)}, expected 0 to {self.length - self.oldest}: the oldest of"
                f" {len(self._snapshots)} checkpoints is after {self.oldest} of {self.length} tokens"
            )
        if not count:
            return
        target = self.length - count
        while self._snapshots[-1].at > target:
            self._snapshots.pop()
        last = self._snapshots[-1]
        calls, last.calls = last.calls, []
        self.state, self.length = clone_state(last.state), last.at
        for call in calls:
            if self.length < target:
                call = call[:, : target - self.length]
                self.state = self.model.features(call, self.state)[1]
                last.calls.append(call)
                self.length += call.shape[1]
