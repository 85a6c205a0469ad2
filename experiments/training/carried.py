"""States that go on from one optimizer step to the next, and from the initial one where a text begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from experiments.util.errors import RunnerError
from seqarch.layers import state_rows
from seqarch.layers.rows import join_rows
from seqarch.models import LanguageModel


class Texts:
    """Rows of tokens as the model reads them: where a text begins within a row, rows are packed into one.

    Args:
        state: of as many rows, from which they go on; ``None`` where all begin.
        begins: ``[B, T]``, where a text begins, before which the state is the initial one; ``None`` for nowhere.
        goes_on: whether the state after them is wanted; caches in it are then rows, and not as a packed call has them.

    Attributes:
        state: that the model begins with.
        cu_seqlens: boundaries of the texts in the packed row; ``None`` where nothing is packed.
    """

    def __init__(self, model: LanguageModel, state: Any, begins: np.ndarray | None, goes_on: bool):
        self.state, self.cu_seqlens, self._last = state, None, None
        if begins is None:
            return
        rows, length = begins.shape
        new = begins[:, 0] | (state is None)
        if not begins[:, 1:].any():
            if new.any() and state is not None:
                self.state = _begun(model, state, [-1 if begun else row for row, begun in enumerate(new.tolist())])
            return
        starts = begins.copy()
        starts[:, 0] = True
        places = np.flatnonzero(starts)
        self.cu_seqlens = (*places.tolist(), rows * length)
        from_before = (places % length == 0) & ~new[places // length]
        if goes_on or from_before.any():
            self.state = _begun(model, state, np.where(from_before, places // length, -1).tolist())
        self._last = (np.cumsum(starts.sum(axis=1)) - 1).tolist()

    def laid_out(self, tensor: Tensor) -> Tensor:
        """``[B, T]``, or ``[1, B T]`` where rows are packed."""
        return tensor if self.cu_seqlens is None else tensor.reshape(1, -1)

    def last(self, state: Any) -> Any:
        """The state of the last text of each row."""
        return state if self._last is None else state_rows(state, self._last)


def _begun(model: LanguageModel, state: Any, rows: Sequence[int]) -> Any:
    """These rows of a state, with the initial one for each that is -1."""
    kept = [row for row in rows if row >= 0]
    if not kept:
        return model.init_state(len(rows), max_length=1)
    found = state_rows(state, kept)
    if len(kept) == len(rows):
        return found
    joined = join_rows([found, model.init_state(len(rows) - len(kept), max_length=1)])
    order = np.argsort(np.argsort([row < 0 for row in rows], kind="stable"))
    return state_rows(joined, order.tolist())


class CarriedStates:
    """The state of each row of this process's share of the batch; initial ones before the first step.

    Args:
        first: the number of the process's first row among all.
        count: its rows.
    """

    def __init__(self, model: LanguageModel, first: int, count: int):
        self._model, self._first, self._count = model, first, count
        self._state: Any = None

    def begin(self, step: int) -> None:
        """Called before each step, with its number."""

    def rows(self, part: slice) -> Any:
        """The state that some rows go on from; ``None`` for the initial one."""
        return None if self._state is None else state_rows(self._state, range(self._count)[part])

    def keep(self, states: Sequence[Any]) -> None:
        """The states that the rows ended with, of some rows each, in their order."""
        self._state = states[0] if len(states) == 1 else join_rows(states)

    def forget(self) -> None:
        """Begin all rows anew."""
        self._state = None

    def plain(self) -> dict[str, Any]:
        """Its part of a checkpoint, of tensors and numbers alone."""
        leaves = None if self._state is None else pytree.tree_leaves(self._state)
        return {"first": self._first, "count": self._count, "leaves": leaves}

    def restore(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Take this process's rows from what all processes kept, however many these were.

        Raises:
            RunnerError: rows are missing, or are of another model.
        """
        self._state = None
        if any(part["leaves"] is None for part in parts):
            return
        end, found = self._first + self._count, []
        for part in sorted(parts, key=lambda part: part["first"]):
            wanted = range(max(self._first, part["first"]), min(end, part["first"] + part["count"]))
            form = pytree.tree_structure(self._model.init_state(part["count"], max_length=1))
            if wanted and len(part["leaves"]) == form.num_leaves:
                state = pytree.tree_unflatten(part["leaves"], form)
                found.append((state_rows(state, [row - part["first"] for row in wanted]), len(wanted)))
        if sum(count for _, count in found) != self._count:
            raise RunnerError(f"the checkpoint has no states for rows {self._first} to {end - 1} of this model")
        self._state = found[0][0] if len(found) == 1 else join_rows([state for state, _ in found])
