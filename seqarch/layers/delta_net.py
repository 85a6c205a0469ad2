"""DeltaNet: linear attention that overwrites what a key held before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor, nn

from seqarch import ops
from seqarch.layers.heads import HeadProjection
from seqarch.layers.mixer import LayerConfig, choose_heads, linear_flops
from seqarch.layers.norms import HeadNorm, l2_normalise
from seqarch.layers.recurrent import RecurrentMixer, RecurrentState
from seqarch.ops.delta_rule import flops as recurrence_flops


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(LayerConfig):
    """Options of :class:`DeltaNet`.

    Attributes:
        num_heads: H; by default heads of width 64 (32 where 64 does not divide D).
        conv_width: width of the short convolutions over queries, keys and values; 0 for none.
        negative_eigenvalues: doubles beta to (0, 2), which lets the model track state (Grazzi et al. 2024).
    """

    num_heads: int | None = None
    conv_width: int = 4
    negative_eigenvalues: bool = False

    def __post_init__(self):
        super().__post_init__()
        choose_heads(self.d_model, self.num_heads)


class DeltaNet(RecurrentMixer):
    """The delta rule without decay: ``S_t = S_{t-1} + beta_t k_t^T (v_t - k_t S_{t-1})``, ``o_t = q_t S_t / sqrt(K)``.

    Queries, keys and values pass a short convolution and SiLU, queries and keys are then made of unit norm,
    ``beta = sigmoid(W x)``, the output takes an RMS norm a head. Yang et al. 2024, "Parallelizing Linear Transformers
    with the Delta Rule over Sequence Length", section 3.4. It cannot forget on its own: for that see gated_delta_net.
    Projections have ``nn.Linear``'s initialisation (the release: normal with 0.02, the same scale at D = 833).
    """

    Config = DeltaNetConfig

    def __init__(self, config: DeltaNetConfig):
        super().__init__()
        self.config = config
        num_heads = choose_heads(config.d_model, config.num_heads)
        width = config.d_model // num_heads
        self.heads = HeadProjection(config.d_model, [(num_heads, width)] * 3, config.conv_width, "silu")
        self.beta = nn.Linear(config.d_model, num_heads, bias=False)
        self.norm = HeadNorm(width, eps=1e-5)
        self.output = nn.Linear(config.d_model, config.d_model, bias=False)
        self.memory_shape = (num_heads, width, width)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, cu_seqlens: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, RecurrentState]:
        conv, memory = (None, None) if state is None else state
        (q, k, v), conv = self.heads(x, conv, cu_seqlens)
        beta = self.beta(x).sigmoid() * (2 if self.config.negative_eigenvalues else 1)
        o, memory = ops.delta_rule(l2_normalise(q), l2_normalise(k), v, beta, state=memory, cu_seqlens=cu_seqlens)
        return self.output(rearrange(self.norm(o), "b t h v -> b t (h v)")), RecurrentState(conv, memory)

    def flops(self, length: int, batch_size: int = 1) -> int:
        tokens = batch_size * length
        own = linear_flops(self.output, tokens) + linear_flops(self.beta, tokens)
        return (
            own
            + self.heads.flops(length, batch_size)
            + recurrence_flops(length, *self.memory_shape, batch_size=batch_size)
        )
