"""RWKV-7 time mixing: a delta rule whose removal key is apart from its replacement key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from seqarch import ops
from seqarch.layers.mixer import Boundaries
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.head_maps import HeadMap
from seqarch.layers.modules.heads import HeadWidthConfig
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.norms import l2_normalise
from seqarch.layers.modules.token_shift import DEPTH, TokenShift, low_rank
from seqarch.layers.recurrent_mixer import RecurrentMixer, RecurrentState
from seqarch.ops.delta_rule import flops as recurrence_flops
from seqarch.ops.dispatch.checks import unknown_name

SHIFTS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
"""The six mixtures of the last two tokens, and how steeply the initial share of each grows over the channels."""

VALUE_RESIDUALS = ("none", "give", "take")
FIRST_VALUE = "first_value"
"""What layers of a stack give and take: values ``[B, T, E]``."""


@dataclass(frozen=True, kw_only=True)
class Rwkv7Config(HeadWidthConfig):
    """Options of :class:`Rwkv7`.

    Attributes:
        decay_rank, rate_rank, gate_rank: ranks of the maps from the input to the decays, to the rates a and to the
            output gate; by default the release's ``2.5 sqrt(D)``, ``2.5 sqrt(D)`` and ``5 sqrt(D)``, rounded to
            multiples of 32, at least 32.
        value_residual: ``"give"`` gives this layer's values to later ones of the stack, ``"take"`` moves values towards
            those that an earlier one gave, ``"none"`` does neither. Released models give in the first layer and take
            in all others: ``rwkv7(value_residual=give) 11*rwkv7(value_residual=take)``.
        value_rank: rank of the map from the input to how far they move; by default the release's ``1.7 sqrt(D)``,
            rounded likewise.
        norm_eps: times K added to the variance in the norm of each head.
        removal_eps: added to the squared length of z; flash-linear-attention has 1e-6 there with ``fuse_norm``.
    """

    decay_rank: int | None = None
    rate_rank: int | None = None
    gate_rank: int | None = None
    value_residual: str = "none"
    value_rank: int | None = None
    norm_eps: float = 1e-5
    removal_eps: float = 1e-12

    def __post_init__(self):
        super().__post_init__()
        if self.value_residual not in VALUE_RESIDUALS:
            raise unknown_name("value_residual", self.value_residual, VALUE_RESIDUALS)

    @property
    def chosen_decay_rank(self) -> int:
        return self._rank(self.decay_rank, 2.5)

    @property
    def chosen_rate_rank(self) -> int:
        return self._rank(self.rate_rank, 2.5)

    @property
    def chosen_gate_rank(self) -> int:
        return self._rank(self.gate_rank, 5.0)

    @property
    def chosen_value_rank(self) -> int:
        return self._rank(self.value_rank, 1.7)

    def _rank(self, given: int | None, factor: float) -> int:
        return given or max(32, 32 * round(factor * self.d_model**0.5 / 32))


class Rwkv7(RecurrentMixer):
    """``S_t = diag(w_t) S_{t-1} + k_t^T v_t - (a_t * z_t)^T (z_t S_{t-1})``, ``o_t = r_t S_t``, z of unit norm.

    Each input is a learnt mixture of a token and the one before, channel by channel. ``w = exp(-e^-0.5 sigmoid(d))``
    with ``d = W_2 tanh(W_1 x) + b``, ``a = sigmoid(A_2 A_1 x + b)``, ``z = normalise(k * k_k)``, then
    ``k = k * (1 + (a - 1) * k_a)``; the output is ``(group_norm(o) + (r * r_k . k) v) * (G_2 sigmoid(G_1 x))``. Peng et
    al. 2025, "RWKV-7 Goose with Expressive Dynamic State Evolution", section 4. Not the delta rule proper: z removes, k
    writes, and z reads the state before its decay, so that the operation's ``read`` is z divided by w (at least 0.545).
    The rates a in (0, 1) give eigenvalues down to ``w - 1``.

    With ``value_residual="take"`` the values are ``v + (u - v) * sigmoid(V_2 V_1 x + b)``, u those of an earlier layer,
    in releases the first. Initial values are the release's (BlinkDL/RWKV-LM) at half the depth, except that the output
    and the inner maps of w, a, v and the gate have ``nn.Linear``'s instead of 0, where others would get no gradient.
    Mixtures and bonus take no weight decay (nor, in the release, the low-rank maps).
    """

    takes_any_state = True

    Config = Rwkv7Config
    unquantized = ("decay", "rate", "value_gate")
    no_weight_decay = ("shares", "bonus")

    @from_options
    def __init__(self, config: Rwkv7Config):
        super().__init__(config)
        size, inner, heads, width = config.d_model, config.inner, config.heads, config.head_width
        channels = torch.arange(inner)
        line = channels / max(1, inner - 1)
        zigzag = 2 * (channels % width) / max(1, width - 1) - 1
        zigzag = zigzag * zigzag.abs()

        self.shift = TokenShift(size)
        shares = [1 - (torch.arange(size) / size) ** (steepness * (1 - DEPTH)) for steepness in SHIFTS.values()]
        self.shares = nn.Parameter(torch.stack(shares))
        self.receptance, self.key, self.value = (_uniform(size, inner, bound) for bound in (0.5, 0.05, 0.5))
        decay = -5.5 + 6 * line ** (1 + DEPTH**0.3) + 2.5 * zigzag
        self.decay = low_rank(size, config.chosen_decay_rank, nn.Tanh(), decay, inner)
        rate = -0.19 + 0.3 * zigzag + 0.4 * (line - 0.5)
        self.rate = low_rank(size, config.chosen_rate_rank, nn.Identity(), rate, inner)
        self.gate = low_rank(size, config.chosen_gate_rank, nn.Sigmoid(), outputs=inner)
        self.gives = (FIRST_VALUE,) if config.value_residual == "give" else ()
        self.takes = (FIRST_VALUE,) if config.value_residual == "take" else ()
        if self.takes:
            towards = 0.73 - 0.4 * (line - 0.5)
            self.value_gate = low_rank(size, config.chosen_value_rank, nn.Identity(), towards, inner)
        self.removal = nn.Parameter(0.71 - 0.1 * (line - 0.5))
        self.replacement = nn.Parameter(torch.full((inner,), 1.02))
        self.bonus = nn.Parameter(torch.full((heads, width), -0.04))
        self.norm = nn.GroupNorm(heads, inner, eps=config.norm_eps * width)
        nn.init.constant_(self.norm.weight, DEPTH**0.7)
        self.out_proj = Linear(inner, size, bias=False)
        self.state_shape = (heads, width, width)

    def head_maps(self) -> list[HeadMap]:
        paths = {"q": "receptance", "k": "key", "v": "value", "o": "out_proj"}
        heads = self.config.heads, self.config.head_width
        return [HeadMap(role, path, *heads) for role, path in paths.items()]

    def mix(self, x: Tensor, state: RecurrentState, cu_seqlens: Boundaries) -> tuple[Tensor, RecurrentState]:
        return self.exchange(x, state, cu_seqlens, {})[:2]

    def exchange(
        self, x: Tensor, state: RecurrentState, cu_seqlens: Boundaries, taken: Mapping[str, Tensor]
    ) -> tuple[Tensor, RecurrentState, Mapping[str, Tensor]]:
        last, recurrent = state
        # every projection has its own mixture of this token and the one before
        before, last = self.shift(x, last, cu_seqlens)
        xr, xw, xk, xv, xa, xg = (torch.lerp(x, before, share) for share in self.shares.to(x.dtype))
        r, k, v, a = self.receptance(xr), self.key(xk), self.value(xv), self.rate(xa).sigmoid()
        given = {FIRST_VALUE: v} if self.gives else {}
        if self.takes:
            v = self._towards(taken[FIRST_VALUE], v, xv)
        # z is removed from the state, k is written; a is the rate of both
        z, k = k * self.removal.to(k.dtype), k * (1 + (a - 1) * self.replacement.to(k.dtype))
        log_decay = -math.exp(-0.5) * self.decay(xw).to(self.state_dtype).sigmoid()
        split = (rearrange(m, "b t (h k) -> b t h k", h=self.state_shape[0]) for m in (r, k, v, a, z, log_decay))
        r, k, v, a, z, log_decay = split
        z = l2_normalise(z, eps=self.config.removal_eps)  # k starts small: 1e-6 would be seen
        # z reads the state before its decay, the operation after it: divide by the decay
        read = (z * torch.exp(-log_decay)).to(z.dtype)
        o, recurrent = ops.delta_rule(
            r, k, v, log_decay=log_decay, read=read, erase=a * z, scale=1.0, state=recurrent, cu_seqlens=cu_seqlens
        )
        # a norm per head; then the bonus of the token itself, and the gate
        o = self.norm(rearrange(o, "b t h v -> (b t) (h v)")).view(*x.shape[:2], self.config.inner)
        o = o + rearrange((r * k * self.bonus.to(r.dtype)).sum(-1, keepdim=True) * v, "b t h v -> b t (h v)")
        return self.out_proj(o * self.gate(xg)), RecurrentState(last, recurrent), given

    def _towards(self, first: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Values ``[B, T, E]`` on the way to those of an earlier layer."""
        if first.shape != v.shape:
            raise ValueError(
                f"Rwkv7: the {FIRST_VALUE} of an earlier layer is {list(first.shape)}, expected {list(v.shape)}"
            )
        return torch.lerp(v, first, self.value_gate(x).sigmoid())

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        return recurrence_flops(length, *self.state_shape, batch_size=batch_size, erase_apart=True)


def _uniform(size: int, outputs: int, bound: float) -> nn.Linear:
    linear = Linear(size, outputs, bias=False)
    nn.init.uniform_(linear.weight, -bound * size**-0.5, bound * size**-0.5)
    return linear
