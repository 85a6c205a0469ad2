"""What a GPU is measured at: an operation at some head width, who does it, and what it costs.

Contestants are the backends but for the slow references, and what one would use instead. Whoever is not installed, or
refuses, is listed as absent. torch's attention over all keys stands beside the operations that take less: it computes
something else, and is what they must beat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.bench.contest import Contestant, Cost, Inputs, backend
from experiments.bench.gpu import peers
from seqarch.ops import OPS
from seqarch.ops.attention import flops as attention_flops
from seqarch.ops.block_sparse_attention import flops as pair_flops
from seqarch.ops.causal_conv1d import flops as conv_flops
from seqarch.ops.delta_rule import flops as delta_flops
from seqarch.ops.experts import flops as expert_flops
from seqarch.ops.linear_attention import flops as linear_flops
from seqarch.ops.selective_scan import flops as scan_flops

HEADS = 16
WINDOW, BLOCK, BLOCKS = 1024, 64, 16
STATES, TAPS = 16, 4
EXPERTS, CHOSEN = 16, 2
SLOW = ("recurrent_torch",)
"""Backends that go token by token, and are no contestants."""


@dataclass(frozen=True)
class Shape:
    """How much work: ``batch`` sequences of ``length`` tokens, 16 heads of ``width``."""

    batch: int
    length: int
    width: int
    dtype: torch.dtype
    device: torch.device

    def random(self, *sizes: int) -> Tensor:
        return torch.randn(self.batch, self.length, *sizes, device=self.device).to(self.dtype)

    def uniform(self, *sizes: int) -> Tensor:
        return torch.rand(self.batch, self.length, *sizes, device=self.device)

    @property
    def tokens(self) -> int:
        return self.batch * self.length


@dataclass(frozen=True)
class GpuContest:
    """One operation and who does it.

    Attributes:
        title: what is computed, beyond the shape.
        inputs: the arguments by keyword.
        flops: of the forward call, from the shape and the inputs.
        op: the operation.
        peers: who is not ours.
        output: the input of the output's shape.
    """

    title: str
    op: str
    inputs: Callable[[Shape], Inputs]
    flops: Callable[[Shape, Inputs], float]
    peers: Mapping[str, Contestant]
    output: str = "v"

    @property
    def contestants(self) -> dict[str, Contestant]:
        """Ours, and then the others."""
        ours = [name for name in OPS[self.op].backends if name not in SLOW and not name.endswith("_cpp")]
        return {**{name: backend(self.op, name) for name in ours}, **self.peers}

    def cost(self, shape: Shape, inputs: Inputs) -> Cost:
        tensors = [value for value in (*inputs.values(), inputs[self.output]) if torch.is_tensor(value)]
        return Cost(self.flops(shape, inputs), sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def _heads(shape: Shape) -> Inputs:
    q, k, v = (shape.random(HEADS, shape.width) for _ in range(3))
    return {"q": q, "k": F.normalize(k, dim=-1), "v": v}


def _decayed(shape: Shape, *width: int) -> Inputs:
    """Decays that keep a few hundred tokens."""
    return _heads(shape) | {"log_decay": -0.01 * shape.uniform(HEADS, *width)}


def _retention(shape: Shape) -> Inputs:
    decay = torch.log1p(-(2.0 ** (-5 - torch.arange(HEADS, device=shape.device, dtype=torch.float32))))
    return _heads(shape) | {"log_decay": decay}


def _delta(shape: Shape, *width: int) -> Inputs:
    return _decayed(shape, *width) | {"beta": shape.uniform(HEADS).to(shape.dtype)}


def _blocks(shape: Shape) -> Inputs:
    """Each query and head has its own block and others drawn from those before it, up to 16."""
    own = torch.arange(shape.length, device=shape.device)[:, None, None] // BLOCK
    drawn = (torch.rand(shape.batch, shape.length, HEADS, BLOCKS - 1, device=shape.device) * own).long()
    index = torch.cat([drawn, own.expand(shape.batch, -1, HEADS, 1)], dim=-1)
    return _heads(shape) | {"block_index": index, "block_size": BLOCK}


def _scan(shape: Shape) -> Inputs:
    D = HEADS * shape.width
    A = -torch.arange(1.0, STATES + 1, device=shape.device).repeat(D, 1)
    return {
        **{"x": shape.random(D), "dt": (0.001 + 0.1 * shape.uniform(D)).to(shape.dtype), "A": A},
        **{"B": shape.random(STATES), "C": shape.random(STATES)},
    }


def _conv(shape: Shape) -> Inputs:
    D = HEADS * shape.width
    weight, bias = (torch.randn(*sizes, device=shape.device).to(shape.dtype) for sizes in ((D, TAPS), (D,)))
    return {"x": shape.random(D), "weight": weight, "bias": bias, "activation": "silu"}


def _experts(shape: Shape) -> Inputs:
    D = HEADS * shape.width

    def weights(*sizes: int) -> Tensor:
        return torch.randn(EXPERTS, *sizes, device=shape.device).mul(sizes[0] ** -0.5).to(shape.dtype)

    index = shape.uniform(EXPERTS).topk(CHOSEN).indices
    matrices = {"w_in": weights(D, D), "w_gate": weights(D, D), "w_out": weights(D, D)}
    return {"x": shape.random(D), **matrices, "expert_index": index, "expert_weight": shape.uniform(CHOSEN)}


def _attention_flops(shape: Shape, inputs: Inputs) -> int:
    sizes = (shape.length, shape.length, HEADS, shape.width, shape.width)
    return attention_flops(*sizes, window=inputs.get("window"), batch_size=shape.batch)


def _block_flops(shape: Shape, inputs: Inputs) -> float:
    """A block drawn twice is seen once, and of its own block a query sees what comes up to it."""
    index = inputs["block_index"][:, :, :1].sort(-1).values
    different = 1 + (index.diff(dim=-1) != 0).sum().item() / index[..., 0].numel()
    pairs = shape.tokens * HEADS * ((different - 1) * BLOCK + (BLOCK + 1) / 2)
    return pair_flops(1, shape.width, shape.width) * pairs


def _of_heads(flops: Callable[..., int]) -> Callable[[Shape, Inputs], int]:
    return lambda shape, _: flops(shape.length, HEADS, shape.width, shape.width, shape.batch)


def _of_channels(flops: Callable[..., int], *sizes: int) -> Callable[[Shape, Inputs], int]:
    return lambda shape, _: flops(shape.length, HEADS * shape.width, *sizes, batch_size=shape.batch)


def _expert_flops(shape: Shape, _: Inputs) -> int:
    return expert_flops(shape.tokens, CHOSEN, HEADS * shape.width, HEADS * shape.width)


LINEAR, DELTA = _of_heads(linear_flops), _of_heads(delta_flops)
GPU_CONTESTS: dict[str, GpuContest] = {
    "attention": GpuContest("causal", "attention", _heads, _attention_flops, peers.SOFTMAX),
    "window_attention": GpuContest(
        *(f"causal, a window of {WINDOW}", "attention", lambda s: _heads(s) | {"window": WINDOW}, _attention_flops),
        peers.SOFTMAX,
    ),
    "block_sparse_attention": GpuContest(
        *(f"up to {BLOCKS} blocks of {BLOCK} a query and head", "block_sparse_attention", _blocks, _block_flops),
        peers.SOFTMAX,
    ),
    "retention": GpuContest("one decay a head", "linear_attention", _retention, LINEAR, peers.RETENTION),
    "linear_attention": GpuContest("one decay a head and step", "linear_attention", _decayed, LINEAR, peers.HEAD_DECAY),
    "linear_attention_per_key": GpuContest(
        *("one decay a key dimension and step", "linear_attention", lambda s: _decayed(s, s.width), LINEAR),
        peers.KEY_DECAY,
    ),
    "delta_rule": GpuContest("one decay a head and step", "delta_rule", _delta, DELTA, peers.DELTA_RULE),
    "delta_rule_per_key": GpuContest(
        *("one decay a key dimension and step", "delta_rule", lambda s: _delta(s, s.width), DELTA),
        peers.DELTA_RULE_PER_KEY,
    ),
    "selective_scan": GpuContest(
        *(f"16 x width channels, N = {STATES}", "selective_scan", _scan, _of_channels(scan_flops, STATES)),
        *(peers.SCAN, "x"),
    ),
    "causal_conv1d": GpuContest(
        *(f"16 x width channels, W = {TAPS}, SiLU", "causal_conv1d", _conv, _of_channels(conv_flops, TAPS)),
        *(peers.CONV, "x"),
    ),
    "experts": GpuContest(
        f"D = F = 16 x width, {CHOSEN} of {EXPERTS} experts, gated", "experts", _experts, _expert_flops, {}, "x"
    ),
}


def decoding(contest: GpuContest, shape: Shape) -> Inputs:
    """The inputs of one token for each row, after ``shape.length`` tokens: a state, or the keys and values so far."""
    one = _one_token(shape)
    if contest.op in ("linear_attention", "delta_rule"):
        state = torch.randn(shape.batch, HEADS, shape.width, shape.width, device=shape.device)
        return contest.inputs(one) | {"state": state}
    past: dict[str, Any] = contest.inputs(shape)
    last = {name: past[name][:, -1:].clone() for name in ("q", "block_index") if name in past}
    return past | last


def token_cost(contest: GpuContest, shape: Shape, inputs: Inputs) -> Cost:
    """Of one token for each row: its state, read and written, or the keys and values that its query sees."""
    if "state" in inputs:
        cost, state = contest.cost(_one_token(shape), inputs), inputs["state"]
        return Cost(cost.flops, cost.bytes + state.numel() * state.element_size())
    heads = shape.batch * HEADS
    if "block_index" in inputs:
        pairs = _listed_pairs(inputs["block_index"], shape.length)
    else:
        pairs = heads * min(inputs.get("window", shape.length), shape.length)
    numbers = 2 * (pairs + heads) * shape.width  # keys and values, q and o
    return Cost(pair_flops(pairs, shape.width, shape.width), numbers * inputs["q"].element_size())


def _listed_pairs(index: Tensor, length: int) -> int:
    """How many keys the last query's heads see together: a block drawn twice once, its own up to itself."""
    before = index.sort(-1).values.diff(dim=-1).ne(0).sum().item()  # its own is the last block
    return int(before) * BLOCK + index[..., 0].numel() * (length - (length - 1) // BLOCK * BLOCK)


def _one_token(shape: Shape) -> Shape:
    return Shape(shape.batch, 1, shape.width, shape.dtype, shape.device)


DECODED = ("attention", "window_attention", "block_sparse_attention", "linear_attention", "delta_rule")
"""The contests that are run for one token too."""
