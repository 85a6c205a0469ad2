"""Which tokens of a padded batch are real, and the same tokens packed into one row.

Mixers have no mask: a token that is read changes the state. So the rows of a padded batch are packed, each a sequence
of its own, and nothing is computed for padding. Padding that only follows the tokens of its rows may stay where it is,
as long as nobody wants the state after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch.ops.dispatch.checks import show


@dataclass(frozen=True)
class Packing:
    """The real tokens of a batch ``[B, T]``, one row after another.

    Attributes:
        real: bool ``[B, T]``, false where a token is padding.
        cu_seqlens: boundaries of the rows among the real tokens, from 0 to their number; a row may have none.
    """

    real: Tensor
    cu_seqlens: list[int]

    def pack(self, tokens: Tensor) -> Tensor:
        """``[1, M]``: the real ones of ``tokens [B, T]``."""
        return tokens[self.real].unsqueeze(0)

    def unpack(self, features: Tensor) -> Tensor:
        """``[B, T, D]`` of ``features [1, M, D]``, with zeros for padding."""
        room = features.new_zeros(*self.real.shape, features.shape[-1])
        return room.masked_scatter(self.real.unsqueeze(-1), features)


def real_tokens(attention_mask: Tensor | None, tokens: Tensor, seen: int) -> Tensor | None:
    """bool ``[B, T]``, false where a token is padding; ``None`` where none is.

    Args:
        attention_mask: 0 or 1, ``[B, T]`` as the tokens, or ``[B, seen + T]``; what was seen before is not looked at.
        seen: columns of tokens before these.

    Raises:
        ValueError: the mask is of another shape, has other numbers, or the real tokens of a row do not follow one
            another.
    """
    if attention_mask is None:
        return None
    rows, columns = tokens.shape
    shapes = list(dict.fromkeys([(rows, columns), (rows, seen + columns)]))
    if not isinstance(attention_mask, Tensor) or tuple(attention_mask.shape) not in shapes:
        tensor = isinstance(attention_mask, Tensor)
        given = f"{list(attention_mask.shape)}" if tensor else show(attention_mask)
        raise ValueError(f"attention_mask is {given}, expected {' or '.join(str(list(shape)) for shape in shapes)}")
    mask = attention_mask[:, attention_mask.shape[1] - columns :].to(tokens.device)
    real = mask.bool()
    if bool((mask != real).any()):
        raise ValueError("attention_mask has numbers that are neither 0 nor 1, expected 1 for each real token")
    if bool(real.all()):
        return None
    runs = real[:, :1].sum(1) + (real[:, 1:] & ~real[:, :-1]).sum(1)
    if bool((runs > 1).any()):
        row = int((runs > 1).nonzero()[0])
        raise ValueError(
            f"attention_mask has padding between the tokens of row {row}, expected it before or after them alone"
        )
    return real


def predicted(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The labels, with -100 where padding comes before, from which nothing is predicted."""
    if attention_mask is None or attention_mask.shape[1] < labels.shape[1]:
        return labels
    padding = attention_mask[:, attention_mask.shape[1] - labels.shape[1] :].to(labels.device) == 0
    return labels.masked_fill(F.pad(padding[:, :-1], (1, 0)), -100)


def packing(real: Tensor, state_wanted: bool) -> Packing | None:
    """How to pack the tokens; ``None`` where they may stay as they are: padding follows, and nobody reads on."""
    if not state_wanted and not bool((real[:, 1:] & ~real[:, :-1]).any()):
        return None
    return Packing(real, [0, *accumulate(real.sum(1).tolist())])


class Packed(NamedTuple):
    """How whoever made a batch says which sequences are packed into its one row, in up to three ways.

    Attributes:
        position_ids: ``[B, T]`` or ``[1, T]``, from 0 on in each sequence. Mixers count tokens for themselves.
        cu_seq_lens: the boundaries, from 0 to T.
        seq_idx: ``[1, T]``, the number of each token's sequence.
    """

    position_ids: Tensor | None = None
    cu_seq_lens: Tensor | None = None
    seq_idx: Tensor | None = None

    def boundaries(self, tokens: Tensor, real: Tensor | None, seen: int) -> list[int] | None:
        """The boundaries of the sequences in the row; ``None`` where each row is one.

        Args:
            real, seen: as :func:`real_tokens` has them.

        Raises:
            ValueError: the positions do not count the tokens one by one, or several rows are packed, or one that has
                padding or goes on from a state.
        """
        found = None if self.position_ids is None else _starts(self.position_ids, tokens, real, seen)
        if self.cu_seq_lens is not None:
            found = self.cu_seq_lens.tolist()
        elif self.position_ids is None and self.seq_idx is not None:
            changes = (self.seq_idx.diff(dim=1) != 0).any(0)
            found = [0, *(changes.nonzero()[:, 0] + 1).tolist(), tokens.shape[1]]
        if found is None or len(found) < 3:
            return None
        if len(tokens) > 1 or real is not None or seen:
            rows = f"{len(tokens)} rows" if len(tokens) > 1 else "a row with padding or with a state"
            raise ValueError(
                f"{len(found) - 1} sequences are packed into {rows}, expected one row, whole, from its start"
            )
        return found


def _starts(position_ids: Tensor, tokens: Tensor, real: Tensor | None, seen: int) -> list[int] | None:
    """Where sequences start in a row, and its end; ``None`` where padding or earlier tokens say where rows start."""
    rows, columns = tokens.shape
    fits = isinstance(position_ids, Tensor) and tuple(position_ids.shape) in ((rows, columns), (1, columns))
    if not fits or position_ids.dtype not in (torch.int32, torch.int64):
        given = f"{position_ids.dtype} {list(position_ids.shape)}" if isinstance(position_ids, Tensor) else position_ids
        raise ValueError(f"position_ids are {given}, expected integers {[rows, columns]}")
    counted = position_ids.expand(rows, columns).to(tokens.device)
    steps, starts = counted.diff(dim=1), None
    if real is not None or seen:
        follows = torch.ones_like(steps, dtype=torch.bool) if real is None else real[:, 1:] & real[:, :-1]
        wrong = follows & (steps != 1)
    else:
        again = (counted[:, 1:] == 0) & (rows == 1)
        wrong = torch.cat([counted[:, :1] != 0, ~again & (steps != 1)], dim=1)
        starts = [0, *(again[0].nonzero()[:, 0] + 1).tolist(), columns]
    if bool(wrong.any()):
        raise ValueError(
            "position_ids do not count the tokens one by one, from 0 in each sequence: mixers know no other positions"
        )
    return starts
