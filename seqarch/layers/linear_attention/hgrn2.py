"""HGRN2: a gated linear recurrence whose state is expanded by an outer product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.mixer import Boundaries, choose_heads
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.head_maps import HeadMap
from seqarch.layers.modules.heads import HeadProjection, HeadsConfig
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.norms import HeadNorm
from seqarch.layers.recurrent_mixer import LinearMixer, RecurrentState


@dataclass(frozen=True, kw_only=True)
class Hgrn2Config(HeadsConfig):
    """Options of :class:`Hgrn2`.

    Attributes:
        num_heads: H; by default heads of width 128, as in the paper, where that divides D, else of 64 or 32.
        key_width: K, of queries and forget gates; by default ``D / H`` as in the paper. Values stay ``D / H`` wide.
        lower_bound: the least value of the forget gate, below 1. The paper learns it and has it grow with depth.
        conv_width: width of a short convolution over queries, forget gates and inputs; 0, as in the paper, for none.
    """

    may_be_zero: ClassVar[tuple[str, ...]] = ("conv_width", "lower_bound")

    size_options: ClassVar[dict[str, str]] = {"key_width": "keys"}

    head_options: ClassVar[dict[str, str]] = {"num_heads": "heads", "key_width": "keys"}

    num_heads: int | None = None
    key_width: int | None = None
    lower_bound: float = 0.0
    conv_width: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.lower_bound >= 1:
            raise ValueError(f"lower_bound must be below 1, got {self.lower_bound}")

    @property
    def heads(self) -> int:
        wide = self.d_model // 128 if self.d_model % 128 == 0 else None
        return choose_heads(self.d_model, self.num_heads or wide)

    @property
    def keys(self) -> int:
        """K."""
        return self.key_width or self.head_width


class Hgrn2(LinearMixer):
    """``S_t = diag(f_t) S_{t-1} + (1 - f_t)^T i_t``, ``o_t = q_t S_t``, ``f_t = l + (1 - l) sigmoid(W_f x)``.

    ``q = silu(W_q x)`` (the output gate of HGRN), ``i = W_i x``, and an RMS norm over all channels at the end. Qin et
    al. 2024, "HGRN2: Gated Linear RNNs with State Expansion". Not HGRN, whose state is a vector, nor GLA, whose keys
    are free of the decays. The bound l is an option of each layer, since a mixer does not know its depth; the paper's
    is a cumulative softmax over the layers, 0 in the first. ``o_t`` is scaled by ``1 / sqrt(K)``, as in the release,
    which the norm takes out again. Projections have ``nn.Linear``'s initialisation.
    """

    takes_any_state = True

    Config = Hgrn2Config

    @from_options
    def __init__(self, config: Hgrn2Config):
        super().__init__(config)
        heads, keys, width = config.heads, config.keys, config.head_width
        self.qkv_proj = HeadProjection(
            config.d_model, [(heads, keys), (heads, keys), (heads, width)], config.conv_width
        )
        self.norm = HeadNorm(config.d_model, eps=1e-5)
        self.out_proj = Linear(config.d_model, config.d_model, bias=False)
        self.state_shape = (heads, keys, width)

    def head_maps(self) -> list[HeadMap]:
        out = HeadMap("o", "out_proj", self.config.heads, self.config.head_width)
        return [*self.qkv_proj.head_maps("qkv_proj", ("q", "forget", "v")), out]

    def mix(self, x: Tensor, state: RecurrentState, cu_seqlens: Boundaries) -> tuple[Tensor, RecurrentState]:
        conv, recurrent = state
        # queries, forget gates and inputs, [B, T, H, K] each
        (q, f, i), conv = self.qkv_proj(x, conv, cu_seqlens)
        f = f.to(self.state_dtype)
        # 1 - f and log f without the cancellation of computing f: at a bound of 0 the latter is the log-sigmoid
        k = (1 - self.config.lower_bound) * torch.sigmoid(-f)
        log_decay = torch.log1p(-k) if self.config.lower_bound else F.logsigmoid(f)
        # what is forgotten is what is written: 1 - f takes the place of the keys
        o, recurrent = ops.linear_attention(
            F.silu(q), k.to(q.dtype), i, log_decay, state=recurrent, cu_seqlens=cu_seqlens
        )
        return self.out_proj(self.norm(rearrange(o, "b t h v -> b t (h v)"))), RecurrentState(conv, recurrent)
