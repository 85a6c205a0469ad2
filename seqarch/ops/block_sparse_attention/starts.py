"""Where the keys of each query's own sequence begin."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def sequence_starts(
    queries: int, offsets: tuple[int, ...] | None, key_start: Tensor | None, device: torch.device
) -> Tensor:
    """Where the keys of each query's sequence begin: ``[1, Tq]`` or ``[B, Tq]``."""
    if offsets is not None:
        lengths = torch.tensor([end - start for start, end in pairwise(offsets)], device=device)
        return torch.tensor(offsets[:-1], device=device).repeat_interleave(lengths, output_size=queries)[None]
    if key_start is not None:
        return key_start.long()[:, None].expand(-1, queries)
    return torch.zeros(1, queries, dtype=torch.int64, device=device)
