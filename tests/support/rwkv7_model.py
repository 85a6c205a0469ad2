"""RWKV-7 by its equations, token by token, under the names that flash-linear-attention gives settings and tensors.

That package's own model runs on GPUs alone. ``tests/data/oracles/rwkv7_model.safetensors`` holds what it computes by
the forms in plain torch that it has beside each kernel, as ``python -m tests.support.rwkv7_record`` writes it, and
``tests/interop/test_rwkv7.py`` compares.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

ACTIVATIONS: dict[str, Any] = {
    "sqrelu": lambda x: F.relu(x).square(),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
}


class RWKV7Config(PreTrainedConfig):
    """The settings that this file reads, with the defaults that they have there."""

    model_type = "rwkv7"

    vocab_size: int = 32000
    hidden_size: int = 2048
    hidden_ratio: float | None = 4.0
    intermediate_size: int | None = None
    num_hidden_layers: int = 24
    head_dim: int | None = 64
    num_heads: int | None = None
    decay_low_rank_dim: int = 64
    gate_low_rank_dim: int = 128
    a_low_rank_dim: int = 64
    v_low_rank_dim: int = 16
    hidden_act: str = "sqrelu"
    norm_first: bool = True
    norm_bias: bool = True
    norm_eps: float = 1e-5
    fuse_norm: bool = True
    attn: dict[str, Any] | None = None
    value_dim: Any = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **others: Any):
        if self.value_dim is None or isinstance(self.value_dim, int):
            self.value_dim = [self.value_dim or self.hidden_size] * self.num_hidden_layers
        super().__post_init__(**others)


class LoRA(nn.Module):
    def __init__(self, size: int, rank: int, between: nn.Module, bias: bool = True):
        super().__init__()
        self.lora = nn.Sequential(nn.Linear(size, rank, bias=False), between, nn.Linear(rank, size, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x)


def moved(x: Tensor, share: Tensor) -> Tensor:
    """x on the way to the token before it, zeros before the first."""
    return x + (F.pad(x, (0, 0, 1, 0))[:, :-1] - x) * share


class Attention(nn.Module):
    def __init__(self, config: RWKV7Config, first: bool):
        super().__init__()
        size = config.hidden_size
        assert config.attn is None
        assert config.value_dim == [size] * config.num_hidden_layers
        self.width = size // config.num_heads if config.head_dim is None else config.head_dim
        heads = size // self.width
        for kind in "rwkvag":
            setattr(self, f"x_{kind}", nn.Parameter(torch.zeros(1, 1, size)))
        self.k_k, self.k_a = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(size))
        self.r_k = nn.Parameter(torch.zeros(heads, self.width))
        for kind in "rkvo":
            setattr(self, f"{kind}_proj", nn.Linear(size, size, bias=False))
        self.w_lora = LoRA(size, config.decay_low_rank_dim, nn.Tanh())
        self.v_lora = None if first else LoRA(size, config.v_low_rank_dim, nn.Identity())
        self.a_lora = LoRA(size, config.a_low_rank_dim, nn.Identity())
        self.g_lora = LoRA(size, config.gate_low_rank_dim, nn.Sigmoid(), bias=False)
        self.fused = config.fuse_norm
        self.g_norm = nn.GroupNorm(heads, size, eps=self.width * config.norm_eps)

    def forward(self, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        r, w, k, v, a, g = (moved(x, getattr(self, f"x_{kind}")) for kind in "rwkvag")
        into = v
        r, k, v = self.r_proj(r), self.k_proj(k), self.v_proj(v)
        decay = torch.exp(-(torch.e**-0.5) * self.w_lora(w).sigmoid())
        if self.v_lora is not None and first is not None:
            v = v + (first - v) * self.v_lora(into).sigmoid()
        a, g = self.a_lora(a).sigmoid(), self.g_lora(g)
        removal = (k * self.k_k).unflatten(-1, (-1, self.width))
        squares = removal.square().sum(-1, keepdim=True)
        removal = removal / (squares + 1e-6).sqrt() if self.fused else F.normalize(removal, dim=-1)
        k = k * (1 + (a - 1) * self.k_a)
        r, k, values, a, decay = (m.unflatten(-1, (-1, self.width)) for m in (r, k, v, a, decay))
        state = x.new_zeros(len(x), r.shape[2], self.width, self.width)  # [B, H, K, V]
        rows = []
        for t in range(x.shape[1]):
            z = removal[:, t]
            held = torch.einsum("bhk,bhkv->bhv", z, state)
            state = decay[:, t].unsqueeze(-1) * state
            state = state - torch.einsum("bhk,bhv->bhkv", a[:, t] * z, held)
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], values[:, t])
            rows.append(torch.einsum("bhk,bhkv->bhv", r[:, t], state))
        o = self.g_norm(torch.stack(rows, dim=1).flatten(0, 1).flatten(1)).view_as(x)
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * values
        return self.o_proj((o + bonus.flatten(2)) * g), v if first is None else first


class FeedForward(nn.Module):
    def __init__(self, config: RWKV7Config):
        super().__init__()
        size, hidden = config.hidden_size, config.intermediate_size
        if hidden is None:
            hidden = -(-int(size * (4 if config.hidden_ratio is None else config.hidden_ratio)) // 32) * 32
        self.x_k = nn.Parameter(torch.zeros(size))
        self.key, self.value = nn.Linear(size, hidden, bias=False), nn.Linear(hidden, size, bias=False)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.value(self.act(self.key(moved(x, self.x_k))))


class Block(nn.Module):
    def __init__(self, config: RWKV7Config, number: int):
        super().__init__()
        first = number == 0
        self.pre_norm = _norm(config) if first and config.norm_first else nn.Identity()
        self.attn_norm, self.attn = _norm(config), Attention(config, first)
        self.ffn_norm, self.ffn = _norm(config), FeedForward(config)

    def forward(self, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.pre_norm(x)
        y, first = self.attn(self.attn_norm(x), first)
        x = x + y
        return x + self.ffn(self.ffn_norm(x)), first


class RWKV7PreTrainedModel(PreTrainedModel):
    config_class = RWKV7Config
    base_model_prefix = "model"

    def _init_weights(self, module: nn.Module) -> None:
        """Every test sets the weights itself."""


class RWKV7Model(RWKV7PreTrainedModel):
    def __init__(self, config: RWKV7Config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = _norm(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, tokens: Tensor) -> Tensor:
        x, first = self.embeddings(tokens), None
        for layer in self.layers:
            x, first = layer(x, first)
        return self.norm(x)


class RWKV7ForCausalLM(RWKV7PreTrainedModel):
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: RWKV7Config):
        super().__init__(config)
        self.model = RWKV7Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, tokens: Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.lm_head(self.model(tokens)))


def _norm(config: RWKV7Config) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


AutoConfig.register("rwkv7", RWKV7Config)
AutoModelForCausalLM.register(RWKV7Config, RWKV7ForCausalLM)
