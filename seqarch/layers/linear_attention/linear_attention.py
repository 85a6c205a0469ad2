"""Linear attention without decay, for any feature map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.mixer import Boundaries
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.head_maps import HeadMap
from seqarch.layers.modules.heads import HeadProjection, HeadsConfig
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.norms import HeadNorm
from seqarch.layers.recurrent_mixer import LinearMixer, RecurrentState
from seqarch.ops.dispatch.checks import unknown_name


def taylor(x: Tensor) -> Tensor:
    """The map with ``phi(q) . phi(k) = 1 + s + s^2 / 2``, ``s = q . k / sqrt(K)``, of width ``(K + 1) (K + 2) / 2``.

    It holds each pair of channels once, where Arora et al. 2024 hold ``1 + K + K^2`` channels for the same products.
    """
    width = x.shape[-1]
    x = x * width**-0.25
    first, second = torch.triu_indices(width, width, device=x.device)
    weights = torch.where(first == second, 0.5, 1.0).to(x.dtype).sqrt()
    pairs = weights * x.index_select(-1, first) * x.index_select(-1, second)
    return torch.cat([torch.ones_like(x[..., :1]), x, pairs], dim=-1)


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "softmax": lambda x: x.softmax(dim=-1),
    "identity": lambda x: x,
    "taylor": taylor,
}
"""By name: ``elu(x) + 1`` (Katharopoulos et al. 2020, eq. 7), ReLU, softmax over the head's width, none, the second
order of the exponential (Arora et al. 2024)."""

NORMALISERS = ("sum", "rms", "none")


@dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig(HeadsConfig):
    """Options of :class:`LinearAttention`.

    Attributes:
        key_width: width of the queries and keys before the feature map; by default ``D / H``.
        feature_map: a key of ``FEATURE_MAPS``, applied to queries and keys.
        normaliser: ``"sum"`` divides by the summed kernel, which needs a feature map that is not negative; ``"rms"``
            takes an RMS norm per head instead (Qin et al. 2022, "The Devil in Linear Transformer"); ``"none"`` does
            neither.
        conv_width: width of a short convolution over queries, keys and values; 0 for none.
    """

    size_options: ClassVar[dict[str, str]] = {"key_width": "keys"}

    head_options: ClassVar[dict[str, str]] = {"num_heads": "heads", "key_width": "keys"}

    key_width: int | None = None
    feature_map: str = "elu"
    normaliser: str = "sum"
    conv_width: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.feature_map not in FEATURE_MAPS:
            raise unknown_name("feature_map", self.feature_map, FEATURE_MAPS)
        if self.normaliser not in NORMALISERS:
            raise unknown_name("normaliser", self.normaliser, NORMALISERS)
        if self.normaliser == "sum" and self.feature_map == "identity":
            raise ValueError("normaliser 'sum' needs a feature map that is not negative, got feature_map 'identity'")

    @property
    def keys(self) -> int:
        """The width of queries and keys before the feature map."""
        return self.key_width or self.head_width


class LinearAttention(LinearMixer):
    """Attention with a kernel in place of the exponential: ``S_t = S_{t-1} + phi(k_t)^T v_t``, ``o_t = phi(q_t) S_t``.

    Divided by ``phi(q_t) . sum_s phi(k_s)`` under the default normaliser, whose sum is kept as one more value channel,
    so the state is ``[B, H, K, V + 1]``, K the width of phi. Katharopoulos et al. 2020, "Transformers are RNNs", eq.
    16-20. It never forgets: not to be confused with retention or Mamba-2, which decay. Projections have ``nn.Linear``'s
    initialisation.
    """

    Config = LinearAttentionConfig

    @from_options
    def __init__(self, config: LinearAttentionConfig):
        super().__init__(config)
        heads, width = config.heads, config.head_width
        keys = config.keys
        parts = [(heads, keys), (heads, keys), (heads, width)]
        self.qkv_proj = HeadProjection(config.d_model, parts, config.conv_width)
        self.norm = HeadNorm(width) if config.normaliser == "rms" else None
        self.out_proj = Linear(config.d_model, config.d_model, bias=False)
        features = FEATURE_MAPS[config.feature_map](torch.empty(keys, device="meta")).shape[-1]
        self.state_shape = (heads, features, width + (config.normaliser == "sum"))

    def head_maps(self) -> list[HeadMap]:
        out = HeadMap("o", "out_proj", self.config.heads, self.config.head_width)
        return [*self.qkv_proj.head_maps("qkv_proj"), out]

    def mix(self, x: Tensor, state: RecurrentState, cu_seqlens: Boundaries) -> tuple[Tensor, RecurrentState]:
        conv, recurrent = state
        (q, k, v), conv = self.qkv_proj(x, conv, cu_seqlens)
        # the kernel's features take the place of queries and keys: [B, T, H, features]
        feature_map = FEATURE_MAPS[self.config.feature_map]
        q, k = feature_map(q), feature_map(k)
        if self.config.normaliser == "sum":
            # the sum of the keys, which divides the outputs, is the value channel of ones
            v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
            o, recurrent = ops.linear_attention(q, k, v, scale=1.0, state=recurrent, cu_seqlens=cu_seqlens)
            o = o[..., :-1] / (o[..., -1:] + 1e-6)
        else:
            o, recurrent = ops.linear_attention(q, k, v, state=recurrent, cu_seqlens=cu_seqlens)
        if self.norm is not None:
            o = self.norm(o)
        return self.out_proj(rearrange(o, "b t h v -> b t (h v)")), RecurrentState(conv, recurrent)
