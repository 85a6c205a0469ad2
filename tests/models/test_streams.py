"""Several residual streams, beside plain formulas, the modules of transformers, and a single stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4HyperHead

from seqarch.models import Stack, StackConfig, parameter_groups
from seqarch.models.streams import ManifoldHyperConnection, WeightedStreams
from seqarch.testing import assert_close, reference_backends
from tests.support.stack_laws import checkpointing_changes_nothing, holds_the_laws

KINDS = [("hyper_connections", "sum"), ("manifold", "mean"), ("manifold", "weighted")]


def stack(pattern: str, depth: int, kind: str, output: str, **options: Any) -> Stack:
    torch.manual_seed(0)
    streams = {"residual_streams": 3, "stream_mixing": kind, "stream_output": output}
    made = Stack(StackConfig(**{"d_model": 32, "pattern": pattern, "depth": depth, **streams, **options})).double()
    for name, parameter in made.named_parameters():
        if "connection" in name or "weighted_streams" in name:
            nn.init.normal_(parameter, 0.3, 0.3)
    return made


def weights(connection: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a ``[n]``, A ``[n, n]`` and b ``[n]`` for the streams ``x [n, D]`` of one token, entry by entry."""
    n = len(x)
    if not isinstance(connection, ManifoldHyperConnection):
        a, A, b = torch.zeros(n).double(), torch.zeros(n, n).double(), torch.zeros(n).double()
        for i in range(n):
            normed = F.layer_norm(x[i], x[i].shape, connection.norm.weight, connection.norm.bias, 1e-5)
            moved = torch.tanh(connection.dynamic.weight @ normed)
            row = connection.mixing[i] + connection.scales[0] * moved[:-1]
            a[i], A[i], b[i] = row[0], row[1:], connection.writing[i] + connection.scales[1] * moved[-1]
        return a, A, b
    flat = x.flatten() / (x.flatten().square().mean() + 1e-5).sqrt()
    rows, bias = connection.dynamic.weight @ flat, connection.dynamic.bias
    a = torch.sigmoid(connection.scales[0] * rows[:n] + bias[:n]) + 1e-6
    b = 2 * torch.sigmoid(connection.scales[1] * rows[n : 2 * n] + bias[n : 2 * n])
    logits = (connection.scales[2] * rows[2 * n :] + bias[2 * n :]).view(n, n)
    A = torch.stack([row.exp() / row.exp().sum() for row in logits]) + 1e-6
    A = A / (A.sum(0) + 1e-6)
    for _ in range(19):
        A = A / (A.sum(1)[:, None] + 1e-6)
        A = A / (A.sum(0) + 1e-6)
    return a, A, b


def written_out(model: Stack, x: Tensor) -> Tensor:
    streams = torch.stack([x] * 3, dim=2)

    def branch(connection: Any, f: Any, norm: Any) -> Tensor:
        by_token = [[weights(connection, token) for token in row] for row in streams]
        a, A, b = (torch.stack([torch.stack([token[k] for token in row]) for row in by_token]) for k in range(3))
        y = f(norm((a[..., None] * streams).sum(2)))
        return torch.einsum("btij,btid->btjd", A, streams) + b[..., None] * y[:, :, None]

    for layer in model.layers:
        own: Any = layer
        streams = branch(own.connection, lambda u, own=own: own.mixers[0](u)[0], own.norm)
        streams = branch(own.channel_connection, own.channel, own.channel_norm)
    if model.config.stream_output != "weighted":
        return streams.sum(2) / (1 if model.config.stream_output == "sum" else 3)
    head: Any = model.weighted_streams
    flat = streams.flatten(2)
    flat = flat / (flat.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    share = torch.sigmoid(head.scale * (flat @ head.dynamic.weight.T) + head.dynamic.bias) + 1e-6
    return (share[..., None] * streams).sum(2)


@pytest.mark.parametrize(("kind", "output"), KINDS)
def test_streams_are_their_formulas(kind: str, output: str):
    model, x = stack("mamba2 attention", 2, kind, output, channel="mlp"), torch.randn(2, 4, 32, dtype=torch.float64)
    x.requires_grad_()
    y, expected = model(x)[0], written_out(model, x)
    assert_close(y, expected, 1e-10)
    inputs = [x, *model.parameters()]
    found, right = (torch.autograd.grad(each.sin().sum(), inputs) for each in (y, expected))
    for own, other in zip(found, right, strict=True):
        assert_close(own, other, 1e-8)


@pytest.mark.parametrize(("kind", "output"), KINDS)
@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("mamba2 attention/mlp", {}),
        ("sliding_window+gated_delta_net/moe", {"parallel": "two_norms", "norm_placement": "both"}),
        ("rwkv7(value_residual=give) rwkv7(value_residual=take)/none", {"norm_placement": "post"}),
    ],
)
def test_the_laws_hold(kind: str, output: str, pattern: str, options: dict[str, Any]):
    """Split anywhere, packed as separate, at some places, checkpointed; and FLOPs are those that torch counts."""
    depth = len(pattern.split(" "))
    model, x = stack(pattern, depth, kind, output, **options), torch.randn(1, 12, 32, dtype=torch.float64)
    with torch.no_grad(), reference_backends(), FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() == model.flops(12, 1)
    holds_the_laws(model)
    checkpointing_changes_nothing(model)


def test_hyper_connections_begin_as_one_stream():
    torch.manual_seed(0)
    options: dict[str, Any] = {"d_model": 32, "pattern": "mamba2 attention", "depth": 4}
    one, many = Stack(**options).double(), Stack(**options, residual_streams=4, stream_output="mean").double()
    assert all("connection" in name for name in many.load_state_dict(one.state_dict(), strict=False).missing_keys)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    assert_close(many(x)[0], one(x)[0], 1e-12)
    reads = [layer.connection.mixing[:, 0].argmax().item() for layer in many.layers]  # type: ignore[union-attr, index]
    assert reads == [0, 2, 0, 2]
    _, spared = parameter_groups(many, 0.1)
    assert sum(p is layer.connection.mixing for p in spared["params"] for layer in many.layers) == 4  # type: ignore[union-attr]


def test_manifold_connections_are_those_of_deepseek_v4():
    """In float32, in which theirs compute; the matrices' columns, which are divided last, sum to 1."""
    torch.manual_seed(0)
    config = DeepseekV4Config(hidden_size=32, hc_mult=4, rms_norm_eps=1e-5)
    theirs, ours = DeepseekV4HyperConnection(config), ManifoldHyperConnection(32, 4, 1e-5, 0)
    head, own_head = DeepseekV4HyperHead(config), WeightedStreams(32, 4, 1e-5)
    for parameter in (*theirs.parameters(), *head.parameters()):
        nn.init.normal_(parameter, 0.1, 0.5)
    with torch.no_grad():
        for own, other in zip(
            (ours.dynamic.weight, ours.dynamic.bias, ours.scales), (theirs.fn, theirs.base, theirs.scale), strict=True
        ):
            own.copy_(other)
        for own, other in zip(
            (own_head.dynamic.weight, own_head.dynamic.bias, own_head.scale),
            (head.hc_fn, head.hc_base, head.hc_scale),
            strict=True,
        ):
            own.copy_(other)
        x = torch.randn(2, 9, 4, 32)
        (post, comb, collapsed), (read, (mixed, writing)) = theirs(x), ours(x)
        assert_close(read, collapsed, 1e-6)
        assert_close(writing, post, 1e-6)
        assert_close(mixed, comb.transpose(-1, -2) @ x, 1e-6)
        assert_close(comb.sum(-2), torch.ones(2, 9, 4), 1e-5)
        assert_close(own_head(x), head(x), 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual_streams": 0}, "residual_streams must be at least 1, got 0"),
        ({"stream_mixing": "manifolds"}, "unknown stream_mixing 'manifolds'.*Did you mean 'manifold'"),
        ({"stream_output": "max"}, "unknown stream_output 'max': expected one of mean, sum, weighted"),
        (
            {"residual_factors": {"attention": 0.5}},
            "residual_factors are of one residual stream, got residual_streams=2",
        ),
        ({"norm_placement": "sum"}, "norm_placement has a norm of the residual stream itself in attention"),
    ],
)
def test_wrong_streams_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        StackConfig(**{"d_model": 32, "pattern": "attention", "depth": 1, "residual_streams": 2, **options})
