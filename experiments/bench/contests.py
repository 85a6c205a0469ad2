"""The contests by name: one or more for each operation, and those of whole models."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.bench import models, peers
from experiments.bench.contest import Contest, Inputs, of_operation
from seqarch.ops.attention import flops as attention_flops
from seqarch.ops.block_sparse_attention import flops as pair_flops
from seqarch.ops.causal_conv1d import flops as conv_flops
from seqarch.ops.delta_rule import flops as delta_flops
from seqarch.ops.experts import flops as expert_flops
from seqarch.ops.linear_attention import flops as linear_flops
from seqarch.ops.selective_scan import flops as scan_flops

HEADS, WIDTH = 8, 64
CHANNELS, STATES, TAPS = 1024, 16, 4
WINDOW = 256
BLOCK, BLOCKS = 64, 16
EXPERTS, CHOSEN, MODEL, HIDDEN = 8, 2, 512, 1024


def _heads(length: int, dtype: torch.dtype) -> Inputs:
    shape = 1, length, HEADS, WIDTH
    q, k = (F.normalize(torch.randn(shape), dim=-1).to(dtype) for _ in range(2))
    return {"q": q, "k": k, "v": torch.randn(shape).to(dtype)}


def _head_decay(length: int, dtype: torch.dtype) -> Inputs:
    return _heads(length, dtype) | {"log_decay": -torch.rand(1, length, HEADS)}


def _key_decay(length: int, dtype: torch.dtype) -> Inputs:
    return _heads(length, dtype) | {"log_decay": -torch.rand(1, length, HEADS, WIDTH)}


def _with_rates(inputs: Callable[[int, torch.dtype], Inputs]) -> Callable[[int, torch.dtype], Inputs]:
    return lambda length, dtype: inputs(length, dtype) | {"beta": torch.rand(1, length, HEADS)}


def _window(length: int, dtype: torch.dtype) -> Inputs:
    return _heads(length, dtype) | {"window": WINDOW}


def _blocks(length: int, dtype: torch.dtype) -> Inputs:
    """Each query and head has its own block and others drawn from those before it, as many as there are up to 16."""
    own = torch.arange(length) // BLOCK
    drawn = torch.rand(length, HEADS, int(own[-1]) + 1)
    drawn.masked_fill_(torch.arange(drawn.shape[-1]) > own[:, None, None], -1)
    drawn.scatter_(-1, own[:, None, None].expand(-1, HEADS, 1), 2)
    score, index = drawn.topk(min(BLOCKS, drawn.shape[-1]))
    index = index.masked_fill(score < 0, -1).unsqueeze(0)
    return _heads(length, dtype) | {"block_index": index, "block_size": BLOCK}


def _scan(length: int, dtype: torch.dtype) -> Inputs:
    x, B, C = (torch.randn(1, length, width).to(dtype) for width in (CHANNELS, STATES, STATES))
    A = -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1)
    return {"x": x, "dt": (0.001 + 0.1 * torch.rand(1, length, CHANNELS)).to(dtype), "A": A, "B": B, "C": C}


def _conv(length: int, dtype: torch.dtype) -> Inputs:
    weight, bias = torch.randn(CHANNELS, TAPS).to(dtype), torch.randn(CHANNELS).to(dtype)
    return {"x": torch.randn(1, length, CHANNELS).to(dtype), "weight": weight, "bias": bias, "activation": "silu"}


def _experts(length: int, dtype: torch.dtype) -> Inputs:
    def weights(*shape: int) -> Tensor:
        return torch.randn(EXPERTS, *shape).mul(shape[0] ** -0.5).to(dtype)

    index = torch.rand(1, length, EXPERTS).topk(CHOSEN).indices
    return {
        "x": torch.randn(1, length, MODEL).to(dtype),
        **{"w_in": weights(MODEL, HIDDEN), "w_gate": weights(MODEL, HIDDEN), "w_out": weights(HIDDEN, MODEL)},
        **{"expert_index": index, "expert_weight": torch.rand(index.shape).to(dtype)},
    }


def _of_length(flops: Callable[..., int], *sizes: int, **options: int) -> Callable[[Inputs], int]:
    """An operation's own count, of the inputs' length and these sizes."""
    return lambda inputs: flops(next(iter(inputs.values())).shape[1], *sizes, **options)


def _attention_flops(inputs: Inputs) -> int:
    length = inputs["v"].shape[1]
    return attention_flops(length, length, HEADS, WIDTH, WIDTH, window=inputs.get("window"))


def _block_flops(inputs: Inputs) -> int:
    """A query sees its listed blocks whole, but of its own block no more than what comes up to it."""
    listed = (inputs["block_index"] >= 0).sum().item() * BLOCK
    unseen = sum(BLOCK - 1 - time % BLOCK for time in range(inputs["v"].shape[1])) * HEADS
    return pair_flops(listed - unseen, WIDTH, WIDTH)


MATRICES = f"B = 1, H = {HEADS}, K = V = {WIDTH}"
PER_HEAD, PER_KEY = f"{MATRICES}, one decay a head and step", f"{MATRICES}, one decay a key dimension and step"
LINEAR = _of_length(linear_flops, HEADS, WIDTH, WIDTH)
DELTA = _of_length(delta_flops, HEADS, WIDTH, WIDTH)
SOFTMAX = {"SDPA": peers.SDPA, "FlexAttention": peers.FLEX}

CONTESTS: dict[str, Contest] = {
    "linear_attention": of_operation(
        "linear_attention", PER_HEAD, _head_decay, LINEAR, {"minimal SSD": peers.MINIMAL_SSD, "SDPA": peers.SDPA}, "v"
    ),
    "linear_attention_per_key": of_operation(
        "linear_attention", PER_KEY, _key_decay, LINEAR, {"SDPA": peers.SDPA}, "v"
    ),
    "delta_rule": of_operation(
        *("delta_rule", PER_HEAD, _with_rates(_head_decay), DELTA),
        {"transformers": peers.TRANSFORMERS_DELTA_RULE, "SDPA": peers.SDPA},
        "v",
    ),
    "delta_rule_per_key": of_operation(
        "delta_rule", PER_KEY, _with_rates(_key_decay), DELTA, {"SDPA": peers.SDPA}, "v"
    ),
    "selective_scan": of_operation(
        *("selective_scan", f"B = 1, D = {CHANNELS}, N = {STATES}", _scan, _of_length(scan_flops, CHANNELS, STATES)),
        {"mambapy": peers.MAMBAPY, "step loop": peers.STEP_LOOP},
        "x",
    ),
    "attention": of_operation("attention", f"{MATRICES}, causal", _heads, _attention_flops, SOFTMAX, "v"),
    "window_attention": of_operation(
        "attention", f"{MATRICES}, causal, window of {WINDOW}", _window, _attention_flops, SOFTMAX, "v"
    ),
    "block_sparse_attention": of_operation(
        *("block_sparse_attention", f"{MATRICES}, {BLOCKS} blocks of {BLOCK} a query and head", _blocks, _block_flops),
        {"SDPA": peers.SDPA},
        "v",
    ),
    "causal_conv1d": of_operation(
        *("causal_conv1d", f"B = 1, D = {CHANNELS}, W = {TAPS}, SiLU", _conv, _of_length(conv_flops, CHANNELS, TAPS)),
        {"torch conv1d": peers.CONV1D},
        "x",
    ),
    "experts": of_operation(
        *("experts", f"D = {MODEL}, F = {HIDDEN}, {CHOSEN} of {EXPERTS} experts, gated", _experts),
        *(_of_length(expert_flops, CHOSEN, MODEL, HIDDEN), {"dense MLP": peers.DENSE_MLP}, "x"),
    ),
    **models.CONTESTS,
}
