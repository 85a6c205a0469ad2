"""Channel mixers: their laws, and the equations and widths of the dense ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from seqarch.layers import CHANNEL_MIXERS, build_channel_mixer
from seqarch.testing import check_channel_mixer
from seqarch.testing.channel_laws import channel_flops, channel_gradients, tokens_alone

OPTIONS = {
    "moe": [
        {},
        {"gated": False, "activation": "squared_relu", "shared_experts": 1, "shared_hidden": 24, "latent": 8},
        {"bias": True, "router_bias": True, "activation": "quick_gelu", "limit": 0.5, "value_offset": 1.0}
        | {"shared_experts": 1, "shared_gate": True},
        {"router": "sigmoid", "expert_bias": True, "num_experts": 12, "num_groups": 4, "top_groups": 2, "bias": True}
        | {"gated": False, "group_score": "max"},
    ],
    "swiglu": [{}, {"bias": True, "activation": "gelu_tanh"}, {"limit": 0.5, "value_offset": 0.5}],
}
"""Under which the laws are tried; ``[{}]`` for others."""


def inputs(length: int = 10) -> Tensor:
    return torch.randn(2, length, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CHANNEL_MIXERS)
@pytest.mark.parametrize("width", [32, 96, 160])
def test_each_token_for_itself_with_exact_flops(name, width):
    laws, options = (tokens_alone, channel_flops), OPTIONS.get(name, [{}])
    check_channel_mixer(CHANNEL_MIXERS[name], d_model=width, options=options, laws=laws)


@pytest.mark.parametrize("name", CHANNEL_MIXERS)
def test_every_parameter_receives_a_gradient(name):
    check_channel_mixer(CHANNEL_MIXERS[name], options=OPTIONS.get(name, [{}]), laws=(channel_gradients,))
    mixer = build_channel_mixer(name, d_model=32).double()
    (mixer(inputs(50)) * inputs(50)).sum().backward()
    for parameter in mixer.parameters():
        assert parameter.grad is not None
        experts = parameter.grad if parameter.ndim == 3 else parameter.grad[None]
        assert (experts.abs().amax(dim=(1, 2)) > 0).all()


@pytest.mark.parametrize("name", CHANNEL_MIXERS)
def test_matrices_start_as_those_of_a_linear_layer(name):
    mixer = build_channel_mixer(name, d_model=128)
    for key, parameter in mixer.named_parameters():
        fan_in = parameter.shape[1]  # [out, in] of a linear layer, [E, in, out] of the experts
        assert parameter.abs().max() <= fan_in**-0.5, key
        torch.testing.assert_close(parameter.std().item(), (3 * fan_in) ** -0.5, rtol=0.05, atol=0)


def test_mlp_is_its_equation():
    mixer, x = build_channel_mixer("mlp", d_model=32, activation="squared_relu").double(), inputs()
    assert mixer.in_proj.weight.shape == (128, 32)
    same(mixer(x), (x @ mixer.in_proj.weight.T).clamp(min=0) ** 2 @ mixer.out_proj.weight.T)
    exact = build_channel_mixer("mlp", d_model=32).double()
    h = x @ exact.in_proj.weight.T
    same(exact(x), (h * (1 + torch.erf(h / 2**0.5)) / 2) @ exact.out_proj.weight.T)


def test_swiglu_is_its_equation():
    mixer, x = build_channel_mixer("swiglu", d_model=32, hidden=40).double(), inputs()
    gate, value = mixer.in_proj.weight[:40], mixer.in_proj.weight[40:]
    h = x @ gate.T
    same(mixer(x), (h * h.sigmoid() * (x @ value.T)) @ mixer.out_proj.weight.T)


def test_swiglu_with_biases_and_another_activation_is_the_gated_mlp_of_recurrent_gemma():
    mixer = build_channel_mixer("swiglu", d_model=32, hidden=40, activation="gelu_tanh", bias=True).double()
    x, (w, b) = inputs(), (mixer.in_proj.weight, mixer.in_proj.bias)
    h = x @ w[:40].T + b[:40]
    gelu = h / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3)))
    same(mixer(x), (gelu * (x @ w[40:].T + b[40:])) @ mixer.out_proj.weight.T + mixer.out_proj.bias)


def test_the_gate_of_swiglu_has_a_constant():
    wide = torch.randn(2, 80, 32)  # by the compiled kernel, were there no constant
    for activation in ("silu", "gelu"):
        scaled = build_channel_mixer("swiglu", d_model=32, hidden=40, activation=activation, gate_factor=0.5)
        plain = build_channel_mixer("swiglu", d_model=32, hidden=40, activation=activation)
        plain.load_state_dict(scaled.state_dict())
        plain.in_proj.weight.data[:40] /= 2
        torch.testing.assert_close(scaled(wide), plain(wide))


def test_the_gate_and_the_value_of_swiglu_are_bounded():
    options = {"activation": "quick_gelu", "limit": 0.5, "value_offset": 1.0, "gate_factor": 2.0}
    mixer, x = build_channel_mixer("swiglu", d_model=32, hidden=40, **options).double(), inputs()
    gate, value = x @ mixer.in_proj.weight[:40].T * 2, x @ mixer.in_proj.weight[40:].T
    assert all((each > 0.5).any() and (each < -0.5).any() for each in (gate, value))
    gate = gate.clamp(max=0.5)
    same(mixer(x), (gate * (1.702 * gate).sigmoid() * (value.clamp(-0.5, 0.5) + 1)) @ mixer.out_proj.weight.T)


@pytest.mark.parametrize(("width", "hidden"), [(32, 96), (64, 192), (96, 256), (128, 352), (384, 1024), (768, 2048)])
def test_swiglu_is_eight_thirds_wide_in_multiples_of_32(width, hidden):
    assert build_channel_mixer("swiglu", d_model=width).config.hidden_width == hidden


def test_no_channel_mixer_is_narrower_than_32():
    assert build_channel_mixer("mlp", d_model=32, expansion=1e-9).config.hidden_width == 32


@pytest.mark.parametrize(
    ("name", "chosen", "message"),
    [
        ("mlp", {"activation": "gleu"}, "Did you mean 'gelu'"),
        ("mlp", {"hidden": 0}, "hidden must be at least 1, got 0"),
        ("swiglu", {"expansion": 0.0}, "expansion must be positive, got 0.0"),
        ("swiglu", {"activation": "swish"}, "unknown activation 'swish'"),
        ("swiglu", {"activaton": "relu"}, "has no option 'activaton'"),
        ("swiglu", {"limit": 0.0}, "limit must be positive, got 0.0"),
        ("moe", {"gated": False, "limit": 7.0}, "limit=7.0 is an option of gated experts, got gated=False"),
        ("moe", {"gated": False, "value_offset": 1.0}, "value_offset=1.0 is an option of gated experts"),
        ("moe", {"num_groups": 3}, r"num_groups \(3\) must divide num_experts \(8\)"),
        ("moe", {"num_groups": 4, "top_groups": 5}, r"top_groups must be 1 to num_groups \(4\), got 5"),
        ("moe", {"num_groups": 4, "top_groups": 1, "top_k": 3}, "at most the 2 experts of 1 groups"),
        ("moe", {"num_groups": 4, "group_score": "top3"}, "Did you mean 'top2'"),
        ("moe", {"num_groups": 8, "top_groups": 4}, "needs groups of at least 2 experts, got 1 in each of 8"),
    ],
)
def test_wrong_options_are_named(name, chosen, message):
    with pytest.raises(ValueError, match=message):
        build_channel_mixer(name, d_model=32, **chosen)
