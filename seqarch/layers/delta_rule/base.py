"""The base of the mixers on the delta rule: projections, beta and decay, and the way in and out of the recurrence."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch.layers.mixer import Boundaries, choose_heads
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.head_maps import HeadMap
from seqarch.layers.modules.heads import HeadProjection, HeadsConfig
from seqarch.layers.modules.norms import l2_normalise
from seqarch.layers.recurrent_mixer import RecurrentMixer
from seqarch.ops.delta_rule import flops as recurrence_flops


@dataclass(frozen=True, kw_only=True)
class DeltaRuleConfig(HeadsConfig):
    """Options that all mixers on the delta rule have.

    Attributes:
        key_width: K; by default ``D / H``.
        value_width: V; by default K.
        conv_width: width of the short convolutions over queries, keys and values; 0 for none.
        negative_eigenvalues: doubles beta to (0, 2), which lets the model track state (Grazzi et al. 2024).
        norm_eps: added to the mean square in the norm of the output.
    """

    size_options: ClassVar[dict[str, str]] = {"num_heads": "heads", "key_width": "keys", "value_width": "values"}

    head_options: ClassVar[dict[str, str]] = {"num_heads": "heads", "key_width": "keys", "value_width": "values"}

    key_width: int | None = None
    value_width: int | None = None
    conv_width: int = 4
    negative_eigenvalues: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        _ = self.key_shape, self.value_shape  # raises where the options do not fit together

    @property
    def key_shape(self) -> tuple[int, int]:
        """Heads and width of the queries and keys, G and K."""
        return self.heads, self.key_width or self.head_width

    @property
    def value_shape(self) -> tuple[int, int]:
        """Heads and width of the values, H and V."""
        return self.heads, self.value_width or self.keys

    @property
    def keys(self) -> int:
        """K."""
        return self.key_shape[1]

    @property
    def values(self) -> int:
        """V."""
        return self.value_shape[1]

    @property
    def heads(self) -> int:
        return choose_heads(self.d_model, self.num_heads, self.key_width)


@dataclass(frozen=True, kw_only=True)
class GatedDeltaRuleConfig(DeltaRuleConfig):
    """Options of the mixers on the delta rule whose state decays.

    Attributes:
        num_key_heads: G, the heads of queries and keys, each shared by ``H / G`` heads of values; by default H.
        expand_v: V is ``expand_v K`` where ``value_width`` is not given.
        dt_min, dt_max, dt_floor: range of the initial step sizes of the decay.
    """

    slow_gates: ClassVar[dict[str, float]] = {"dt_min": 1e-4, "dt_max": 1e-3}

    num_key_heads: int | None = None
    expand_v: float = 1.0
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4

    @property
    def key_shape(self) -> tuple[int, int]:
        groups = self.num_key_heads or self.heads
        if self.heads % groups:
            raise ValueError(f"num_key_heads ({groups}) must divide num_heads ({self.heads})")
        return groups, self.key_width or self.head_width

    @property
    def value_shape(self) -> tuple[int, int]:
        if self.value_width is not None:
            return self.heads, self.value_width
        width = self.expand_v * self.key_shape[1]
        if width != int(width):
            raise ValueError(f"expand_v * key_width must be a whole number, got {width:g}")
        return self.heads, int(width)


class DeltaRuleMixer(RecurrentMixer):
    """Queries, keys and values by short convolutions and SiLU, q and k of unit norm; a subclass runs the recurrence.

    Subclasses set ``norm`` and ``out_proj``; those that decay ``A_log`` and ``dt_bias``; those that gate their output,
    ``gate``.

    Args:
        steps: keys and values per token.
    """

    takes_any_state = True

    config: DeltaRuleConfig
    norm: nn.Module
    gate: nn.Module
    out_proj: nn.Linear
    A_log: nn.Parameter
    dt_bias: nn.Parameter

    kept_parts = ("qkv_proj.conv",)

    @from_options
    def __init__(self, config: DeltaRuleConfig, steps: int = 1):
        super().__init__(config)
        (groups, keys), (heads, values) = config.key_shape, config.value_shape
        parts = [(groups, keys), (steps * groups, keys), (steps * heads, values)]
        self.qkv_proj = self.projection(parts)
        self.state_shape = (heads, keys, values)

    def projection(self, parts: list[tuple[int, int]]) -> HeadProjection:
        """What makes queries, keys and values of these heads and widths."""
        return HeadProjection(self.config.d_model, parts, self.config.conv_width, "silu")

    def head_maps(self) -> list[HeadMap]:
        return [*self.qkv_proj.head_maps("qkv_proj"), HeadMap("o", "out_proj", *self.config.value_shape)]

    @abstractmethod
    def recurrence(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, recurrent: Tensor, cu_seqlens: Boundaries
    ) -> tuple[Tensor, Tensor]:
        """The outputs ``[B, T, H, V]`` and the state after them, from q and k of unit norm and the mixer's input x."""

    def gate_output(self, x: Tensor, o: Tensor) -> Tensor:
        """The outputs ``[B, T, H, V]`` normalised, and gated by x."""
        return self.norm(o, rearrange(self.gate(x), "b t (h v) -> b t h v", v=o.shape[-1]))

    def beta(self, logits: Tensor) -> Tensor:
        """The share of the old value that is erased: in (0, 1), or in (0, 2) with negative eigenvalues."""
        return logits.sigmoid() * (2 if self.config.negative_eigenvalues else 1)

    def log_decay(self, logits: Tensor) -> Tensor:
        """``-exp(A_log) softplus(logits + dt_bias)``, for ``[B, T, H]`` or ``[B, T, H, K]``; A is one per head."""
        rate = self.A_log.to(self.state_dtype).exp().view(-1, *[1] * (logits.ndim - 3))
        return -rate * F.softplus(self.shifted(logits))

    def shifted(self, logits: Tensor) -> Tensor:
        """``logits + dt_bias``, in the state's dtype."""
        return logits.to(self.state_dtype) + self.dt_bias.to(self.state_dtype).view(logits.shape[2:])

    def over_time(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Any, cu_seqlens: Boundaries
    ) -> tuple[Tensor, Any]:
        """:meth:`recurrence` on the state of which it is a part."""
        o, recurrent = self.recurrence(x, q, k, v, state.recurrent, cu_seqlens)
        return o, state._replace(recurrent=recurrent)

    def mix(self, x: Tensor, state: Any, cu_seqlens: Boundaries) -> tuple[Tensor, Any]:
        # one matrix and one short convolution for q, k [B, T, G, K] and v [B, T, H, V]
        (q, k, v), conv = self.qkv_proj(x, state.conv, cu_seqlens)
        # keys of unit norm: with beta at most 2 the state then cannot grow by what is erased
        o, state = self.over_time(x, l2_normalise(q), l2_normalise(k), v, state, cu_seqlens)
        # norm and gate per head, since heads differ in scale; the last projection mixes them
        y = self.out_proj(rearrange(self.gate_output(x, o), "b t h v -> b t (h v)"))
        return y, state._replace(conv=conv)

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        return recurrence_flops(length, *self.state_shape, batch_size=batch_size)
