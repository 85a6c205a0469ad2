"""Gated linear attention: a learnt decay for every key dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.mixer import Boundaries, LayerConfig
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.head_maps import HeadMap
from seqarch.layers.modules.heads import HeadProjection
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.negative_eigenvalues import signed_linear_attention
from seqarch.layers.modules.norms import GatedRMSNorm
from seqarch.layers.recurrent_mixer import LinearMixer, RecurrentState


@dataclass(frozen=True, kw_only=True)
class GlaConfig(LayerConfig):
    """Options of :class:`Gla`.

    Attributes:
        num_heads: H.
        expand_k, expand_v: all heads together have ``expand_k D`` key dimensions and ``expand_v D`` values.
        key_width, value_width: K and V, of one head, in place of ``expand_k`` and ``expand_v``.
        gate_rank: rank of the map from the input to the decays.
        temperature: the decays' root; larger forgets more slowly.
        decay_bias: initial bias b of the decays' logits, larger forgets more slowly; by default ``nn.Linear``'s.
        conv_width: width of a short convolution with SiLU over queries, keys and values; 0, as in the paper, for none.
        negative_eigenvalues: maps the decays from (0, 1) to (-1, 1) by ``2 a - 1`` (Grazzi et al. 2024, who do it to
            Mamba and name GLA among the models that need it).
    """

    size_options: ClassVar[dict[str, str]] = {"num_heads": "num_heads", "key_width": "keys", "value_width": "values"}

    head_options: ClassVar[dict[str, str]] = {"num_heads": "heads", "key_width": "keys", "value_width": "values"}

    slow_gates: ClassVar[dict[str, float]] = {"decay_bias": 4.0}

    num_heads: int = 4
    expand_k: float = 0.5
    expand_v: float = 1.0
    key_width: int | None = None
    value_width: int | None = None
    gate_rank: int = 16
    temperature: float = 16.0
    decay_bias: float | None = None
    conv_width: int = 0
    negative_eigenvalues: bool = False

    def __post_init__(self):
        super().__post_init__()
        for option, given in (("expand_k", self.key_width), ("expand_v", self.value_width)):
            if given is None and getattr(self, option) * self.d_model % self.num_heads:
                raise ValueError(
                    f"num_heads ({self.num_heads}) must divide {option} * d_model"
                    f" ({getattr(self, option) * self.d_model:g})"
                )

    @property
    def keys(self) -> int:
        """K."""
        return self.key_width or int(self.expand_k * self.d_model) // self.num_heads

    @property
    def values(self) -> int:
        """V."""
        return self.value_width or int(self.expand_v * self.d_model) // self.num_heads


class Gla(LinearMixer):
    """``S_t = diag(a_t) S_{t-1} + k_t^T v_t``, ``o_t = q_t S_t / sqrt(K)``, ``a_t = sigmoid(W_2 W_1 x + b)^(1 / 16)``.

    The output is ``norm(o) silu(W_g x)``, a norm per head. Yang et al. 2023, "Gated Linear Attention Transformers with
    Hardware-Efficient Training", section 4.4. Not Mamba-2, with one decay per head, nor HGRN2, whose keys are tied to
    the decays. RMS norms and a gate without bias as in the release (the paper: layer norms, a bias). Projections have
    ``nn.Linear``'s initialisation.
    """

    takes_any_state = True

    Config = GlaConfig
    unquantized = ("decay",)

    @from_options
    def __init__(self, config: GlaConfig):
        super().__init__(config)
        heads, keys, values = config.num_heads, config.keys, config.values
        parts = [(heads, keys), (heads, keys), (heads, values)]
        self.qkv_proj = HeadProjection(config.d_model, parts, config.conv_width, "silu" if config.conv_width else None)
        decays = Linear(config.gate_rank, heads * keys)
        if config.decay_bias is not None:
            nn.init.constant_(decays.bias, config.decay_bias)
        self.decay = nn.Sequential(Linear(config.d_model, config.gate_rank, bias=False), decays)
        self.gate = Linear(config.d_model, heads * values, bias=False)
        self.norm = GatedRMSNorm(values, gate="after")
        self.out_proj = Linear(heads * values, config.d_model, bias=False)
        self.state_shape = (heads, keys, values)

    def head_maps(self) -> list[HeadMap]:
        heads, _, values = self.state_shape
        return [*self.qkv_proj.head_maps("qkv_proj"), HeadMap("o", "out_proj", heads, values)]

    def mix(self, x: Tensor, state: RecurrentState, cu_seqlens: Boundaries) -> tuple[Tensor, RecurrentState]:
        conv, recurrent = state
        (q, k, v), conv = self.qkv_proj(x, conv, cu_seqlens)
        # a decay per key dimension, [B, T, H, K]; its root keeps it near 1 at first
        logits = rearrange(self.decay(x), "b t (h k) -> b t h k", k=q.shape[-1])
        log_decay = F.logsigmoid(logits.to(self.state_dtype)) / self.config.temperature
        attend = signed_linear_attention if self.config.negative_eigenvalues else ops.linear_attention
        o, recurrent = attend(q, k, v, log_decay, state=recurrent, cu_seqlens=cu_seqlens)
        # norm per head with the gate inside, then the heads together
        o = self.norm(o, rearrange(self.gate(x), "b t (h v) -> b t h v", v=o.shape[-1]))
        return self.out_proj(rearrange(o, "b t h v -> b t (h v)")), RecurrentState(conv, recurrent)
