"""The elementwise recurrence, whose state is one number per channel, and the base of the mixers on it."""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch import ops
from seqarch.layers.mixer import Boundaries
from seqarch.layers.modules.negative_eigenvalues import signed_decay
from seqarch.layers.recurrent_mixer import RecurrentMixer
from seqarch.ops.selective_scan import flops as scan_flops


def elementwise_scan(
    x: Tensor, log_decay: Tensor, state: Tensor | None = None, cu_seqlens: Boundaries = None, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """``h_t = a_t h_{t-1} + x_t`` with ``a_t = exp(log_decay_t)``, or ``2 exp(log_decay_t) - 1`` where ``signed``.

    Args:
        x: ``[B, T, E]``.
        log_decay: ``[B, T, E]``, at most 0.
        state: ``[B, E, 1]``.

    Returns:
        h in the dtype of x, and the last state.
    """
    if signed:
        # in float64: decays near 1 lose what makes them differ from it
        wide, signs, last = signed_decay(2 * log_decay.double().exp() - 1, cu_seqlens)
        h, state = elementwise_scan(signs.to(x.dtype) * x, wide.to(log_decay.dtype), state, cu_seqlens)
        return signs.to(x.dtype) * h, last.to(state.dtype).unsqueeze(-1) * state
    A = torch.full((x.shape[-1], 1), -1.0, dtype=log_decay.dtype, device=x.device)
    one = torch.ones(*x.shape[:2], 1, dtype=log_decay.dtype, device=x.device)
    return ops.selective_scan(x, -log_decay, A, one, one, scale_input=False, state=state, cu_seqlens=cu_seqlens)


class ElementwiseMixer(RecurrentMixer):
    """A mixer on :func:`elementwise_scan`; its ``state_shape`` is ``(E, 1)``."""

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        return scan_flops(length, *self.state_shape, batch_size=batch_size)
