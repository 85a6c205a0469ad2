"""Log-linear attention in place of a mixer's recurrence: weights of levels, and a state that is a binary counter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch.layers.mixer import Boundaries, Device, LayerConfig
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.linear import Linear
from seqarch.layers.recurrent_mixer import RecurrentMixer
from seqarch.layers.rows import join_rows, select
from seqarch.ops.log_linear_attention import flops as log_linear_flops

MOST_LEVELS = 32


@dataclass(frozen=True, kw_only=True)
class LevelsConfig(LayerConfig):
    """Options of mixers on log-linear attention, beside those of the mixer whose recurrence they read by levels.

    Attributes:
        levels: L; a sequence has at most ``2^(L - 1)`` tokens, by default 262,144, and the state is ``L - 1`` times as
            large as without levels. The release has 15.
    """

    levels: int = 19

    def __post_init__(self):
        super().__post_init__()
        if not 2 <= self.levels <= MOST_LEVELS:
            raise ValueError(f"levels must be 2 to {MOST_LEVELS}, got {self.levels}")


class LogLinearState(NamedTuple):
    """State of a mixer on log-linear attention.

    Attributes:
        conv: the short convolution's last inputs ``[B, W - 1, channels]``, or ``None`` without one.
        recurrent: ``[B, H, L - 1, K, V]``, entry b of ``2^b`` tokens, zeros where bit b of a row's length is not set.
        lengths: tokens of each row so far.
    """

    conv: Tensor | None
    recurrent: Tensor
    lengths: tuple[int, ...]

    @property
    def row_count(self) -> int:
        return len(self.lengths)

    def select_rows(self, index: list[int]) -> LogLinearState:
        conv, recurrent = (select(part, index) for part in (self.conv, self.recurrent))
        return LogLinearState(conv, recurrent, tuple(self.lengths[i] for i in index))

    def joined(self, others: Sequence[LogLinearState]) -> LogLinearState:
        """Its rows and then those of the others."""
        states = self, *others
        conv, recurrent = (join_rows([state[part] for state in states]) for part in range(2))
        return LogLinearState(conv, recurrent, tuple(length for state in states for length in state.lengths))

    def after(self, recurrent: Tensor, tokens: int, cu_seqlens: Boundaries) -> LogLinearState:
        """After a call on so many tokens, or on packed sequences, that left these states."""
        new = [tokens] * len(self.lengths) if cu_seqlens is None else [end - at for at, end in pairwise(cu_seqlens)]
        lengths = tuple(before + own for before, own in zip(self.lengths, new, strict=True))
        return self._replace(recurrent=recurrent, lengths=lengths)


class LogLinear(RecurrentMixer):
    """What a mixer with a recurrence gets in front of it, to read the same recurrence by levels.

    Their weights are ``softplus(level_scale * W_l x)``, as released with Guo et al. 2025; ``level_scale`` is 1 at first
    and takes no weight decay.
    """

    takes_any_state = False

    delta: ClassVar[bool]
    """Whether the recurrence is the delta rule."""

    no_weight_decay = ("level_scale",)

    @from_options
    def __init__(self, config: Any):
        super().__init__(config)
        heads, keys, values = self.state_shape
        self.level_proj = Linear(config.d_model, heads * config.levels, bias=False)
        self.level_scale = nn.Parameter(torch.ones(heads, config.levels))
        self.state_shape = (heads, config.levels - 1, keys, values)
        self.most_tokens = 2 ** (config.levels - 1)

    def level_weight(self, x: Tensor) -> Tensor:
        """``[B, T, H, L]``, of each head and level."""
        scale = self.level_scale.to(self.state_dtype)
        weight = F.softplus(scale.flatten() * self.level_proj(x).to(scale.dtype))
        return weight.unflatten(-1, scale.shape)

    def new_state(self, batch_size: int, max_length: int, device: Device, dtype: torch.dtype | None) -> Any:
        return LogLinearState(*super().new_state(batch_size, max_length, device, dtype), (0,) * batch_size)

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        heads, slots, keys, values = self.state_shape
        return log_linear_flops(length, heads, slots + 1, keys, values, batch_size, self.delta)
