"""How far a NaN or an infinity in a token reaches: earlier tokens of its tile at most, never a row or sequence more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch import ops
from seqarch.ops import OPS
from tests.support.backends import available

LENGTH, BORDER, BLOCK = 80, 45, 16
TIMES = (37, 63)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape)


def heads(rows: int) -> dict[str, Tensor]:
    return {name: draw(rows, LENGTH, 2, 4) for name in ("q", "k", "v")}


def lists(rows: int) -> Tensor:
    """Each query's own block and the two before it, in packed sequences and alone."""
    time = torch.arange(LENGTH) if rows > 1 else torch.cat([torch.arange(BORDER), torch.arange(LENGTH - BORDER)])
    own = (time // BLOCK)[:, None, None] - torch.arange(3)
    return own.clamp(min=-1).expand(rows, LENGTH, 2, 3).contiguous()


def compressed(rows: int) -> dict[str, Tensor]:
    """A key and value for each block of 8 tokens, 4 apart, that two rows or two packed sequences complete."""
    count = (LENGTH - 8) // 4 + 1 if rows > 1 else (BORDER - 8) // 4 + (LENGTH - BORDER - 8) // 4 + 2
    return {"q": draw(rows, LENGTH, 2, 4), "k": draw(rows, count, 2, 4), "v": draw(rows, count, 2, 4)}


def recurrent(rows: int) -> dict[str, Tensor]:
    q, k, v = heads(rows).values()
    return {"q": q, "k": F.normalize(k, dim=-1), "v": v, "log_decay": -draw(rows, LENGTH, 2).abs()}


CASES: dict[str, tuple[str, Callable[[int], dict[str, Tensor]], Callable[[int], dict[str, Any]], dict[str, int]]] = {
    "attention": ("attention", heads, lambda _: {}, {"chunk_cpp": 64, "parallel_sdpa": LENGTH}),
    "window": (
        "attention",
        heads,
        lambda _: {"window": 20},
        {"chunk_cpp": 64, "chunk_sdpa": 32, "parallel_sdpa": LENGTH},
    ),
    "sticks": ("stick_breaking_attention", heads, lambda _: {}, {"chunk_cpp": 64, "chunk_torch": LENGTH}),
    "paths": (
        "path_attention",
        lambda rows: {
            **heads(rows),
            **{"w": F.normalize(draw(rows, LENGTH, 2, 4), dim=-1), "beta": 2 * torch.rand(rows, LENGTH, 2)},
        },
        lambda _: {},
        {"chunk_torch": LENGTH},
    ),
    "lists": (
        "block_sparse_attention",
        heads,
        lambda rows: {"block_index": lists(rows), "block_size": BLOCK},
        {"grouped_cpp": BLOCK, "grouped_torch": BLOCK, "parallel_torch": LENGTH},
    ),
    "compressed": (
        "compressed_attention",
        compressed,
        lambda _: {"compressed_length": 8, "compressed_stride": 4, "block_size": 8, "selected_blocks": 4},
        {},
    ),
    "index": (
        "index_topk",
        lambda rows: {"q": draw(rows, LENGTH, 2, 4), "k": draw(rows, LENGTH, 4), "weight": draw(rows, LENGTH, 2)},
        lambda _: {"top_k": 5},
        {},
    ),
    "convolution": (
        "causal_conv1d",
        lambda rows: {"x": draw(rows, LENGTH, 3), "weight": draw(3, 4)},
        lambda _: {},
        {},
    ),
    "linear": ("linear_attention", recurrent, lambda _: {}, {"chunk_cpp": 64, "chunk_torch": 32}),
    "delta": (
        "delta_rule",
        lambda rows: {**recurrent(rows), "beta": torch.rand(rows, LENGTH, 2)},
        lambda _: {},
        {"chunk_cpp": 64, "chunk_torch": 32},
    ),
    "levels": (
        "log_linear_attention",
        lambda rows: {
            **recurrent(rows),
            **{"beta": torch.rand(rows, LENGTH, 2), "level_weight": torch.rand(rows, LENGTH, 2, 8)},
        },
        lambda _: {},
        {"chunk_cpp": 64, "chunk_torch": 64},
    ),
    "rnn": (
        "gated_rnn",
        lambda rows: {"x": draw(rows, LENGTH, 2, 4, 3), "weight": draw(2, 4, 3, 3)},
        lambda _: {"cell": "slstm"},
        {},
    ),
    "scan": (
        "selective_scan",
        lambda rows: {
            **{"x": draw(rows, LENGTH, 4), "dt": torch.rand(rows, LENGTH, 4), "A": -draw(4, 3).abs()},
            **{"B": draw(rows, LENGTH, 3), "C": draw(rows, LENGTH, 3)},
        },
        lambda _: {},
        {},
    ),
}
"""An operation, its tensors and options for so many rows, and the tile of each backend within which numbers that are
not finite reach earlier tokens; of all others they reach none."""

ACROSS = {("window", "chunk_sdpa")}
"""Whose tiles hold tokens of more than one packed sequence."""


def outputs(op: str, backend: str, tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    found = getattr(ops, op)(**tensors, **options, backend=backend)
    return found if isinstance(found, Tensor) else found[0]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", CASES)
def test_what_is_not_finite_reaches_its_tile_at_most(case: str, number: float):
    op, make, more, tiles = CASES[case]
    for rows, packed in ((2, {}), (1, {"cu_seqlens": [0, BORDER, LENGTH]})):
        tensors, options = make(rows), {**more(rows), **packed}
        for backend in available(op):
            if OPS[op].backends[backend].unsupported(OPS[op].inputs(**tensors, **options)) is not None:
                continue
            clean, tile = outputs(op, backend, tensors, options), tiles.get(backend, 1)
            for name in (name for name, x in tensors.items() if x.shape[:2] == (rows, LENGTH)):
                for time in TIMES:
                    given = {**tensors, name: tensors[name].clone()}
                    given[name][0, time] = number
                    same = outputs(op, backend, given, options) == clean
                    what = f"{backend}: {name} of token {time}"
                    assert same[0, : max(0, time + 1 - tile)].all() or (case, backend) in ACROSS, what
                    assert same[1:].all(), f"{what} reaches another row"
                    if packed and (case, backend) not in ACROSS:
                        other = slice(BORDER, LENGTH) if time < BORDER else slice(0, BORDER)
                        assert same[0, other].all(), f"{what} reaches another sequence"


@pytest.mark.parametrize("case", ["attention", "window", "sticks", "lists", "linear", "delta", "levels"])
def test_what_is_not_finite_stays_in_its_head(case: str):
    op, make, more, _ = CASES[case]
    tensors, options = make(2), more(2)
    for backend in available(op):
        if OPS[op].backends[backend].unsupported(OPS[op].inputs(**tensors, **options)) is not None:
            continue
        clean = outputs(op, backend, tensors, options)
        for name in ("q", "k", "v"):
            given = {**tensors, name: tensors[name].clone()}
            given[name][0, 37, 0] = float("nan")
            assert (outputs(op, backend, given, options) == clean)[:, :, 1].all(), f"{backend}: {name}"


@pytest.mark.parametrize("backend", available("indexer_loss"))
def test_what_is_not_finite_stays_in_the_loss_of_its_sequence(backend: str):
    for rows, packed in ((2, {}), (1, {"cu_seqlens": [0, BORDER, LENGTH]})):
        sizes = {"index_q": (2, 4), "index_k": (4,), "weight": (2,), "q": (2, 4), "k": (2, 4)}
        tensors = {name: draw(rows, LENGTH, *shape) for name, shape in sizes.items()}
        clean = ops.indexer_loss(**tensors, **packed, backend=backend)
        for name in tensors:
            given = {**tensors, name: tensors[name].clone()}
            given[name][0, 37] = float("nan")
            same = ops.indexer_loss(**given, **packed, backend=backend) == clean
            assert same.tolist() == [False, True], f"{name}, {packed}"
