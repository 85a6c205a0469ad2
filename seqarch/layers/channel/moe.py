"""Mixture of experts: a router sends each token through a few of many gated MLPs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqarch import ops
from seqarch.layers.channel.mlp import Mlp, MlpConfig, SwiGlu, SwiGluConfig, round_up
from seqarch.layers.channel.offloaded import OffloadedExperts
from seqarch.layers.channel.router import (
    Router,
    RouterConfig,
    Routing,
    load_balance_loss,
    router_z_loss,
    routing_metrics,
)
from seqarch.layers.mixer import ChannelMixer, first_tensor, linear_flops
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.quantized import QuantizedMatrices
from seqarch.ops.dispatch.checks import unknown_name
from seqarch.ops.experts import flops as experts_flops
from seqarch.ops.experts.activations import ACTIVATIONS
from seqarch.ops.experts.quantized import quantized_experts
from seqarch.ops.native import quantized_linear


@dataclass(frozen=True, kw_only=True)
class MixtureOfExpertsConfig(RouterConfig):
    """Options of :class:`MixtureOfExperts`: those of :class:`RouterConfig` and

    Attributes:
        hidden: the inner width of one expert; by default the experts that a token passes, shared ones included, are
            together as wide as a :class:`SwiGlu` of the same D (each rounded up to a multiple of 32), or without gates
            as an :class:`Mlp`.
        gated: whether experts are gated units, ``(act(x W_gate) * (x W_in)) W_out``, or plain ``act(x W_in) W_out``
            as in Nemotron 3.
        activation: ``"silu"``, ``"gelu"`` (exact), ``"gelu_tanh"``, ``"quick_gelu"``, ``"relu"`` or ``"squared_relu"``.
        limit: bounds gates from above and values on either side before the activation; ``None`` for no bound.
        value_offset: added to values before they are gated. With ``activation="quick_gelu"`` and a ``limit`` of 7, an
            offset of 1 is GPT-OSS's unit. Shared experts have both, too.
        bias: whether the maps of the routed experts have biases (GPT-OSS).
        latent: the width of a latent space that the routed experts work in: one map leads there, another back from
            the weighted sum (Nemotron 3). The router and shared experts see the input. ``None`` for none.
        shared_experts: experts that every token passes, besides (Dai et al. 2024, "DeepSeekMoE", section 3.2).
        shared_hidden: the inner width of one shared expert; by default ``hidden``.
        shared_gate: whether their output is multiplied by a learnt ``sigmoid(w x)``, as in Qwen2-MoE and Qwen3-Next.
        load_balance_weight, router_z_weight: what :meth:`MixtureOfExperts.auxiliary_loss` weighs its parts by.
    """

    may_be_zero = ("shared_experts", "load_balance_weight", "router_z_weight", "value_offset")

    size_options: ClassVar[dict[str, str]] = {"hidden": "hidden_width"}

    hidden: int | None = None
    gated: bool = True
    activation: str = "silu"
    limit: float | None = None
    value_offset: float = 0.0
    bias: bool = False
    latent: int | None = None
    shared_experts: int = 0
    shared_hidden: int | None = None
    shared_gate: bool = False
    load_balance_weight: float = 0.01
    router_z_weight: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", self.activation, ACTIVATIONS)
        if not self.gated and (self.limit is not None or self.value_offset):
            name = "value_offset" if self.limit is None else "limit"
            raise ValueError(f"{name}={getattr(self, name)} is an option of gated experts, got gated=False")
        if self.shared_gate and not self.shared_experts:
            raise ValueError("shared_gate=True gates the shared experts, got shared_experts=0: give at least 1")
        if self.shared_hidden is not None and not self.shared_experts:
            raise ValueError(f"shared_hidden ({self.shared_hidden}) is that of shared experts, got shared_experts=0")

    @property
    def hidden_width(self) -> int:
        if self.hidden is not None:
            return self.hidden
        expansion = (SwiGluConfig if self.gated else MlpConfig).expansion
        return round_up(expansion * self.d_model / (self.top_k + self.shared_experts))

    @property
    def expert_width(self) -> int:
        """The width that the routed experts take and give."""
        return self.latent or self.d_model

    @property
    def shared_width(self) -> int:
        """The inner width of all shared experts together."""
        return self.shared_experts * (self.shared_hidden or self.hidden_width)


class MixtureOfExperts(ChannelMixer):
    """``y = sum over the top k of p_i(x) SwiGLU_i(x)``, ``p = softmax(W x)`` or ``sigmoid(W x)``, every token kept.

    Shazeer et al. 2017, "Outrageously Large Neural Networks", without its noise, with the scores before the choice and
    the weights normalised after it, as in Mixtral (Jiang et al. 2024); options lead from there to DeepSeek-V3,
    Qwen3-Next, Kimi Linear, GPT-OSS and Nemotron 3. Each token is routed by itself, so the layer is causal, unlike
    expert choice; with a ``capacity_factor`` it is not by itself any more, see :class:`Router`. Each matrix has
    ``nn.Linear``'s initialisation for its own inputs.
    """

    Config = MixtureOfExpertsConfig
    takes_mask = True
    projections = ("w_gate", "w_in", "w_out")
    fan_in_dims: ClassVar[dict[str, int]] = {"w_gate": 1, "w_in": 1, "w_out": 1}
    unquantized = ("shared_gate",)
    no_weight_decay = ("b_in", "b_out", "b_gate")  # vectors, one for each expert

    @from_options
    def __init__(self, config: MixtureOfExpertsConfig):
        super().__init__(config)
        width, hidden, count = config.expert_width, config.hidden_width, config.num_experts
        self.router = Router(config)
        self.w_gate = _expert_weights(count, width, hidden) if config.gated else None
        self.w_in = _expert_weights(count, width, hidden)
        self.w_out = _expert_weights(count, hidden, width)
        self.b_gate = _expert_biases(count, width, hidden) if config.bias and config.gated else None
        self.b_in = _expert_biases(count, width, hidden) if config.bias else None
        self.b_out = _expert_biases(count, hidden, width) if config.bias else None
        maps = () if config.latent is None else ((config.d_model, width), (width, config.d_model))
        self.latent_in, self.latent_out = (Linear(*sizes, bias=False) for sizes in maps) if maps else (None, None)
        self.shared = None
        if config.shared_experts:
            dense = SwiGlu if config.gated else Mlp
            unit = {"limit": config.limit, "value_offset": config.value_offset} if config.gated else {}
            sizes = {"d_model": config.d_model, "hidden": config.shared_width}
            self.shared = dense(**sizes, activation=config.activation, **unit)
        self.shared_gate = Linear(config.d_model, 1, bias=False) if config.shared_gate else None
        self.offloaded: OffloadedExperts | None = None
        self._routing: Routing | None = None

    def offload(self, experts: OffloadedExperts) -> None:
        """Take the routed experts from there, in the place of this module's own matrices."""
        for name in self.projections:
            setattr(self, name, None)
        self.offloaded = experts

    @property
    def routing(self) -> Routing | None:
        """Of the last forward pass; ``None`` before the first."""
        return self._routing

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        routing, weight = self.router(x, token_mask)
        self._routing = routing if self.training and not _in_backward() else routing.detach()
        index = routing.index if routing.kept is None else routing.index.masked_fill(~routing.kept, -1)
        taken = x if self.latent_in is None else self.latent_in(x)
        y = self._routed(taken.reshape(-1, taken.shape[-1]), index, weight).view_as(taken)
        y = y if self.latent_out is None else self.latent_out(y)
        if self.shared is None:
            return y
        shared = self.shared(x)
        return y + (shared if self.shared_gate is None else self.shared_gate(x).sigmoid() * shared)

    def _routed(self, tokens: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        config, biases = self.config, {"b_in": self.b_in, "b_out": self.b_out, "b_gate": self.b_gate}
        unit = {"activation": config.activation, "limit": config.limit, "value_offset": config.value_offset}
        if self.offloaded is not None:
            choices = index.view(-1, config.top_k), weight.view(-1, config.top_k)
            return self.offloaded(tokens, *choices, **biases, **unit)
        maps = {"w_in": self.w_in, "w_out": self.w_out, "w_gate": self.w_gate}
        if isinstance(self.w_in, QuantizedMatrices) and quantized_linear.serves(tokens[:1], self.b_in):
            pairs = {name: [] if each is None else [each.codes, each.scales] for name, each in maps.items()}
            choices = index.view(-1, config.top_k), weight.view(-1, config.top_k).to(tokens.dtype)
            unit["limit"] = config.limit or 0.0
            return quantized_experts(tokens, *choices, **pairs, **biases, **unit)
        wide = {name: each.matrices() if isinstance(each, QuantizedMatrices) else each for name, each in maps.items()}
        return ops.experts(tokens, wide.pop("w_in"), wide.pop("w_out"), index, weight, **wide, **biases, **unit)

    def auxiliary_loss(self) -> Tensor:
        """The weighted load-balance and router z-losses of the last forward pass: a scalar, 0 unless in training.

        Raises:
            RuntimeError: that pass was one of training without gradients, as reentrant activation checkpointing makes
                it, so the losses would train nothing.
        """
        routing, config = self._routing, self.config
        weighed = config.load_balance_weight or config.router_z_weight
        if routing is None or not routing.training or not len(routing.index) or not weighed:
            return torch.zeros((), device=first_tensor(self).device)
        learns = any(parameter.requires_grad for parameter in self.router.parameters())
        if torch.is_grad_enabled() and learns and not routing.logits.requires_grad:
            raise RuntimeError(
                "auxiliary_loss: the last forward pass ran without gradients, so its losses would train nothing;"
                " checkpoint activations with use_reentrant=False, or give both losses the weight 0"
            )
        balance = config.load_balance_weight * load_balance_loss(routing)
        return balance + config.router_z_weight * router_z_loss(routing)

    def update_router(self) -> None:
        for router in self.modules():
            if isinstance(router, Router):
                router.update_bias()

    def router_metrics(self) -> dict[str, Any]:
        """The use of the experts in the last forward pass; empty before the first.

        As :func:`seqarch.layers.channel.router.routing_metrics`.
        """
        return {} if self._routing is None else routing_metrics(self._routing)

    def __getstate__(self) -> dict[str, Any]:
        # a copy or a pickle of the module does not take the last call's autograd graph along
        return {**self.__dict__, "_routing": None}

    def flops(self, length: int, batch_size: int = 1) -> int:
        """With a ``capacity_factor``, as if no choice were dropped."""
        config, tokens = self.config, length * batch_size
        routed = experts_flops(tokens, config.top_k, config.expert_width, config.hidden_width, config.gated)
        for latent in (self.latent_in, self.latent_out):
            routed += 0 if latent is None else linear_flops(latent, tokens)
        shared = 0 if self.shared is None else self.shared.flops(length, batch_size)
        gate = 0 if self.shared_gate is None else linear_flops(self.shared_gate, tokens)
        return 2 * config.d_model * config.num_experts * tokens + routed + shared + gate


def _in_backward() -> bool:
    """Whether this forward pass is one that activation checkpointing repeats during the backward pass.

    Nobody asks for its losses, and its graph, kept, would hold on to what checkpointing is to free.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _expert_weights(count: int, fan_in: int, fan_out: int) -> nn.Parameter:
    bound = fan_in**-0.5
    return nn.Parameter(torch.empty(count, fan_in, fan_out).uniform_(-bound, bound))


def _expert_biases(count: int, fan_in: int, fan_out: int) -> nn.Parameter:
    bound = fan_in**-0.5
    return nn.Parameter(torch.empty(count, fan_out).uniform_(-bound, bound))
