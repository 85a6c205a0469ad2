"""The router of a mixture of experts: where each token goes, with which weights, and how the experts are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch.layers.mixer import LayerConfig
from seqarch.ops.dispatch.autocast import without_autocast
from seqarch.ops.dispatch.checks import BackendError, accumulation_dtype, unknown_name
from seqarch.ops.dispatch.eager import active_transform

GROUP_SCORES = ("top2", "max")

_NONZERO = 1e-20
"""Added to sums of sigmoid scores, which may all have underflowed; too little to change any other sum."""


@dataclass(frozen=True, kw_only=True)
class RouterConfig(LayerConfig):
    """Options of :class:`Router`.

    Attributes:
        num_experts: E, the routed experts.
        top_k: routed experts per token.
        router: what makes scores of logits: ``"softmax"`` over the experts (Mixtral, Qwen), or a ``"sigmoid"`` of each
            (DeepSeek-V3, Kimi). With ``normalise_weights`` a softmax over all is one over the chosen (GPT-OSS).
        router_bias: a learnt bias of each logit (GPT-OSS).
        num_groups: n, as many groups of E / n neighbouring experts; 1 leaves all in one (Liu et al. 2024,
            "DeepSeek-V2", section 2.2.2).
        top_groups: how many groups a token's experts may be of, those of the highest scores; by default all.
        group_score: a group's score: ``"top2"``, the sum of its two highest (DeepSeek-V3), or ``"max"``, the highest
            (DeepSeek-V2). Both count ``expert_bias``.
        normalise_weights: whether the chosen experts' weights are made to sum to 1. Not with ``top_k=1``, where that
            would leave the router without a gradient.
        weight_scale: what the weights are multiplied by after that (DeepSeek's and Kimi's routed scaling factor).
        expert_bias: whether experts are chosen by score plus a bias per expert, which follows their loads and takes no
            gradient; the weights come of the scores alone (Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing
            Strategy for Mixture-of-Experts"). The paper's own balancing has ``load_balance_weight=0`` beside it.
        bias_rate: the length of each of the bias's steps (gamma).
        recentre_bias: whether the mean is taken off each step, so that the bias stays centred (not in the paper).
        capacity_factor: ``None`` keeps every choice. A number c lets each expert serve at most ``ceil(c N k / E)`` of
            the N tokens of a call, at least one, and drops choices beyond, those of the latest positions. Causal still,
            but what is dropped depends on the call's length and other rows, so splitting a sequence changes outputs.
    """

    num_experts: int = 8
    top_k: int = 2
    router: str = "softmax"
    router_bias: bool = False
    num_groups: int = 1
    top_groups: int | None = None
    group_score: str = "top2"
    normalise_weights: bool = True
    weight_scale: float = 1.0
    expert_bias: bool = False
    bias_rate: float = 1e-3
    recentre_bias: bool = False
    capacity_factor: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k must be 1 to num_experts ({self.num_experts}), got {self.top_k}")
        if self.router not in ("softmax", "sigmoid"):
            raise unknown_name("router", self.router, ("softmax", "sigmoid"))
        if self.normalise_weights and self.top_k == 1:
            raise ValueError(
                "top_k=1 with normalise_weights=True weighs every expert 1, so its router cannot learn: give False"
            )
        self._check_groups()

    def _check_groups(self) -> None:
        count, size = self.num_groups, self.num_experts // self.num_groups
        if self.num_experts % count:
            raise ValueError(f"num_groups ({count}) must divide num_experts ({self.num_experts})")
        if self.group_score not in GROUP_SCORES:
            raise unknown_name("group_score", self.group_score, GROUP_SCORES)
        if self.chosen_groups > count:
            raise ValueError(f"top_groups must be 1 to num_groups ({count}), got {self.top_groups}")
        if self.top_k > self.chosen_groups * size:
            raise ValueError(
                f"top_k must be at most the {self.chosen_groups * size} experts of {self.chosen_groups} groups"
                f" (top_groups), got {self.top_k}"
            )
        if self.chosen_groups < count and self.group_score == "top2" and size < 2:
            raise ValueError(f"group_score='top2' needs groups of at least 2 experts, got {size} in each of {count}")

    @property
    def chosen_groups(self) -> int:
        return self.num_groups if self.top_groups is None else self.top_groups


class Routing(NamedTuple):
    """Where a forward pass sent its N tokens.

    Attributes:
        logits, probabilities: ``[N, E]``; of a sigmoid router the probabilities are the scores over their sum.
        index: ``[N, k]``, the chosen experts, before any is dropped.
        kept: ``[N, k]``, which choices found room; ``None`` where all do.
        training: whether the module was training.
        counted: ``[N]``, which tokens are no padding; ``None`` where none is. Padding counts nowhere.
    """

    logits: Tensor
    probabilities: Tensor
    index: Tensor
    kept: Tensor | None
    training: bool
    counted: Tensor | None = None

    def load(self) -> Tensor:
        """``[E]``, the share of the choices that each expert got, dropped ones included."""
        counts = count_choices(self.index, self.logits.shape[1], self.counted)
        return counts.to(self.logits.dtype) / counts.sum().clamp(min=1)

    def mean(self, each: Tensor) -> Tensor:
        """The mean of ``[N, ...]`` over the tokens."""
        if self.counted is None:
            return each.mean(dim=0)
        counted = self.counted.view(-1, *[1] * (each.ndim - 1))
        return torch.where(counted, each, 0).sum(dim=0) / self.counted.sum().clamp(min=1)

    def detach(self) -> Routing:
        return self._replace(logits=self.logits.detach(), probabilities=self.probabilities.detach())


def count_choices(index: Tensor, experts: int, counted: Tensor | None = None) -> Tensor:
    """``[E]`` int64, of the tokens ``counted [N]``; unlike ``bincount``, without waiting for a GPU."""
    counts = torch.zeros(experts, dtype=torch.int64, device=index.device)
    ones = torch.ones_like(index) if counted is None else counted.to(index.dtype)[:, None].expand_as(index)
    return counts.scatter_add(0, index.flatten(), ones.flatten())


class _CountInBackward(torch.autograd.Function):
    """The identity on the weights, whose backward adds the choices to ``load``.

    Each token of a step goes backward once, whatever runs its forward pass a second time.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor, counted: Tensor | None, load: Tensor) -> Tensor:
        ctx.save_for_backward(index, counted)
        ctx.load = load  # not saved: it changes in place between the forward and the backward of micro-batches
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        index, counted = ctx.saved_tensors
        ctx.load.add_(count_choices(index, len(ctx.load), counted))
        return grads[0], None, None, None


class Router(nn.Module):
    """``scores = softmax(W x)`` or ``sigmoid(W x)``; the top k of ``scores + bias``, weighed by their scores alone.

    With ``num_groups`` above ``top_groups`` they are the top k of the experts in a token's best groups. Computed in
    float32 whatever the autocast, since rounding logits to bfloat16 changes which experts are chosen.
    ``nn.Linear``'s initialisation, ``expert_bias`` 0.

    **The bias** is a buffer of the ``state_dict``, float32 in a model of less. ``load``, a buffer which is not, counts
    the choices of training since the last :meth:`update_bias`, in the backward pass: once each under activation
    checkpointing, summed over micro-batches, and not at all in evaluation or without gradients. Across data-parallel
    processes, sum ``load`` before the update. Layers that share their experts (``share`` in a pattern) have one router,
    and so one bias and one ``load`` of all their choices, by which the first of them to be updated moves the bias.

    **Padding** counts nowhere: not in loads, losses and metrics, and it takes no expert's room.

    **Capacity** drops choices that find their expert full: earlier positions come first, at one position earlier rows,
    in one token higher scores. A dropped choice adds nothing and the token's other weights stay as they are. Later
    tokens never displace earlier ones, so changing a token still changes nothing before it. But how much room there
    is depends on the length and batch of the call, and who finds it on the other rows (in a packed batch, on the
    sequences before): with drops, outputs depend on the company, and splitting a sequence into calls changes them. So
    evaluation and generation, where the same rule holds, may drop other tokens than training.
    """

    fan_in_dims: ClassVar[dict[str, int]] = {"weight": 1}

    bias: Tensor | None
    expert_bias: Tensor | None
    load: Tensor

    def __init__(self, config: RouterConfig):
        super().__init__()
        self.config = config
        bound = config.d_model**-0.5
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.d_model).uniform_(-bound, bound))
        bias = torch.empty(config.num_experts).uniform_(-bound, bound) if config.router_bias else None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.register_buffer("expert_bias", torch.zeros(config.num_experts) if config.expert_bias else None)
        self.register_buffer("load", torch.zeros(config.num_experts, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> tuple[Routing, Tensor]:
        """Where ``x [B, T, D]`` goes, and the weights ``[N, k]`` with N = B T.

        Args:
            token_mask: bool ``[B, T]``, false where a token is padding.
        """
        config, counted = self.config, None if token_mask is None else token_mask.flatten()
        logits = self._logits(x.reshape(-1, x.shape[-1]))
        if config.router == "softmax":
            scores = probabilities = logits.softmax(dim=-1)
        else:
            scores = logits.sigmoid()
            probabilities = scores / (scores.sum(dim=-1, keepdim=True) + _NONZERO)
        chosen_by = scores if self.expert_bias is None else scores + self.expert_bias
        if config.chosen_groups < config.num_groups:
            chosen_by = self._in_best_groups(chosen_by)
        index = chosen_by.topk(config.top_k, dim=-1).indices
        weight = scores.gather(-1, index)
        if config.normalise_weights:
            weight = weight / (weight.sum(dim=-1, keepdim=True) + _NONZERO)
        weight = weight * config.weight_scale
        if self.training and self.expert_bias is not None:
            if (reason := active_transform()) is not None:
                raise BackendError(f"Router: expert_bias counts loads in backward passes: {reason}; expected eval()")
            weight = _CountInBackward.apply(weight, index, counted, self.load)
        kept = None
        if config.capacity_factor is not None:
            kept = self._find_room(index.view(*x.shape[:-1], config.top_k), token_mask)
        return Routing(logits, probabilities, index, kept, self.training, counted), weight

    def _logits(self, tokens: Tensor) -> Tensor:
        wide = accumulation_dtype(tokens, self.weight)
        with without_autocast(tokens.device):
            return F.linear(tokens.to(wide), self.weight.to(wide), None if self.bias is None else self.bias.to(wide))

    def _in_best_groups(self, scores: Tensor) -> Tensor:
        """The scores ``[N, E]`` with those outside of each token's best groups at minus infinity."""
        config = self.config
        groups = scores.unflatten(-1, (config.num_groups, -1))
        of_group = groups.topk(2 if config.group_score == "top2" else 1, dim=-1).values.sum(dim=-1)
        best = of_group.topk(config.chosen_groups, dim=-1).indices
        outside = torch.ones_like(of_group, dtype=torch.bool).scatter(-1, best, False)
        return groups.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(-2)

    def _find_room(self, index: Tensor, token_mask: Tensor | None) -> Tensor:
        """Which of the choices ``[B, T, k]`` have room, ``[N, k]``: first come, first served, along time."""
        config = self.config
        assert config.capacity_factor is not None
        choices = torch.full((), index.numel(), dtype=torch.float64, device=index.device)
        if token_mask is not None:  # padding queues apart
            index = index.masked_fill(~token_mask.unsqueeze(-1), config.num_experts)
            choices = token_mask.sum().double() * config.top_k
        by_time = index.transpose(0, -2)
        # 1e-6 less: 1.1 * 100 / 10 is above 11 in floating point
        share = config.capacity_factor * choices / config.num_experts - 1e-6
        capacity = torch.minimum(share, choices).ceil().clamp(min=1)
        experts, order = by_time.flatten().sort(stable=True)
        place = torch.arange(len(order), device=order.device) - torch.searchsorted(experts, experts)
        room = (place < capacity) & (experts < config.num_experts)
        kept = torch.empty_like(order, dtype=torch.bool).scatter(0, order, room)
        return kept.view(by_time.shape).transpose(0, -2).reshape(-1, index.shape[-1])

    @torch.no_grad()
    def update_bias(self) -> None:
        """Raise the bias of experts with less than the mean load, lower that of those with more, and count anew."""
        if self.expert_bias is None:
            return
        # in integers, so that a load of just the mean moves nothing
        step = torch.sign(self.load.sum() - len(self.load) * self.load).to(self.expert_bias.dtype)
        if self.config.recentre_bias:
            step -= step.mean()
        self.expert_bias += self.config.bias_rate * step
        self.load.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        # a bias in bfloat16 would soon be too coarse for its steps
        before, load = self.expert_bias, self.load
        super()._apply(fn, recurse)
        after = self.expert_bias
        if before is not None and after is not None and torch.finfo(after.dtype).bits < 32:
            self.expert_bias = before.to(after.device, torch.promote_types(before.dtype, torch.float32))
        # no state dict fills the counts after to_empty
        self.load = torch.zeros_like(self.load) if load.is_meta else load.to(self.load.device)
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if self.load.is_meta:  # the numbers of others are assigned, these are in no state dict
            self.load = torch.zeros_like(self.load, device=self.weight.device)
        if self.expert_bias is not None and torch.finfo(self.expert_bias.dtype).bits < 32:  # assigned as it was stored
            self.expert_bias = self.expert_bias.float()


def load_balance_loss(routing: Routing) -> Tensor:
    """``E sum_i f_i P_i``: 1 when balanced, E when one expert gets all. Of one layer: pooled over layers, it would hide
    one that collapsed.

    f_i is expert i's share of the choices, count_i / (N k), and P_i its mean probability (Fedus et al. 2021, "Switch
    Transformers", eq. 4-6, and as in MegaBlocks for k > 1). Mixtral's release divides by N alone: k when balanced.
    """
    return routing.logits.shape[1] * (routing.load() * routing.mean(routing.probabilities)).sum()


def router_z_loss(routing: Routing) -> Tensor:
    """``mean_t logsumexp(logits_t)^2`` (Zoph et al. 2022, "ST-MoE", eq. 5): keeps the router's logits small."""
    return routing.mean(routing.logits.logsumexp(dim=-1).square())


def routing_metrics(routing: Routing) -> dict[str, Any]:
    """The use of the experts; empty of no tokens (padding is none).

    Returns:
        ``largest_load``: the busiest expert's load over the mean load (1 when balanced, at most E / k);
        ``dead_experts``: experts without a token; ``load_variation``: standard deviation of the loads over their
        mean; ``router_entropy``: mean entropy of the router's probabilities, in nats; ``mean_abs_logit``;
        ``dropped_share``: the share of the choices that found no room; ``load``: each expert's share of the choices,
        a list of E. Loads count dropped choices.
    """
    if not len(routing.index) or (routing.counted is not None and not routing.counted.any()):
        return {}
    load = routing.load()
    entropy = routing.mean(torch.special.entr(routing.probabilities.detach()).sum(dim=-1))
    return {
        "largest_load": (load.max() * len(load)).item(),
        "dead_experts": int((load == 0).sum()),
        "load_variation": (load.std(correction=0) * len(load)).item(),
        "router_entropy": entropy.item(),
        "mean_abs_logit": routing.mean(routing.logits.detach().abs().mean(dim=-1)).item(),
        "dropped_share": 0.0 if routing.kept is None else 1 - routing.mean(routing.kept.double().mean(dim=-1)).item(),
        "load": load.tolist(),
    }
