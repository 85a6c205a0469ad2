"""Stacks: composition, states, accounting, and the seventh law."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from seqarch.layers import CHANNEL_MIXERS, MIXERS, Mixer, clone_state, measured_state_bytes
from seqarch.layers.modules.norms import HeadNorm, RMSNorm
from seqarch.models import LanguageModel, LMConfig, Stack, StackConfig, parameter_groups
from seqarch.testing import assert_close, reference_backends

HYBRID = "2*mamba2 attention+gated_delta_net/moe sliding_window/none"


def stack(pattern: str = HYBRID, depth: int = 4, **options: Any) -> Stack:
    torch.manual_seed(0)
    return Stack(StackConfig(d_model=32, pattern=pattern, depth=depth, **options)).double()


def test_any_split_of_a_hybrid_gives_the_same():
    model, x = stack(), torch.randn(2, 40, 32, dtype=torch.float64)
    y, _ = model(x)
    state, outputs = model.init_state(2, max_length=40), []
    with torch.no_grad():
        for piece in x.split([7, 1, 1, 31], dim=1):
            out, state = model(piece, state)
            outputs.append(out)
    assert_close(torch.cat(outputs, 1), y, 1e-10)


def test_packed_sequences_do_not_see_each_other():
    model, x = stack(), torch.randn(1, 40, 32, dtype=torch.float64)
    y, _ = model(x, None, [0, 13, 40])
    assert_close(y[:, 13:], model(x[:, 13:])[0], 1e-10)


def test_a_cloned_state_branches():
    model, x = stack(), torch.randn(1, 9, 32, dtype=torch.float64)
    with torch.no_grad():
        _, state = model(x, model.init_state(1, max_length=20))
        branch = clone_state(state)
        first, _ = model(x[:, :1], state)
        second, _ = model(x[:, :1], branch)
    assert torch.equal(first, second)


def test_the_accounting_of_a_stack_is_that_of_its_parts():
    model, x = stack(), torch.randn(2, 21, 32, dtype=torch.float64)
    with reference_backends(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        _, state = model(x)
    assert counter.get_total_flops() == model.flops(21, 2)
    assert measured_state_bytes(state) == model.state_bytes(21, 2)
    with reference_backends(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x[:, :1], state)
    assert counter.get_total_flops() == model.step_flops(21, 2)


def test_one_more_token_costs_what_its_parts_say():
    model = stack()
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    channels = sum(channel.flops(1, 3) for channel in model.channels().values())
    for context in (0, 9, 100):
        assert model.step_flops(context, 3) == sum(mixer.step_flops(context, 3) for mixer in mixers) + channels
        assert model.step_flops(context, 3) == model.flops(context + 1, 3) - model.flops(context, 3)
    assert model.step_flops(9) < model.step_flops(100)
    recurrent = stack("mamba2 gated_delta_net/moe rg_lru s4d/none")
    assert recurrent.step_flops(0) == recurrent.step_flops(9) == recurrent.step_flops(100) == recurrent.flops(1)


def test_branches_are_normalised_where_asked():
    pattern, x = "attention+mamba2", torch.randn(2, 9, 32, dtype=torch.float64)
    model = stack(pattern, 1, channel="none", branch_norm=True)
    layer = model.layers[0]
    branches = [mixer(layer.norm(x))[0] for mixer in layer.mixers]  # type: ignore[operator, union-attr]
    normed = [y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() for y in branches]
    assert_close(model(x)[0] - x, sum(normed) / 2, 1e-10)  # type: ignore[arg-type]
    assert stack(pattern, 1, branch_norm=True).state_dict().keys() == stack(pattern, 1).state_dict().keys()


def test_the_norms_of_the_residual_stream_take_their_eps():
    x = 1e-3 * torch.randn(2, 9, 32, dtype=torch.float64)
    model = stack("attention", 1, channel="mlp", norm_eps=1e-2)
    layer = model.layers[0]
    assert layer.norm.eps == layer.channel_norm.eps == 1e-2  # type: ignore[union-attr]
    assert (model(x)[0] - x).norm() < 0.1 * (stack("attention", 1, channel="mlp")(x)[0] - x).norm()
    with pytest.raises(ValueError, match="norm_eps must be positive, got 0"):
        stack(norm_eps=0)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("channel", CHANNEL_MIXERS)
def test_initialisation_survives_the_stack(mixer: str, channel: str, monkeypatch: pytest.MonkeyPatch):
    """The seventh law: no wrapper overwrites what a mixer set."""
    born: list[tuple[nn.Module, dict[str, Tensor]]] = []

    def remember(kind: type[nn.Module]) -> None:
        original = kind.__init__

        def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            born.append((self, {name: value.detach().clone() for name, value in self.named_parameters()}))

        monkeypatch.setattr(kind, "__init__", init)

    remember(MIXERS[mixer])
    remember(CHANNEL_MIXERS[channel])
    model = LanguageModel(LMConfig(vocab_size=11, d_model=32, pattern=f"{mixer}/{channel}", depth=2))
    inside = set(model.modules())
    assert len([module for module, _ in born if module in inside]) == 4
    for module, parameters in born:
        for name, value in parameters.items():
            assert torch.equal(dict(module.named_parameters())[name], value), f"{type(module).__name__}.{name}"


def test_options_of_an_occurrence_go_before_those_of_its_name():
    pattern = "attention(window=4)/moe(num_experts=3, hidden=8) attention+mamba2(d_state=5, conv_width=2) attention/moe"
    given: Any = {"mixers": {"attention": {"num_heads": 4, "window": 9}}, "channels": {"moe": {"num_experts": 5}}}
    model = stack(pattern, 6, **given)
    assert [layer.mixers[0].config.window for layer in model.layers] == [4, 9, 9] * 2  # type: ignore[union-attr, index]
    assert all(layer.mixers[0].config.num_heads == 4 for layer in model.layers)  # type: ignore[union-attr, index]
    experts = [model.layers[i].channel.config.num_experts for i in (0, 2)]  # type: ignore[union-attr]
    assert experts == [3, 5]
    plain = stack("attention/moe", 1, mixers={"attention": {"num_heads": 4, "window": 4}},
                  channels={"moe": {"num_experts": 3, "hidden": 8}})  # fmt: skip
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    assert torch.equal(plain(x)[0], model.layers[0](x, [None], None)[0])
    state = measured_state_bytes(model(x)[1])
    assert state == model.state_bytes(9, 2) < stack("attention attention+mamba2 attention", 6).state_bytes(9, 2)
    assert_close(torch.cat([model(x[:, :3])[0], model(x[:, 3:], model(x[:, :3])[1])[0]], 1), model(x)[0], 1e-10)


def test_side_by_side_is_the_weighted_sum_of_its_branches():
    both = stack("linear_attention+retention/none", 1)
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    layer = both.layers[0]
    branches = [mixer(layer.norm(x))[0] for mixer in layer.mixers]  # type: ignore[union-attr, operator]
    assert_close(both(x)[0], x + (branches[0] + branches[1]) / 2, 1e-12)


def test_constants_multiply_what_mixers_read_and_give():
    constants = {
        "input_factors": {"linear_attention": 0.5, "swiglu": 1.5},
        "output_factors": {"retention": 3.0, "linear_attention": 0.7, "swiglu": 0.2},
    }
    scaled = stack("linear_attention+retention", 1, branch_weights=False, **constants)
    plain, x = stack("linear_attention+retention", 1), torch.randn(2, 5, 32, dtype=torch.float64)
    assert plain.state_dict().keys() - scaled.state_dict().keys() == {"layers.0.branch_weights"}
    assert not scaled.state_dict().keys() - plain.state_dict().keys()
    layer: Any = scaled.layers[0]
    normed = layer.norm(x)
    first, second = layer.mixers[0](0.5 * normed)[0], layer.mixers[1](normed)[0]
    between = x + 0.7 * first + 3 * second
    expected = between + 0.2 * layer.channel(1.5 * layer.channel_norm(between))
    y, _ = scaled(x)
    assert_close(y, expected, 1e-12)
    before, state = scaled(x[:, :4])
    assert_close(torch.cat([before, scaled(x[:, 4:], state)[0]], dim=1), y, 1e-12)
    learnt = stack("linear_attention+retention/none", 1, output_factors={"retention": 3.0})
    assert_close(learnt(x)[0], x + (layer.mixers[0](normed)[0] + 3 * second) / 2, 1e-12)
    alone = stack("retention/none", 1, output_factors={"retention": 3.0})
    assert_close(alone(x)[0] - x, 3 * (stack("retention/none", 1)(x)[0] - x), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_centred_norms_multiply_by_one_and_their_weights(dtype: torch.dtype):
    """In float32 at least: in bfloat16 the sum would lose what is small beside 1."""
    options = {"mixers": {"attention": {"qk_norm": True}}, "zero_centred_norms": True}
    centred, plain = stack("attention mamba", 2, **options), stack("attention mamba", 2, mixers=options["mixers"])
    x = torch.randn(2, 130, 32).to(dtype)
    assert torch.equal(centred.double()(x.double())[0], plain.double()(x.double())[0])
    for norm, other in zip(
        *([m for m in s.modules() if isinstance(m, RMSNorm)] for s in (centred, plain)), strict=True
    ):
        assert not norm.weight.any()
        nn.init.normal_(norm.weight, std=0.01)
        norm.to(dtype)
        other.weight = nn.Parameter(1 + norm.weight.float().to(other.weight.dtype))
        expected = other.to(torch.promote_types(dtype, torch.float32))(x.to(other.weight.dtype))
        assert norm(x).dtype == dtype
        assert_close(norm(x).float(), expected.to(dtype).float(), 1e-6)
    head = HeadNorm(16, weights="zeros").to(dtype)
    nn.init.constant_(head.weight, -0.25)
    wide = x[..., :16].to(torch.promote_types(dtype, torch.float32))
    expected = 0.75 * wide * (wide.square().mean(-1, keepdim=True) + torch.finfo(dtype).eps).rsqrt()
    assert_close(head(x[..., :16]).float(), expected.to(dtype).float(), 1e-6)


def test_weight_decay_spares_what_the_papers_spare():
    model = LanguageModel(LMConfig(vocab_size=11, d_model=32, pattern="mamba mamba2 gated_delta_net", depth=3))
    decayed, spared = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    free = {names[id(parameter)].rsplit(".", 1)[-1] for parameter in spared["params"]}
    assert {"A_log", "D", "dt_bias", "bias"} <= free
    assert all(names[id(parameter)].endswith("weight") for parameter in decayed["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)


def test_the_marks_of_weight_decay_survive_a_copy():
    model = LanguageModel(LMConfig(vocab_size=11, d_model=32, pattern="mamba+attention", depth=1))
    sizes = [[len(group["params"]) for group in parameter_groups(m, 0.1)] for m in (model, copy.deepcopy(model))]
    assert sizes[0] == sizes[1]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"pattern": "attention(windo=3)"}, "mixer 'attention' has no option 'windo'.*Did you mean 'window'"),
    ({"pattern": "attention(d_model=3)"}, "mixer 'attention' has no option 'd_model' of its own"),
    ({"pattern": "attention/mlp(hidden=0)"}, "channel mixer 'mlp': hidden must be at least 1, got 0"),
    ({"mixers": {"attention": {"num_heads": "2"}}}, r"attention': num_heads must be int \| None, got '2'"),
    ({"mixers": {"attention": {"qk_norm": 1}}}, "attention': qk_norm must be bool, got 1"),
    ({"mixers": {"attention": {"conv_width": 9}}}, "attention': .* width of 2 to 8, got 9"),
    ({"pattern": "mamba2", "mixers": {"mamba2": {"d_state": 0}}}, "mamba2': d_state must be at least 1, got 0"),
    ({"pattern": "retention", "mixers": {"retention": {"expand_v": 0}}}, "expand_v must be at least 1, got 0"),
    ({"pattern": "mamba", "mixers": {"mamba": {"dt_floor": float("nan")}}}, "dt_floor must be positive, got nan"),
    ({"pattern": "mamba2", "mixers": {"mamba2": {"A_min": 20.0}}}, r"A_min .20.0. must not be above A_max .16.0."),
    ({"mixers": {"attention": {"rotary_base": 0.0}}}, "rotary_base must be positive, got 0.0"),
    ({"pattern": "mamba4"}, "unknown mixer 'mamba4': expected one of attention, .*Did you mean 'mamba'"),
    ({"pattern": "attention/swigul"}, "unknown channel mixer 'swigul'.*Did you mean 'swiglu'"),
    ({"channel": "mpl"}, "unknown channel mixer 'mpl'.*Did you mean 'mlp'"),
    ({"mixers": {"atention": {}}}, "unknown mixer 'atention'.*Did you mean 'attention'"),
    (
        {"mixers": {"attention": {"num_head": 2}}},
        "no option 'num_head'.*Did you mean 'num_heads'",
    ),
    ({"mixers": {"attention": {"num_heads": 3}}}, r"num_heads \(3\) must divide d_model \(32\)"),
    ({"pattern": "attention mamba", "depth": 3}, "a depth of 3 does not fit the pattern"),
    ({"d_model": 0}, "d_model must be at least 1, got 0"),
    ({"mixers": {"gla": {"d_model": 1}}}, "'gla' has no option 'd_model' of its own: d_model is the stack's"),
    ({"mixers": {"gla": {3: 1}}}, "'gla' has no option 3 of its own"),
    ({"depth": 10**9}, "depth is int 1000000000, expected an int of at most 10000 layers"),
    ({"d_model": 2**63}, "d_model must be at most 9223372036854775807, got 9223372036854775808"),
    ({"mixers": {"mamba": None}}, "mixer 'mamba': expected a dict of options, got None"),
    (
        {"input_factors": {"atention": 1.0}},
        "unknown mixer or channel mixer in input_factors 'atention'.*Did you mean 'attention'",
    ),
    ({"output_factors": {"swiglu": 0.0}}, r"output_factors must be 1 positive numbers, got list \[0.0\]"),
    ({"output_factors": {"swiglu": "2"}}, "output_factors must be 1 positive numbers"),
    ({"mixers": {"mamba2": {"in_factors": [1.0]}}, "pattern": "mamba2"}, "in_factors must be 5 positive numbers"),
    ({"channels": {"mlp": [1]}}, r"channel mixer 'mlp': expected a dict of options, got list \[1\]"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_a_wrong_stack_is_named(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Stack(StackConfig(**({"d_model": 32, "pattern": "attention", "depth": 2} | changes)))


def test_a_stack_reads_only_its_own_width():
    for x, given in (
        (torch.randn(2, 5, 31), r"torch.float32 of shape \[2, 5, 31\]"),
        (torch.zeros(2, 5, 32, dtype=torch.int64), r"torch.int64 of shape \[2, 5, 32\]"),
        ([1], "list"),
    ):
        with pytest.raises(ValueError, match=rf"stack: x is {given}, expected floating point \[B, T, 32\]"):
            stack()(x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"stack: config is dict .*, expected a StackConfig"):
        Stack({"d_model": 32})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"language model: config is StackConfig .*, expected an LMConfig"):
        LanguageModel(stack().config)  # pyright: ignore[reportArgumentType]


def test_a_stack_reads_only_its_own_state():
    model, x = stack("2*mamba2 attention+retention", 3), torch.randn(1, 4, 32, dtype=torch.float64)
    state = model(x)[1]
    wrong = [
        ((*state, state[0]), "the state is of 4 layers, expected 3"),
        (state[:2], "the state is of 2 layers, expected 3"),
        ((), "the state is of 0 layers, expected 3"),
        (((), *state[1:]), "the state of layer 0 is of 0 mixers, expected 1"),
        ((*state[:2], state[2][:1]), "the state of layer 2 is of 1 mixers, expected 2"),
        ((state[0], None, state[2]), "the state of layer 1 is None, expected a tuple of 1 mixers"),
        (x, "the state is Tensor, expected a tuple of 3 layers"),
    ]
    for given, message in wrong:
        for tokens in (x, x[:, :1]):
            with pytest.raises(ValueError, match=f"stack: {message}"):
                model(tokens, given)  # pyright: ignore[reportArgumentType]
