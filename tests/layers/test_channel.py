"""Channel mixers: their equations, their widths, and the router of the mixture of experts."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from seqarch import ops
from seqarch.layers import CHANNEL_MIXERS, build_channel_mixer
from seqarch.layers.moe import MixtureOfExperts, Routing, load_balance_loss, router_z_loss


def inputs(length: int = 10, batch: int = 2, width: int = 32) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def moe(**chosen) -> MixtureOfExperts:
    torch.manual_seed(0)
    mixer = build_channel_mixer("moe", d_model=32, **chosen).double()
    assert isinstance(mixer, MixtureOfExperts)
    return mixer


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CHANNEL_MIXERS)
@pytest.mark.parametrize("width", [32, 96, 160])
def test_each_token_for_itself_with_exact_flops(name, width):
    mixer, x = build_channel_mixer(name, d_model=width).double(), inputs(width=width)
    with ops.use_backends(experts="parallel_torch"), FlopCounterMode(display=False) as counter:
        y = mixer(x)
    assert counter.get_total_flops() == mixer.flops(10, 2)
    same(mixer(x.flip(1)).flip(1), y)
    changed = x.clone()
    changed[0, 4] += 1
    moved = (mixer(changed) - y).abs().amax(dim=-1) > 1e-9
    assert moved.nonzero().tolist() == [[0, 4]]


@pytest.mark.parametrize("name", CHANNEL_MIXERS)
def test_every_parameter_receives_a_gradient(name):
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
    assert mixer.input.weight.shape == (128, 32)
    same(mixer(x), (x @ mixer.input.weight.T).clamp(min=0) ** 2 @ mixer.output.weight.T)
    exact = build_channel_mixer("mlp", d_model=32).double()
    h = x @ exact.input.weight.T
    same(exact(x), (h * (1 + torch.erf(h / 2**0.5)) / 2) @ exact.output.weight.T)


def test_swiglu_is_its_equation():
    mixer, x = build_channel_mixer("swiglu", d_model=32, hidden=40).double(), inputs()
    gate, value = mixer.input.weight[:40], mixer.input.weight[40:]
    h = x @ gate.T
    same(mixer(x), (h * h.sigmoid() * (x @ value.T)) @ mixer.output.weight.T)


@pytest.mark.parametrize(("width", "hidden"), [(32, 96), (64, 192), (96, 256), (128, 352), (384, 1024), (768, 2048)])
def test_swiglu_is_eight_thirds_wide_in_multiples_of_32(width, hidden):
    assert build_channel_mixer("swiglu", d_model=width).config.hidden_width == hidden


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("shared", [0, 2])
def test_moe_equals_a_loop_over_the_tokens(normalise, shared):
    mixer, x = moe(num_experts=6, top_k=3, hidden=16, shared_experts=shared, normalise_weights=normalise), inputs()
    rows = []
    for token in x.flatten(0, 1):
        p = F.softmax(mixer.router.weight @ token, dim=0)
        best = p.argsort(descending=True)[:3]
        total = p[best].sum() if normalise else 1
        y = sum(
            p[e] / total * (F.silu(token @ mixer.w_gate[e]) * (token @ mixer.w_in[e])) @ mixer.w_out[e] for e in best
        )
        rows.append(y if mixer.shared is None else y + mixer.shared(token))
    same(mixer(x), torch.stack(rows).view_as(x))
    assert (mixer.shared is None) == (shared == 0)


def routing(logits: Tensor, index: Tensor) -> Routing:
    return Routing(logits, logits.softmax(dim=-1), index, training=True)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (8, 2), (6, 3)])
def test_load_balance_is_one_when_balanced_and_as_many_as_experts_when_collapsed(experts, top_k):
    tokens = torch.arange(experts)[:, None] + torch.arange(top_k)
    even = routing(torch.zeros(experts, experts, dtype=torch.float64), tokens % experts)
    same(load_balance_loss(even), torch.ones((), dtype=torch.float64))
    # Mixtral's release normalises by N, not N k: its balanced value is k
    counts = F.one_hot(even.index, experts).double().sum(dim=(0, 1)) / experts
    same(experts * (counts * even.probabilities.mean(dim=0)).sum(), torch.tensor(top_k, dtype=torch.float64))
    collapsed = torch.full((5, experts), -1e4, dtype=torch.float64)
    collapsed[:, 0] = 0
    one_expert = routing(collapsed, torch.zeros(5, 1, dtype=torch.int64))
    same(load_balance_loss(one_expert), torch.tensor(experts, dtype=torch.float64))


def test_router_z_loss_is_the_squared_log_of_the_partition_function():
    logits = torch.tensor([[0.0, 0.0], [1000.0, 1000.0]], dtype=torch.float64)
    expected = (math.log(2) ** 2 + (1000 + math.log(2)) ** 2) / 2
    same(
        router_z_loss(routing(logits, torch.zeros(2, 1, dtype=torch.int64))),
        torch.tensor(expected, dtype=torch.float64),
    )


def test_auxiliary_loss_weighs_its_parts_and_reaches_the_router():
    mixer, x = moe(load_balance_weight=0.5, router_z_weight=0.25), inputs()
    assert mixer.auxiliary_loss() == 0
    mixer(x)
    logits = x.flatten(0, 1) @ mixer.router.weight.T
    p = logits.softmax(-1)
    share = F.one_hot(p.topk(2).indices, 8).double().mean(dim=(0, 1))
    balance = 8 * (share * p.mean(0)).sum()
    same(mixer.auxiliary_loss(), 0.5 * balance + 0.25 * logits.logsumexp(-1).square().mean())
    mixer.auxiliary_loss().backward()
    assert mixer.router.weight.grad is not None
    assert mixer.router.weight.grad.abs().max() > 0
    mixer.eval()(x)
    assert mixer.auxiliary_loss() == 0
    assert not mixer.auxiliary_loss().requires_grad


def test_a_step_down_the_load_balance_loss_balances():
    torch.manual_seed(0)
    mixer, x = moe(load_balance_weight=1.0, router_z_weight=0.0), inputs(200) + 1.0
    optimiser = torch.optim.SGD([mixer.router.weight], lr=0.05)
    variation = []
    for _ in range(30):
        mixer(x)
        variation.append(mixer.router_metrics()["load_variation"])
        optimiser.zero_grad()
        mixer.auxiliary_loss().backward()
        optimiser.step()
    assert variation[0] > 0.5
    assert variation[-1] < 0.05


def test_router_metrics():
    mixer = moe(num_experts=4, top_k=1, normalise_weights=False)
    assert mixer.router_metrics() == {}
    with torch.no_grad():
        mixer.router.weight.zero_()
        mixer.router.weight[0, 0], mixer.router.weight[1, 0] = 1, -1
    x = torch.zeros(1, 4, 32, dtype=torch.float64)
    x[0, :, 0] = torch.tensor([5.0, 5.0, 5.0, -5.0])
    mixer(x)
    metrics = mixer.router_metrics()
    assert metrics["load"] == [0.75, 0.25, 0.0, 0.0]
    assert metrics["largest_load"] == pytest.approx(3)
    assert metrics["dead_experts"] == 2
    assert metrics["load_variation"] == pytest.approx(math.sqrt((4 + 0 + 1 + 1) / 4))
    assert metrics["mean_abs_logit"] == pytest.approx(2.5)
    p = F.softmax(torch.tensor([5.0, -5.0, 0.0, 0.0]), dim=0)
    assert metrics["router_entropy"] == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)


def test_the_router_runs_in_float32_under_autocast():
    mixer, x = moe().float(), inputs().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x)
    chosen = mixer._routing
    assert chosen is not None
    assert chosen.logits.dtype == torch.float32
    assert y.dtype == torch.float32
    exact = mixer(x)
    assert mixer._routing is not None
    assert torch.equal(mixer._routing.index, chosen.index)
    assert (y - exact).square().mean() / exact.square().mean() < 0.02**2


def test_a_module_can_be_copied_after_a_forward_pass():
    mixer, x = moe(), inputs()
    y = mixer(x)
    twin = copy.deepcopy(mixer)
    assert twin.router_metrics() == {}
    same(twin(x), y)


def test_no_tokens():
    mixer = moe(shared_experts=1)
    assert mixer(inputs(0)).shape == (2, 0, 32)
    assert mixer.auxiliary_loss() == 0
    assert mixer.router_metrics() == {}


def test_default_experts_cost_a_token_what_a_swiglu_does():
    for chosen in ({}, {"top_k": 4}, {"shared_experts": 2}):
        config = build_channel_mixer("moe", d_model=768, **chosen).config
        active = config.hidden_width * (config.top_k + config.shared_experts)
        assert 2048 <= active <= 2048 * 1.05


@pytest.mark.parametrize(
    ("name", "chosen", "message"),
    [
        ("mlp", {"activation": "gleu"}, "Did you mean 'gelu'"),
        ("mlp", {"hidden": 0}, "hidden must be at least 1, got 0"),
        ("swiglu", {"expansion": 0.0}, "expansion must be positive, got 0.0"),
        ("swiglu", {"activation": "relu"}, "has no option 'activation'"),
        ("moe", {"top_k": 9}, r"top_k must be 1 to num_experts \(8\), got 9"),
        ("moe", {"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ("moe", {"top_k": 1}, "its router cannot learn"),
        ("moe", {"shared_experts": -1}, "shared_experts must be at least 0, got -1"),
        ("moe", {"hidden": 0}, "hidden must be at least 1, got 0"),
        ("moe", {"router_z_weight": -1.0}, "router_z_weight must be at least 0, got -1.0"),
    ],
)
def test_wrong_options_are_named(name, chosen, message):
    with pytest.raises(ValueError, match=message):
        build_channel_mixer(name, d_model=32, **chosen)
