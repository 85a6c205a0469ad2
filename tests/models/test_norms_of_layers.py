"""Norms of the residual stream: their kinds, and where a layer has them, beside layers that are written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch.layers.modules.norms import NORMS, build_norm
from seqarch.models import LanguageModel, LMConfig, Stack, StackConfig
from seqarch.models.config import PLACEMENTS
from seqarch.testing import assert_close
from tests.support.one_token import COMPILED
from tests.support.stack_laws import holds_the_laws

Function = Callable[[Tensor], Tensor]


def stack(pattern: str, depth: int, **options: Any) -> Stack:
    torch.manual_seed(0)
    return shaken(Stack(StackConfig(d_model=32, pattern=pattern, depth=depth, **options)).double())


def shaken(model: Any) -> Any:
    """With norms whose weights and biases are not those at first, which would hide where they are."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.2)
    return model


def norms_of(*modules: nn.Module | None) -> list[Function]:
    """RMS norms in plain torch, of the modules that are some."""
    weights = [module.weight for module in modules if module is not None and hasattr(module, "weight")]
    return [lambda x, w=w: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w for w in weights]  # type: ignore[misc]


def branch(place: str, x: Tensor, f: Function, norms: Sequence[Function], residual: float, factor: float) -> Tensor:
    """A branch f written out, with as many norms as its place has."""
    if place == "none":
        assert not norms
        return residual * x + factor * f(x)
    first, *more = norms
    assert len(more) == (place == "both")
    match place:
        case "pre":
            return residual * x + factor * f(first(x))
        case "post":
            return residual * x + factor * first(f(x))
        case "both":
            return residual * x + factor * more[0](f(first(x)))
        case "residual":
            return residual * first(x) + factor * f(first(x))
    return first(residual * x + factor * f(x))


def written_out(model: Stack, places: Sequence[tuple[str, str]], x: Tensor) -> Tensor:
    """Layers of a mixer at the first place and a channel mixer at the second, with the factors of :data:`FACTORS`."""
    for layer, (place, channel_place) in zip(model.layers, places, strict=True):
        own: Any = layer
        (after,) = own.post_norms or [None]
        residual = 0.7 if type(own.mixers[0]).__name__ == "Attention" else 1.0
        x = branch(place, x, lambda x, own=own: own.mixers[0](x)[0], norms_of(own.norm, after), residual, 1.0)
        x = branch(channel_place, x, own.channel, norms_of(own.channel_norm, own.channel_post_norm), 1.3, 0.4)
    return x


FACTORS: dict[str, Any] = {
    "residual_factors": {"attention": 0.7, "mlp": 1.3},
    "output_factors": {"mlp": 0.4},
    "channel": "mlp",
}


@pytest.mark.parametrize("place", PLACEMENTS)
def test_each_placement_is_its_formula(place: str):
    model, x = stack("mamba2 attention", 2, norm_placement=place, **FACTORS), torch.randn(2, 9, 32).double()
    x.requires_grad_()
    y, _ = model(x)
    expected = written_out(model, [(place, place)] * 2, x)
    assert_close(y, expected, 1e-12)
    inputs = [x, *model.parameters()]
    for found, right in zip(
        torch.autograd.grad(y.sin().sum(), inputs), torch.autograd.grad(expected.sin().sum(), inputs), strict=True
    ):
        assert_close(found, right, 1e-10)
    holds_the_laws(model, 1e-12)


def test_a_mixers_layers_may_have_their_norms_elsewhere():
    """As OLMo Hybrid's: attention's layers after the branches, the delta rule's before them."""
    olmo = stack("gated_delta_net attention", 2, norm_placements={"attention": "post"}, **FACTORS)
    x = torch.randn(2, 9, 32).double()
    assert_close(olmo(x)[0], written_out(olmo, [("pre", "pre"), ("post", "post")], x), 1e-12)
    mixed = stack(
        "mamba2 attention", 2, norm_placement="both", norm_placements={"mlp": "sum", "mamba2": "pre"}, **FACTORS
    )
    assert_close(mixed(x)[0], written_out(mixed, [("pre", "sum"), ("both", "sum")], x), 1e-12)
    assert olmo.float().explain_one_token() == [COMPILED] * 2


def test_mixers_side_by_side_have_a_norm_each_of_what_they_add():
    model, x = stack("attention+mamba2/none", 1, norm_placement="both"), torch.randn(2, 9, 32).double()
    layer: Any = model.layers[0]
    before, *after = norms_of(layer.norm, *layer.post_norms)
    branches = [norm(mixer(before(x))[0]) for norm, mixer in zip(after, layer.mixers, strict=True)]
    assert_close(model(x)[0], x + sum(branches) / 2, 1e-12)
    holds_the_laws(model, 1e-12)


@pytest.mark.parametrize(
    ("parallel", "place"),
    [
        *((each, place) for each in ("one_norm", "two_norms") for place in ("pre", "both", "post")),
        *(("one_norm", place) for place in ("residual", "sum")),
    ],
)
def test_a_parallel_block_reads_and_writes_one_residual_stream(parallel: str, place: str):
    """Mixers and channel mixer beside each other: GPT-J's block with one norm, GPT-NeoX's with two."""
    constants: dict[str, Any] = {
        "residual_factors": {"attention": 0.7, "mamba2": 0.7, "mlp": 0.7},
        "output_factors": {"mlp": 0.4, "mamba2": 2.0},
        "input_factors": {"mlp": 3.0},
        "channel": "mlp",
    }
    options = {"parallel": parallel, "norm_placement": place, **constants}
    model, x = stack("mamba2+attention attention", 2, **options), torch.randn(2, 9, 32).double()
    assert [layer.parallel for layer in model.layers] == [parallel] * 2
    expected = x
    for layer in model.layers:
        own: Any = layer
        norms = norms_of(own.norm)
        second = norms_of(own.channel_norm) or norms
        assert (norms == second) == (parallel == "one_norm" or place == "post")
        after, (channel_after, *_) = norms_of(*(own.post_norms or ())), [*norms_of(own.channel_post_norm), lambda y: y]
        reads = place in ("pre", "both", "residual")
        read, channel_read = (n[0](expected) if reads else expected for n in (norms, second))
        factors = [2.0, 1.0] if len(own.mixers) == 2 else [1.0]
        added = channel_after(own.channel(3 * channel_read)) * 0.4
        for i, mixer in enumerate(own.mixers):
            y = mixer(read)[0]
            added = added + factors[i] / len(factors) * (after[i](y) if after else y)
        expected = 0.7 * (read if place == "residual" else expected) + added
        expected = norms[0](expected) if place == "sum" else expected
    assert_close(model(x)[0], expected, 1e-12)
    holds_the_laws(model, 1e-12)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("zero_centred", [False, True])
def test_each_kind_is_torchs(kind: str, zero_centred: bool):
    norm = build_norm(kind, 32, 1e-3, zero_centred).double()
    parameters = dict(norm.named_parameters())
    has = {"rms": ["weight"], "layer": ["weight", "bias"], "layer_without_bias": ["weight"]}
    assert [*parameters] == has.get(kind, [])
    x = 3 + torch.randn(2, 300, 32, dtype=torch.float64)
    at_first = norm(x)
    shift = float(zero_centred)
    for parameter in parameters.values():
        nn.init.normal_(parameter)
    weight, bias = (shift + parameters["weight"] if parameters else None), parameters.get("bias")
    if kind.startswith("rms"):
        assert_close(at_first, F.rms_norm(x, (32,), eps=1e-3), 1e-12)
        assert_close(norm(x), F.rms_norm(x, (32,), weight, 1e-3), 1e-12)
    else:
        assert_close(at_first, F.layer_norm(x, (32,), eps=1e-3), 1e-12)
        assert_close(norm(x), F.layer_norm(x, (32,), weight, bias, 1e-3), 1e-12)
    narrow = norm.bfloat16()
    assert narrow(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", NORMS)
def test_a_language_model_has_them_before_and_after_its_stack(kind: str):
    options: dict[str, Any] = {"vocab_size": 11, "d_model": 32, "pattern": "mamba attention/mlp", "depth": 2}
    model = shaken(LanguageModel(LMConfig(norm=kind, embedding_norm=kind, embedding_scale=3.0, **options)).double())
    tokens = torch.randint(11, (2, 14))
    embedded = model.embedding_norm(3 * model.embedding(tokens))
    features = model.norm(model.stack(embedded)[0])
    assert type(model.norm) is type(model.stack.layers[0].norm) is type(model.embedding_norm)
    assert_close(model(tokens)[0], features @ model.head.weight.T, 1e-12)
    targets = torch.full_like(tokens, -100)
    targets[:, 3] = tokens[:, 4]
    expected = F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())
    assert_close(model.loss(tokens, targets), expected, 1e-12)
    rms = LanguageModel(LMConfig(norm=kind, final_norm="rms", **options))
    assert type(rms.norm).__name__ == "RMSNorm"
    bare = LanguageModel(LMConfig(norm=kind, final_norm="none", **options)).double()
    assert_close(bare(tokens)[0], bare.stack(bare.embedding(tokens))[0] @ bare.head.weight.T, 1e-12)
    assert model.float().stack.explain_one_token() == [COMPILED] * 2
    with torch.no_grad():
        whole, (_, state) = model(tokens)[0], model(tokens[:, :-1])
        assert_close(model(tokens[:, -1:], state)[0], whole[:, -1:], 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "rsm"}, "unknown norm 'rsm': expected one of layer, .*Did you mean 'rms'"),
        ({"norm": "none"}, "unknown norm 'none'"),
        ({"final_norm": "rms_norm"}, "unknown final_norm 'rms_norm': expected .*none, rms"),
        ({"embedding_norm": "x"}, "unknown embedding_norm 'x'"),
        ({"norm_placement": "after"}, "unknown placement of norms 'after': expected one of both, none, post, pre"),
        ({"norm_placements": {"mamba2": "Pre"}}, "unknown placement of norms 'Pre'.*Did you mean 'pre'"),
        ({"norm_placements": {"mamba2": 1}}, "unknown placement of norms 1"),
        ({"norm_placements": {"mamba9": "pre"}}, "unknown mixer or channel mixer in norm_placements 'mamba9'"),
        ({"residual_factors": {"mamba9": 1.0}}, "unknown mixer or channel mixer in residual_factors 'mamba9'"),
        ({"residual_factors": {"mamba2": 0.0}}, "residual_factors must be 1 positive numbers"),
        (
            {"pattern": "mamba2+attention", "norm_placements": {"mamba2": "post"}},
            "norm_placements of what is side by side must be the same, got mamba2: 'post', attention: 'pre'",
        ),
        (
            {"pattern": "mamba2+attention", "residual_factors": {"mamba2": 0.5}},
            "residual_factors of what is side by side must be the same, got mamba2: 0.5, attention: 1.0 in mamba2",
        ),
        ({"parallel": "yes"}, "unknown parallel 'yes': expected one of none, one_norm, two_norms"),
        (
            {"parallel": "one_norm", "norm_placements": {"swiglu": "post"}},
            "norm_placements of what is side by side must be the same, got mamba2: 'pre', swiglu: 'post' in mamba2",
        ),
        (
            {"parallel": "one_norm", "residual_factors": {"mamba2": 0.5}},
            "residual_factors of what is side by side must be the same, got mamba2: 0.5, swiglu: 1.0 in mamba2",
        ),
        (
            {"parallel": "two_norms", "norm_placement": "sum"},
            "parallel is 'two_norms', and norm_placement has one norm of the residual stream itself in mamba2",
        ),
    ],
)
def test_a_wrong_norm_is_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        LMConfig(**({"vocab_size": 11, "d_model": 32, "pattern": "mamba2", "depth": 1} | options))
