"""The inputs of the operations' benchmarks, drawn at random, and the floating-point operations of a call with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.bench.benchmark import Cost, Inputs, Workload
from experiments.bench.sizes import BLOCK, BLOCKS, CHOSEN, INDEX_HEADS, INDEX_WIDTH, LEVELS, STATES, TAPS, TOP_K, Sizes
from seqarch import ops
from seqarch.ops.attention import flops as flops_of_attention
from seqarch.ops.block_sparse_attention import flops as flops_of_pairs
from seqarch.ops.compressed_attention import Blocks
from seqarch.ops.compressed_attention import flops as flops_of_compressed
from seqarch.ops.experts import flops as flops_of_experts
from seqarch.ops.gated_rnn import flops as flops_of_rnn
from seqarch.ops.index_topk import flops as flops_of_index
from seqarch.ops.indexer_loss import flops as flops_of_indexer_loss
from seqarch.ops.log_linear_attention import flops as flops_of_levels
from seqarch.ops.path_attention import flops as flops_of_paths
from seqarch.ops.stick_breaking_attention import flops as flops_of_sticks

NSA = {"compressed_length": 32, "compressed_stride": 16, "block_size": BLOCK, "selected_blocks": BLOCKS}
COMPRESSED = Blocks(*NSA.values(), initial=1, local=2)
"""The blocks of NSA's paper."""

Draw = Callable[[Sizes], Inputs]
Flops = Callable[[Sizes, Inputs], float]


def heads(sizes: Sizes) -> Inputs:
    """Queries and keys of norm 1, and values: ``[B, T, H, W]``."""
    q, k = (F.normalize(sizes.normal(sizes.heads, sizes.width), dim=-1).to(sizes.dtype) for _ in range(2))
    return {"q": q, "k": k, "v": sizes.normal(sizes.heads, sizes.width).to(sizes.dtype)}


def path(sizes: Sizes) -> Inputs:
    """Factors of unit norm, and beta from 0 to 2."""
    w = F.normalize(sizes.normal(sizes.heads, sizes.width), dim=-1).to(sizes.dtype)
    return heads(sizes) | {"w": w, "beta": 2 * sizes.uniform(sizes.heads).to(sizes.dtype)}


def retention(sizes: Sizes) -> Inputs:
    decay = torch.log1p(-(2.0 ** (-5 - torch.arange(sizes.heads, device=sizes.device, dtype=torch.float32))))
    return heads(sizes) | {"log_decay": decay}


def head_decay(sizes: Sizes) -> Inputs:
    return heads(sizes) | {"log_decay": -sizes.setup.decay * sizes.uniform(sizes.heads)}


def key_decay(sizes: Sizes) -> Inputs:
    return heads(sizes) | {"log_decay": -sizes.setup.decay * sizes.uniform(sizes.heads, sizes.width)}


def levels(sizes: Sizes) -> Inputs:
    return head_decay(sizes) | {"level_weight": sizes.uniform(sizes.heads, LEVELS)}


def with_beta(inputs: Draw) -> Draw:
    return lambda sizes: inputs(sizes) | {"beta": sizes.uniform(sizes.heads).to(sizes.dtype)}


def window(sizes: Sizes) -> Inputs:
    return heads(sizes) | {"window": sizes.setup.window}


def blocks(sizes: Sizes) -> Inputs:
    """Each query and head has its own block and others drawn from those before it, as many as there are up to 16."""
    draw = _repeated_blocks if sizes.setup.repeated_blocks else _different_blocks
    own = torch.arange(sizes.length, device=sizes.device)[:, None, None] // BLOCK
    index = draw(sizes, own)
    return heads(sizes) | {"block_index": index, "block_size": BLOCK}


def _different_blocks(sizes: Sizes, own: Tensor) -> Tensor:
    drawn = sizes.uniform(sizes.heads, int(own[-1]) + 1)
    drawn.masked_fill_(torch.arange(drawn.shape[-1], device=sizes.device) > own, -1)
    drawn.scatter_(-1, own.expand(sizes.batch, -1, sizes.heads, 1), 2)
    score, index = drawn.topk(min(BLOCKS, drawn.shape[-1]))
    return index.masked_fill(score < 0, -1)


def _repeated_blocks(sizes: Sizes, own: Tensor) -> Tensor:
    drawn = (sizes.uniform(sizes.heads, BLOCKS - 1) * own).long()
    return torch.cat([drawn, own.expand(sizes.batch, -1, sizes.heads, 1)], dim=-1)


def compressed(sizes: Sizes) -> Inputs:
    """As many keys and values as there are compressed blocks."""
    given = heads(sizes)
    count = COMPRESSED.complete(sizes.length)
    return given | {name: given[name][:, :count].contiguous() for name in "kv"} | NSA


def indexer(sizes: Sizes) -> Inputs:
    shapes = {"q": (INDEX_HEADS, INDEX_WIDTH), "k": (INDEX_WIDTH,), "weight": (INDEX_HEADS,)}
    tensors = {name: sizes.normal(*shape).to(sizes.dtype) for name, shape in shapes.items()}
    return tensors | {"top_k": min(TOP_K, sizes.length)}


def indexer_loss(sizes: Sizes) -> Inputs:
    """With the tokens that the indexer chooses."""
    index, attention = indexer(sizes), heads(sizes)
    chosen = ops.index_topk(**index)
    given = {"index_q": index["q"], "index_k": index["k"], "weight": index["weight"]}
    return given | {"q": attention["q"], "k": attention["k"], "token_index": chosen}


def scan(sizes: Sizes) -> Inputs:
    x, B, C = (sizes.normal(width).to(sizes.dtype) for width in (sizes.channels, STATES, STATES))
    A = -torch.arange(1.0, STATES + 1, device=sizes.device).repeat(sizes.channels, 1)
    return {"x": x, "dt": (0.001 + 0.1 * sizes.uniform(sizes.channels)).to(sizes.dtype), "A": A, "B": B, "C": C}


def recurrent_gates(sizes: Sizes) -> Inputs:
    """What four gates get of the input, and their matrices."""
    width = sizes.width
    weight = torch.randn(sizes.heads, 4, width, width, device=sizes.device) * width**-0.5
    x = sizes.normal(sizes.heads, 4, width).to(sizes.dtype)
    return {"x": x, "weight": weight.to(sizes.dtype), "cell": "slstm"}


def convolution(sizes: Sizes) -> Inputs:
    weight, bias = (
        torch.randn(*shape, device=sizes.device).to(sizes.dtype)
        for shape in ((sizes.channels, TAPS), (sizes.channels,))
    )
    return {"x": sizes.normal(sizes.channels).to(sizes.dtype), "weight": weight, "bias": bias, "activation": "silu"}


def experts(sizes: Sizes) -> Inputs:
    model, hidden = sizes.d_model, sizes.channels

    def weights(*shape: int) -> Tensor:
        drawn = torch.randn(sizes.setup.experts, *shape, device=sizes.device)
        return drawn.mul(shape[0] ** -0.5).to(sizes.dtype)

    index = sizes.uniform(sizes.setup.experts).topk(CHOSEN).indices
    return {
        "x": sizes.normal(model).to(sizes.dtype),
        **{"w_in": weights(model, hidden), "w_gate": weights(model, hidden), "w_out": weights(hidden, model)},
        **{"expert_index": index, "expert_weight": sizes.uniform(CHOSEN).to(sizes.dtype)},
    }


def head_flops(flops: Callable[..., int]) -> Flops:
    """An operation's own count, of heads whose keys and values are equally wide."""
    return lambda sizes, _: flops(sizes.length, sizes.heads, sizes.width, sizes.width, batch_size=sizes.batch)


def log_linear_flops(sizes: Sizes, _: Inputs) -> int:
    return flops_of_levels(sizes.length, sizes.heads, LEVELS, sizes.width, sizes.width, batch_size=sizes.batch)


def channel_flops(flops: Callable[..., int], width: int) -> Flops:
    """An operation's own count, of channels with ``width`` states or taps each."""
    return lambda sizes, _: flops(sizes.length, sizes.channels, width, batch_size=sizes.batch)


def recurrent_flops(sizes: Sizes, _: Inputs) -> int:
    return flops_of_rnn(sizes.length, sizes.heads, 4, sizes.width, batch_size=sizes.batch)


def expert_flops(sizes: Sizes, _: Inputs) -> int:
    return flops_of_experts(sizes.tokens, CHOSEN, sizes.d_model, sizes.channels)


def attention_flops(sizes: Sizes, inputs: Inputs) -> int:
    shape = (sizes.length, sizes.length, sizes.heads, sizes.width, sizes.width)
    return flops_of_attention(*shape, window=inputs.get("window"), batch_size=sizes.batch)


def compressed_flops(sizes: Sizes, _: Inputs) -> int:
    width = sizes.width
    return sizes.batch * flops_of_compressed(sizes.length, 0, sizes.heads, width, width, COMPRESSED)


def path_flops(sizes: Sizes, _: Inputs) -> int:
    shape = (sizes.length, sizes.length, sizes.heads, sizes.heads, sizes.width, sizes.width)
    return flops_of_paths(*shape, batch_size=sizes.batch)


def stick_breaking_flops(sizes: Sizes, _: Inputs) -> int:
    shape = (sizes.length, sizes.length, sizes.heads, sizes.width, sizes.width)
    return flops_of_sticks(*shape, batch_size=sizes.batch)


def index_flops(sizes: Sizes, _: Inputs) -> int:
    return sizes.batch * flops_of_index(sizes.length, sizes.length, INDEX_HEADS, INDEX_WIDTH)


def indexer_loss_flops(sizes: Sizes, inputs: Inputs) -> int:
    pairs = int((inputs["token_index"] >= 0).sum())
    return flops_of_indexer_loss(pairs, INDEX_HEADS, INDEX_WIDTH, sizes.heads, sizes.width)


def block_flops(sizes: Sizes, inputs: Inputs) -> int:
    return flops_of_pairs(_listed_pairs(sizes, inputs["block_index"]), sizes.width, sizes.width)


def _listed_pairs(sizes: Sizes, index: Tensor) -> int:
    """The keys that the last queries see together: each listed block once, but no more of the own than comes up to it.

    Args:
        index: ``[B, N, H, n]`` blocks of the last ``N`` queries, -1 for none.
    """
    ordered = index.sort(-1).values
    seen = (ordered >= 0) & (ordered.diff(dim=-1, prepend=torch.full_like(ordered[..., :1], -1)) != 0)
    times = torch.arange(sizes.length - index.shape[1], sizes.length)
    later = int((BLOCK - 1 - times % BLOCK).sum()) * sizes.batch * sizes.heads
    return int(seen.sum()) * BLOCK - later


def token_after_state(draw: Draw, flops: Flops) -> Workload:
    """One token per sequence, after many whose state is given; the state is read and written."""

    def inputs(sizes: Sizes) -> Inputs:
        state = torch.randn(sizes.batch, sizes.heads, sizes.width, sizes.width, device=sizes.device)
        return draw(replace(sizes, length=1)) | {"state": state}

    def cost(sizes: Sizes, inputs: Inputs) -> Cost:
        tensors = [value for value in (*inputs.values(), inputs["v"], inputs["state"]) if torch.is_tensor(value)]
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return Cost(flops(replace(sizes, length=1), inputs), moved)

    return Workload(inputs, cost)


def token_after_keys(draw: Draw) -> Workload:
    """One token per sequence, whose query sees its own keys and values and those before it."""

    def inputs(sizes: Sizes) -> Inputs:
        past: dict[str, Any] = draw(sizes)
        return past | {name: past[name][:, -1:].clone() for name in ("q", "block_index") if name in past}

    def cost(sizes: Sizes, inputs: Inputs) -> Cost:
        queries = sizes.batch * sizes.heads
        pairs = queries * min(inputs.get("window", sizes.length), sizes.length)
        if "block_index" in inputs:
            pairs = _listed_pairs(sizes, inputs["block_index"])
        numbers = 2 * (pairs + queries) * sizes.width  # keys and values, q and o
        return Cost(flops_of_pairs(pairs, sizes.width, sizes.width), numbers * inputs["q"].element_size())

    return Workload(inputs, cost)
