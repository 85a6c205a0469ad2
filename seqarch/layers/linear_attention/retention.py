"""Retention (RetNet): linear attention with a fixed decay per head and rotated queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.mixer import Boundaries, Device, choose_heads
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.head_maps import HeadMap
from seqarch.layers.modules.heads import HeadProjection, HeadsConfig
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.positions import token_positions
from seqarch.layers.modules.rotary import apply_rotary
from seqarch.layers.recurrent_mixer import LinearMixer


@dataclass(frozen=True, kw_only=True)
class RetentionConfig(HeadsConfig):
    """Options of :class:`Retention`.

    Attributes:
        key_width: K, an even number; by default ``D / H``.
        expand_v: V is ``expand_v K`` where ``value_width`` is not given.
        value_width: V.
        rotary_base: base of the rotation's wavelengths.
        conv_width: width of a short convolution over queries, keys and values; 0, as in the paper, for none.
    """

    size_options: ClassVar[dict[str, str]] = {"num_heads": "heads", "key_width": "keys", "value_width": "values"}

    head_options: ClassVar[dict[str, str]] = {"num_heads": "heads", "key_width": "keys", "value_width": "values"}

    kept_options: ClassVar[tuple[str, ...]] = ("rotary_base",)

    key_width: int | None = None
    expand_v: int = 2
    value_width: int | None = None
    rotary_base: float = 10000.0
    conv_width: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.keys % 2:
            raise ValueError(f"rotation needs an even head width, got {self.keys} (num_heads {self.heads})")

    @property
    def heads(self) -> int:
        return choose_heads(self.d_model, self.num_heads, self.key_width)

    @property
    def keys(self) -> int:
        """K."""
        return self.key_width or self.head_width

    @property
    def values(self) -> int:
        """V."""
        return self.value_width or self.expand_v * self.keys


class RetentionState(NamedTuple):
    """State of :class:`Retention`.

    Attributes:
        conv: the short convolution's last inputs, or ``None`` without one.
        recurrent: ``[B, H, K, V]``.
        seen: tokens seen, ``[B]``, from which the rotation resumes.
    """

    conv: Tensor | None
    recurrent: Tensor
    seen: Tensor


class Retention(LinearMixer):
    """``S_t = g_h S_{t-1} + k_t^T v_t``, ``o_t = q_t S_t / sqrt(K)`` with ``g_h = 1 - 2^(-5-h)`` and rotated q and k.

    The output is ``group_norm(o) silu(W_g x)``, the norm an RMS norm per head without weights, as in the release.
    Sun et al. 2023, "Retentive Network", eq. 6-8; the scale of xPos is the decay itself, so only its rotation remains.
    Wavelengths are RoFormer's; the release spaces them a little wider, up to the base itself. Not Mamba-2 or GLA, whose
    decays depend on the input. Xavier initialisation with gain ``2^-2.5`` (output ``2^-1``), as released.
    """

    Config = RetentionConfig

    @from_options
    def __init__(self, config: RetentionConfig):
        super().__init__(config)
        num_heads, width, values = config.heads, config.keys, config.values
        parts = [(num_heads, width), (num_heads, width), (num_heads, values)]
        self.qkv_proj = HeadProjection(config.d_model, parts, config.conv_width)
        self.gate = Linear(config.d_model, num_heads * values, bias=False)
        self.out_proj = Linear(num_heads * values, config.d_model, bias=False)
        for matrix in (*self.qkv_proj.linear.weight.split(self.qkv_proj.sizes), self.gate.weight):
            nn.init.xavier_uniform_(matrix.detach(), gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=2**-1)
        self.state_shape = (num_heads, width, values)

    def head_maps(self) -> list[HeadMap]:
        heads, _, values = self.state_shape
        return [*self.qkv_proj.head_maps("qkv_proj"), HeadMap("o", "out_proj", heads, values)]

    def mix(self, x: Tensor, state: RetentionState, cu_seqlens: Boundaries) -> tuple[Tensor, RetentionState]:
        conv, recurrent, seen = state
        # rotated q and k: the complex part of the decay, by positions that resume where the state ends
        positions, seen = token_positions(seen, x.shape[1], cu_seqlens)
        (q, k, v), conv = self.qkv_proj(x, conv, cu_seqlens)
        q, k = (apply_rotary(m, positions, self.config.rotary_base) for m in (q, k))
        # one fixed decay per head, from 1 - 2^-5 on
        heads = torch.arange(self.state_shape[0], dtype=self.state_dtype, device=x.device)
        log_decay = torch.log1p(-torch.exp2(-5 - heads))
        o, recurrent = ops.linear_attention(q, k, v, log_decay, state=recurrent, cu_seqlens=cu_seqlens)
        # norm per head, since heads of slow decay have larger sums; then the gate
        o = rearrange(F.rms_norm(o, o.shape[-1:], eps=1e-6), "b t h v -> b t (h v)")
        return self.out_proj(o * F.silu(self.gate(x))), RetentionState(conv, recurrent, seen)

    def new_state(self, batch_size: int, max_length: int, device: Device, dtype: torch.dtype | None) -> RetentionState:
        conv, recurrent = super().new_state(batch_size, max_length, device, dtype)
        return RetentionState(conv, recurrent, torch.zeros(batch_size, dtype=torch.int64, device=recurrent.device))
