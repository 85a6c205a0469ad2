"""This library's own operations for one token, or a few steps of one, and softmax attention of one query."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import seqarch.ops  # noqa: F401  (defines the operators)
from seqarch.decoding.lowering import Lowering, lowers, number
from seqarch.ops.native.view import Unserved, View

aten, own = torch.ops.aten, torch.ops.seqarch

BATCH, TOKENS, HEADS = (0,), (0, 1), (0, 1, 2)
"""Dimensions whose strides an instruction reads."""


def _state(low: Lowering, node: Any, by: fx.Node) -> tuple[View, View]:
    """What an instruction replaces in place, and where the state is after it.

    That is the state itself, or a copy of what is used later, is computed, or has gaps. One of bfloat16 is put back.
    """
    view = low.view(node)
    in_place = view.buffer.kind == "state" and view.is_dense(view.rank) and not low.is_used_after(node, by)
    if in_place and view.dtype != torch.bfloat16:
        return view, view
    held = low.tape.copy(low.stored(node)[0])
    return held, view if in_place else held


def _keep(low: Lowering, held: View, state: View) -> None:
    """An instruction has replaced ``held``: the state is that."""
    if held is not state:
        low.tape.copy(held, state)


def _check_single(node: fx.Node, view: View, offsets: Any) -> None:
    if offsets is not None or view.sizes[1] != 1:
        raise Unserved(f"{node.target} takes several steps, or packed sequences")


def _dense(low: Lowering, dims: int, *views: View | None) -> list[Any]:
    return [None if view is None else low.tape.dense(view, dims) for view in views]


@lowers(own.causal_conv1d.default)
def _convolution(low: Lowering, node: fx.Node) -> None:
    x, weight, bias, state, silu, offsets = node.args
    if state is None:
        raise Unserved("a convolution has no state")
    x, weight, bias = low.reads(x, weight, bias)
    _check_single(node, x, offsets)
    held, kept = _state(low, state, node)
    (x, bias), (weight,) = _dense(low, 1, x, bias), _dense(low, 2, weight)
    y = low.tape.value(x.sizes)
    operands = [(y, BATCH), (x, BATCH), (weight, ()), None if bias is None else (bias, ()), (held, BATCH)]
    low.tape.write("convolution", operands, [x.sizes[0], x.sizes[2], weight.sizes[1]], int(silu))  # type: ignore[call-overload]
    _keep(low, held, kept)
    low.values[node] = [y, kept]


@lowers(own.selective_scan.default)
def _scan(low: Lowering, node: fx.Node) -> None:
    *tensors, softplus, scale_input, state, offsets, keep = node.args
    x, dt, A, B, C, D, z, dt_bias = low.reads(*tensors)
    _check_single(node, x, offsets)
    if keep or B.sizes[2] != 1:
        raise Unserved("a scan has groups, or keeps what its gradient needs")
    held, kept = _state(low, state, node)
    (x, dt, B, C, z, D, dt_bias), (A,) = _dense(low, 1, x, dt, B, C, z, D, dt_bias), _dense(low, 2, A)
    y = low.tape.value(x.sizes)
    by_row = {id(each) for each in (x, dt, B, C, z)}
    operands = [
        None if each is None else (each, BATCH if id(each) in by_row else ())
        for each in (x, dt, A, B, C, D, z, dt_bias)
    ]
    flags = int(softplus) + 2 * int(scale_input)  # type: ignore[call-overload]
    low.tape.write("scan", [(y, BATCH), *operands, (held, BATCH)], held.sizes, flags)
    _keep(low, held, kept)
    low.values[node] = [y, kept, None]


@lowers(own.linear_attention.default)
def _linear_attention(low: Lowering, node: fx.Node) -> None:
    q, k, v, decay, scale, state, offsets = node.args
    _recurrence(low, node, "linear_attention", [q, k, v, decay], (), (scale, state, offsets))


@lowers(own.delta_rule.default)
def _delta_rule(low: Lowering, node: fx.Node) -> None:
    q, k, v, beta, decay, read, erase, *rest = node.args
    _recurrence(low, node, "delta_rule", [q, k, v, decay], (beta, read, erase), rest)


def _recurrence(low: Lowering, node: fx.Node, kind: str, tensors: Any, others: Any, rest: Any) -> None:
    scale, state, offsets = rest
    q, k, v, decay, *others = low.reads(*tensors, *others)
    if offsets is not None:
        raise Unserved(f"{node.target} takes packed sequences")
    held, kept = _state(low, state, node)
    q, k, v = _dense(low, 1, q, k, v)
    batch, steps, heads, width = v.sizes
    varies = 0
    if decay is not None:
        varies = 2 if decay.rank == 4 else 1
        decay = low.tape.dense(decay, 1) if varies == 2 else decay.expanded((batch, steps, heads))
    others = [each if i == 0 else low.tape.dense(each, 1) if each else None for i, each in enumerate(others)]
    o = low.tape.value(v.sizes)
    operands = [None if each is None else (each, HEADS) for each in (o, q, k, v, decay)] + [(held, TOKENS)]
    operands += [None if each is None else (each, HEADS) for each in others]
    sizes = [batch, steps, heads, q.sizes[3], width, q.sizes[2]]
    low.tape.write(kind, operands, sizes, varies, number(scale))
    _keep(low, held, kept)
    low.values[node] = [o, kept]


@lowers(aten._scaled_dot_product_flash_attention_for_cpu.default)
def _attend(low: Lowering, node: fx.Node) -> None:
    if node.args[3:] not in ((), (0.0,), (0.0, False)) or node.kwargs.get("attn_mask") is not None:
        raise Unserved("attention has dropout or a mask")
    (q,), (k, v) = low.reads(node.args[0]), low.stored(*node.args[1:3])
    k, v = (k, v) if k.dtype == v.dtype else low.reads(*node.args[1:3])
    batch, heads, queries, width = q.sizes
    if k.strides[3] != 1 or v.strides[3] != 1:
        raise Unserved("attention has keys or values with gaps")
    if queries != 1 and heads != k.sizes[1]:
        raise Unserved("attention has several queries")
    # several queries of one token are heads that share their keys
    flat = low.tape.dense(q, 1).reshaped((batch, heads * queries, width))
    flat = low.tape.copy(q).reshaped((batch, heads * queries, width)) if flat is None else flat
    o = low.tape.value((batch, heads, queries, v.sizes[3]))
    read = o.reshaped((batch, heads * queries, v.sizes[3]))
    assert flat is not None
    assert read is not None
    factor = width**-0.5 if (scale := node.kwargs.get("scale")) is None else number(scale)
    parts = max(1, MOST_PARTS // batch)
    room = low.tape.value((parts, *read.sizes[:2], v.sizes[3] + 2 + KEYS_AT_A_TIME))
    sizes = [batch, heads * queries, k.sizes[2], width, v.sizes[3], k.sizes[1]]
    low.tape.write(
        "attend", [(room, HEADS), (flat, TOKENS), (k, HEADS), (v, HEADS)], sizes, parts, factor, stored=(2, 3)
    )
    low.tape.write("attend_join", [(read, TOKENS), (room, HEADS)], [*sizes[:3], v.sizes[3]], parts)
    low.values[node] = [o, None]


MOST_PARTS = 32
"""Of the keys of all sequences together, which threads read side by side."""

KEYS_AT_A_TIME = 32
"""``SEQARCH_ATTEND_KEYS`` of the header."""
