"""Mixture of experts: a router sends each token through a few of many gated MLPs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.channel import SwiGlu, SwiGluConfig, round_up
from seqarch.layers.mixer import ChannelMixer, LayerConfig, linear_flops
from seqarch.ops.common.checks import accumulation_dtype
from seqarch.ops.experts import flops as experts_flops


@dataclass(frozen=True, kw_only=True)
class MixtureOfExpertsConfig(LayerConfig):
    """Options of :class:`MixtureOfExperts`.

    Attributes:
        num_experts: E, the routed experts.
        top_k: routed experts a token.
        hidden: the inner width of one expert; by default the experts that a token passes, shared ones included, are
            together as wide as a :class:`SwiGlu` of the same D (each rounded up to a multiple of 32).
        shared_experts: experts that every token passes, besides (Dai et al. 2024, "DeepSeekMoE", section 3.2).
        normalise_weights: whether the chosen experts' weights are made to sum to 1. Not with ``top_k=1``, where that
            would leave the router without a gradient.
        load_balance_weight, router_z_weight: what :meth:`MixtureOfExperts.auxiliary_loss` weighs its parts by.
    """

    may_be_zero = ("shared_experts", "load_balance_weight", "router_z_weight")

    num_experts: int = 8
    top_k: int = 2
    hidden: int | None = None
    shared_experts: int = 0
    normalise_weights: bool = True
    load_balance_weight: float = 0.01
    router_z_weight: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k must be 1 to num_experts ({self.num_experts}), got {self.top_k}")
        if self.normalise_weights and self.top_k == 1:
            raise ValueError(
                "top_k=1 with normalise_weights=True weighs every expert 1, so its router cannot learn: give False"
            )

    @property
    def hidden_width(self) -> int:
        if self.hidden is not None:
            return self.hidden
        return round_up(8 / 3 * self.d_model / (self.top_k + self.shared_experts))


class Routing(NamedTuple):
    """Where a forward pass sent its N tokens.

    Attributes:
        logits, probabilities: ``[N, E]``.
        index: ``[N, k]``, the chosen experts.
        training: whether the module was training.
    """

    logits: Tensor
    probabilities: Tensor
    index: Tensor
    training: bool

    def load(self) -> Tensor:
        """``[E]``, the share of the N k choices that each expert got."""
        counts = self.index.flatten().bincount(minlength=self.logits.shape[1])
        return counts.to(self.logits.dtype) / max(1, self.index.numel())


def load_balance_loss(routing: Routing) -> Tensor:
    """``E sum_i f_i P_i``: 1 when balanced, E when one expert gets all.

    f_i is expert i's share of the choices, count_i / (N k), and P_i its mean probability (Fedus et al. 2021, "Switch
    Transformers", eq. 4-6, and as in MegaBlocks for k > 1). Mixtral's release divides by N alone: k when balanced.
    """
    return routing.logits.shape[1] * (routing.load() * routing.probabilities.mean(dim=0)).sum()


def router_z_loss(routing: Routing) -> Tensor:
    """``mean_t logsumexp(logits_t)^2`` (Zoph et al. 2022, "ST-MoE", eq. 5): keeps the router's logits small."""
    return routing.logits.logsumexp(dim=-1).square().mean()


class MixtureOfExperts(ChannelMixer):
    """``y = sum over the top k of p_i(x) SwiGLU_i(x)``, ``p = softmax(W x)``, every token kept.

    Shazeer et al. 2017, "Outrageously Large Neural Networks", without its noise, with the softmax before the choice and
    the weights normalised after it, as in Mixtral (Jiang et al. 2024). Each token is routed by itself, so the layer is
    causal, unlike expert choice. The router runs in float32 whatever the autocast. Each matrix has ``nn.Linear``'s
    initialisation for its own inputs.
    """

    Config = MixtureOfExpertsConfig

    def __init__(self, config: MixtureOfExpertsConfig):
        super().__init__()
        self.config = config
        width, hidden, count = config.d_model, config.hidden_width, config.num_experts
        self.router = nn.Linear(width, count, bias=False)
        self.w_gate = _expert_weights(count, width, hidden)
        self.w_in = _expert_weights(count, width, hidden)
        self.w_out = _expert_weights(count, hidden, width)
        shared = SwiGluConfig(d_model=width, hidden=hidden * config.shared_experts) if config.shared_experts else None
        self.shared = None if shared is None else SwiGlu(shared)
        self._routing: Routing | None = None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        logits = self._route(tokens)
        probabilities = logits.softmax(dim=-1)
        weight, index = probabilities.topk(self.config.top_k, dim=-1)
        if self.config.normalise_weights:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        kept = (logits, probabilities) if self.training else (logits.detach(), probabilities.detach())
        self._routing = Routing(*kept, index, self.training)
        y = ops.experts(tokens, self.w_in, self.w_out, index, weight, w_gate=self.w_gate)
        if self.shared is not None:
            y = y + self.shared(tokens)
        return y.view_as(x)

    def _route(self, tokens: Tensor) -> Tensor:
        """Logits ``[N, E]``: in float32 because rounding them to bfloat16 changes which experts are chosen."""
        wide = accumulation_dtype(tokens, self.router.weight)
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens.to(wide), self.router.weight.to(wide))

    def auxiliary_loss(self) -> Tensor:
        """The weighted load-balance and router z-losses of the last forward pass: a scalar, 0 unless in training."""
        routing = self._routing
        if routing is None or not routing.training or not len(routing.index):
            return torch.zeros((), device=self.router.weight.device)
        balance = self.config.load_balance_weight * load_balance_loss(routing)
        return balance + self.config.router_z_weight * router_z_loss(routing)

    def router_metrics(self) -> dict[str, Any]:
        """How the last forward pass used the experts; empty before the first.

        Returns:
            ``largest_load``: the busiest expert's load over the mean load (1 when balanced, at most E / k);
            ``dead_experts``: experts without a token; ``load_variation``: standard deviation of the loads over their
            mean; ``router_entropy``: mean entropy of the router's probabilities, in nats; ``mean_abs_logit``;
            ``load``: each expert's share of the choices, a list of E.
        """
        routing = self._routing
        if routing is None or not len(routing.index):
            return {}
        load = routing.load()
        entropy = torch.special.entr(routing.probabilities.detach()).sum(dim=-1).mean()
        return {
            "largest_load": (load.max() * len(load)).item(),
            "dead_experts": int((load == 0).sum()),
            "load_variation": (load.std(correction=0) * len(load)).item(),
            "router_entropy": entropy.item(),
            "mean_abs_logit": routing.logits.detach().abs().mean().item(),
            "load": load.tolist(),
        }

    def __getstate__(self) -> dict[str, Any]:
        # a copy or a pickle of the module does not take the last call's autograd graph along
        return {**self.__dict__, "_routing": None}

    def flops(self, length: int, batch_size: int = 1) -> int:
        config, tokens = self.config, length * batch_size
        shared = 0 if self.shared is None else self.shared.flops(length, batch_size)
        routed = experts_flops(tokens, config.top_k, config.d_model, config.hidden_width)
        return linear_flops(self.router, tokens) + routed + shared


def _expert_weights(count: int, fan_in: int, fan_out: int) -> nn.Parameter:
    bound = fan_in**-0.5
    return nn.Parameter(torch.empty(count, fan_in, fan_out).uniform_(-bound, bound))
