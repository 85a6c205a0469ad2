"""The state of a stack as a cache of ``transformers``."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

from seqarch.layers.mixer import measured_state_bytes
from seqarch.layers.rows import state_rows
from seqarch.models.stack import StackState


class SeqarchCache(Cache):
    """What all layers carry from call to call, with one row per sequence of the batch.

    A call that is given it goes on from there and leaves the state after its tokens in it, as with every cache of
    ``transformers``. Rows are chosen and repeated by :func:`seqarch.layers.rows.state_rows`. What was read cannot be
    forgotten again: there is no ``crop``, which assisted decoding would need.

    Attributes:
        state: of the stack; ``None`` before the first call.
        rows: how many rows the state has.
        seen: columns of tokens so far, padding included, as masks and ``generate`` count them.
        room: tokens to reserve room for, in states that grow; ``None`` lets them grow as they go.
    """

    def __init__(self, room: int | None = None):
        super().__init__(layers=[])
        self.state: StackState | None = None
        self.rows, self.seen, self.room = 0, 0, room

    def __repr__(self) -> str:
        return f"{type(self).__name__}(seen={self.seen}, bytes={self.state_bytes()})"

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state)

    def keep(self, state: StackState, rows: int, columns: int) -> None:
        """Take the state after a call on so many rows and columns of tokens."""
        self.state, self.rows, self.seen = state, rows, self.seen + columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.state is not None

    def state_bytes(self) -> int:
        """Bytes of the tensors that it holds."""
        return measured_state_bytes(self.state)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i the former row ``beam_idx[i]``, as a search over beams does after each token."""
        index = beam_idx.tolist()
        if index != list(range(self.rows)):
            self._select(index)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a mask of bools keeps those where it is true."""
        indices = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self._select(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times, one after another."""
        self._select([row for row in range(self.rows) for _ in range(repeats)])

    def _select(self, index: list[int]) -> None:
        if self.state is not None:
            self.state, self.rows = state_rows(self.state, index), len(index)

    def reset(self) -> None:
        self.state, self.rows, self.seen = None, 0, 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                f"a state cannot forget tokens: crop({tokens_to_remove}) was called; expected 0, or a cache that was"
                " copied (copy.deepcopy) before them"
            )

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else self.rows

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        return False
