"""The base of mixers with a state of fixed size: a short convolution's last inputs and a recurrent state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seqarch.layers.mixer import Device, Mixer, first_tensor, measured_state_bytes
from seqarch.ops.linear_attention import flops as linear_attention_flops


class RecurrentState(NamedTuple):
    """State of a recurrent mixer.

    Attributes:
        conv: the short convolution's last inputs ``[B, W - 1, channels]``, or ``None`` without one.
        recurrent: the recurrent state, ``[B, H, K, V]`` or ``[B, D, N]``; float32 (float64 in float64 modules).
    """

    conv: Tensor | None
    recurrent: Tensor


class RecurrentMixer(Mixer):
    """A mixer whose state is :class:`RecurrentState`, of the same size at every length.

    Subclasses set ``state_shape``, the shape of one row of the recurrent state, and hold at most one short convolution.
    One whose state holds further tensors has a named tuple of its own and overrides :meth:`new_state` alone.
    """

    state_shape: tuple[int, ...]

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of the recurrent state: float64 in a float64 module, else float32."""
        return torch.float64 if first_tensor(self).dtype == torch.float64 else torch.float32

    def new_state(self, batch_size: int, max_length: int, device: Device, dtype: torch.dtype | None) -> RecurrentState:
        """Zeros; ``dtype`` is that of the convolution's inputs, the recurrent state is never narrower than float32."""
        like = first_tensor(self)
        device = device or like.device
        recurrent = torch.zeros(batch_size, *self.state_shape, dtype=self.state_dtype, device=device)
        conv = self.short_conv
        inputs = None if conv is None else conv.init_state(batch_size, device, dtype or like.dtype)
        return RecurrentState(inputs, recurrent)

    def state_bytes(self, length: int, batch_size: int = 1) -> int:
        return batch_size * measured_state_bytes(self.init_state(1, device="meta"))


class LinearMixer(RecurrentMixer):
    """A mixer on ``ops.linear_attention``; its ``state_shape`` is ``(H, K, V)``."""

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        return linear_attention_flops(length, *self.state_shape, batch_size=batch_size)
