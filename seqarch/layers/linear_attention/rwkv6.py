"""RWKV-6 time mixing: a decay for every key dimension, and a bonus for the token itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.mixer import Boundaries, row_count
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.head_maps import HeadMap
from seqarch.layers.modules.heads import HeadWidthConfig
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.positions import tokens_before
from seqarch.layers.modules.token_shift import DEPTH, TokenShift, low_rank
from seqarch.layers.recurrent_mixer import LinearMixer, RecurrentState
from seqarch.ops.chunked.packing import over_sequences


@dataclass(frozen=True, kw_only=True)
class Rwkv6Config(HeadWidthConfig):
    """Options of :class:`Rwkv6`.

    Attributes:
        mix_rank, decay_rank: ranks of the maps from the input to the mixtures and to the decays.
    """

    mix_rank: int = 32
    decay_rank: int = 64


class Rwkv6(LinearMixer):
    """``o_t = r_t (S_{t-1} + diag(u) k_t^T v_t)``, ``S_t = diag(w_t) S_{t-1} + k_t^T v_t``.

    ``w = exp(-exp(d + W_2 tanh(W_1 x)))``. r, w, k, v and the gate are computed each from a mixture of a token and the
    one before, whose shares depend on both: ``m + M_2 tanh(M_1 x')``, x' a fixed mixture. The output is
    ``group_norm(o) silu(g)``. Peng et al. 2024, "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic
    Recurrence", section 4.2. Not GLA, where a token reads what it has just written, decayed by itself; here that runs
    as linear attention one step late, and the token's own part, with the bonus u, is added. Initial values are the
    release's (BlinkDL/RWKV-LM) at half the depth; projections, and the inner low-rank maps (0 there, where the outer
    ones would get no gradient), have ``nn.Linear``'s, and the norm's weights are 1 (there ``0.5^0.7``).
    """

    takes_any_state = True

    Config = Rwkv6Config
    unquantized = ("shares", "decay")
    no_weight_decay = ("bonus",)

    @from_options
    def __init__(self, config: Rwkv6Config):
        super().__init__(config)
        size, inner, heads, width = config.d_model, config.inner, config.heads, config.head_width
        self.shift = TokenShift(size)
        channels = torch.arange(inner)
        rising, line = (torch.arange(size) / size) ** (1 - DEPTH), channels / max(1, inner - 1)
        softly = 1 - rising.sqrt()
        self.share = nn.Parameter(1 - rising)
        shares = (softly, 1 - rising, 1 - rising, 1 - rising - 0.3 * DEPTH, softly)
        self.shares = nn.ModuleList(low_rank(size, config.mix_rank, nn.Tanh(), share) for share in shares)
        speed = -6 + 5 * line ** (0.7 + 1.3 * DEPTH)
        self.decay = low_rank(size, config.decay_rank, nn.Tanh(), speed, inner)
        for maps in (*self.shares, self.decay):
            nn.init.uniform_(maps.get_parameter("2.weight"), -0.01, 0.01)
        self.receptance, self.key, self.value, self.gate = (Linear(size, inner, bias=False) for _ in range(4))
        self.out_proj = Linear(inner, size, bias=False)
        bonus = DEPTH * (1 - line) + 0.1 * ((channels + 1) % 3 - 1)
        self.bonus = nn.Parameter(bonus.view(heads, -1))
        self.norm = nn.GroupNorm(heads, inner, eps=64e-5)
        self.state_shape = (heads, width, width)

    def head_maps(self) -> list[HeadMap]:
        paths = {"q": "receptance", "k": "key", "v": "value", "o": "out_proj"}
        heads = self.config.heads, self.config.head_width
        return [HeadMap(role, path, *heads) for role, path in paths.items()]

    def mix(self, x: Tensor, state: RecurrentState, cu_seqlens: Boundaries) -> tuple[Tensor, RecurrentState]:
        last, recurrent = state
        # each projection's shares of this token and the one before depend on both
        before, last = self.shift(x, last, cu_seqlens)
        mixture = torch.lerp(x, before, self.share.to(x.dtype))
        xr, xw, xk, xv, xg = (x + (before - x) * share(mixture) for share in self.shares)
        # r, k, v and a decay per key dimension, [B, T, H, K] each
        log_decay = -self.decay(xw).to(self.state_dtype).exp()
        pieces = (self.receptance(xr), self.key(xk), self.value(xv), log_decay)
        r, k, v, log_decay = (rearrange(m, "b t (h k) -> b t h k", h=self.state_shape[0]) for m in pieces)
        # the state before this token, and the token's own part by the bonus
        o, recurrent = self._read_before_writing(r, k, v, log_decay, recurrent, cu_seqlens)
        o = o + (r * k * self.bonus.to(r.dtype)).sum(-1, keepdim=True) * v
        # norm per head, gate
        o = self.norm(rearrange(o, "b t h v -> (b t) (h v)")).view(*x.shape[:2], self.config.inner)
        return self.out_proj(o * F.silu(self.gate(xg))), RecurrentState(last, recurrent)

    def _read_before_writing(
        self,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        recurrent: Tensor,
        cu_seqlens: Boundaries,
    ) -> tuple[Tensor, Tensor]:
        """``r_t S_{t-1}``, and the state after the last token: each token decays and writes at the next one's step."""
        nothing = r.new_zeros(row_count(r, cu_seqlens), *r.shape[2:])
        k, last_k = over_sequences(tokens_before, cu_seqlens, nothing, k)
        v, last_v = over_sequences(tokens_before, cu_seqlens, nothing, v)
        log_decay, last_decay = over_sequences(tokens_before, cu_seqlens, nothing, log_decay)
        o, recurrent = ops.linear_attention(r, k, v, log_decay, scale=1.0, state=recurrent, cu_seqlens=cu_seqlens)
        written = last_k.unsqueeze(-1).to(recurrent.dtype) * last_v.unsqueeze(-2)
        return o, last_decay.exp().unsqueeze(-1) * recurrent + written
