"""Mixture of experts: routing, capacity, the bias that balances, its losses and metrics."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from seqarch import ops
from seqarch.layers import build_channel_mixer
from seqarch.layers.channel.moe import MixtureOfExperts
from seqarch.layers.channel.router import Routing, load_balance_loss, router_z_loss
from seqarch.models import LanguageModel, LMConfig


def inputs(length: int = 10, batch: int = 2, width: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def moe(**chosen) -> MixtureOfExperts:
    torch.manual_seed(0)
    mixer = build_channel_mixer("moe", d_model=32, **chosen).double()
    assert isinstance(mixer, MixtureOfExperts)
    return mixer


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("deepseek", [False, True])
def test_moe_equals_a_loop_over_the_tokens(normalise, shared, deepseek):
    more = {"router": "sigmoid", "expert_bias": True, "weight_scale": 2.446} if deepseek else {}
    options = {"shared_experts": shared, "shared_gate": shared > 0, "normalise_weights": normalise, **more}
    mixer, x = moe(num_experts=6, top_k=3, hidden=16, **options), inputs()
    bias = torch.zeros(6)
    if mixer.router.expert_bias is not None:
        bias = mixer.router.expert_bias.normal_()
    rows, moved = [], 0
    for token in x.flatten(0, 1):
        z = mixer.router.weight @ token
        p = z.sigmoid() if deepseek else F.softmax(z, dim=0)
        best = (p + bias).argsort(descending=True)[:3]
        moved += set(best.tolist()) != set(p.argsort(descending=True)[:3].tolist())
        total = p[best].sum() if normalise else 1
        total = total / 2.446 if deepseek else total
        y = sum(
            p[e] / total * (F.silu(token @ mixer.w_gate[e]) * (token @ mixer.w_in[e])) @ mixer.w_out[e] for e in best
        )
        if mixer.shared is not None and mixer.shared_gate is not None:
            y = y + (mixer.shared_gate.weight @ token).sigmoid() * mixer.shared(token[None, None])[0, 0]
        rows.append(y)
    same(mixer(x), torch.stack(rows).view_as(x))
    assert (mixer.shared is None) == (shared == 0)
    assert (moved > 0) == deepseek  # the bias did change choices


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["squared_relu", "gelu"])
def test_experts_without_gates_of_any_activation_beside_a_wide_shared_one(gated, activation):
    act = {"squared_relu": lambda h: h.clamp(min=0) ** 2, "gelu": F.gelu}[activation]
    options = {"gated": gated, "activation": activation, "hidden": 16, "shared_experts": 2, "shared_hidden": 20}
    mixer, x = moe(num_experts=4, **options), inputs()
    assert mixer.shared is not None
    assert mixer.shared.out_proj.weight.shape == (32, 40)
    assert (mixer.w_gate is None) == (not gated)
    rows = []
    for token in x.flatten(0, 1):
        p, y = F.softmax(mixer.router.weight @ token, dim=0), 0
        best = p.argsort(descending=True)[:2]
        for e in best:
            hidden = token @ mixer.w_in[e]
            hidden = act(hidden) if mixer.w_gate is None else act(token @ mixer.w_gate[e]) * hidden
            y = y + p[e] / p[best].sum() * hidden @ mixer.w_out[e]
        hidden = mixer.shared.in_proj.weight @ token
        hidden = act(hidden[:40]) * hidden[40:] if gated else act(hidden)
        rows.append(y + mixer.shared.out_proj.weight @ hidden)
    same(mixer(x), torch.stack(rows).view_as(x))


@pytest.mark.parametrize(("router", "score"), [("sigmoid", "top2"), ("softmax", "max"), ("sigmoid", "max")])
def test_experts_are_those_of_the_best_groups(router, score):
    """12 experts in 4 groups of 3, of which a token has 2; a bias counts for the choice alone."""
    groups = {"num_experts": 12, "top_k": 4, "num_groups": 4, "top_groups": 2, "group_score": score}
    mixer, x = moe(**groups, router=router, expert_bias=router == "sigmoid", weight_scale=2.5), inputs(40)
    moved, bias = 0, torch.zeros(12)
    if mixer.router.expert_bias is not None:
        bias = mixer.router.expert_bias.normal_()
    found, weights = mixer.router(x)
    for token, index, weight in zip(x.flatten(0, 1), found.index, weights, strict=True):
        z = mixer.router.weight @ token
        p = z.sigmoid() if router == "sigmoid" else z.softmax(dim=0)
        by = (p + bias).tolist()
        members = [range(3 * group, 3 * group + 3) for group in range(4)]
        totals = [sum(sorted((by[e] for e in each), reverse=True)[: 2 if score == "top2" else 1]) for each in members]
        best = sorted(range(4), key=lambda group: -totals[group])[:2]
        among = sorted((e for group in best for e in members[group]), key=lambda e: -by[e])[:4]
        moved += set(among) != set(sorted(range(12), key=lambda e: -by[e])[:4])
        assert index.tolist() == among
        same(weight, 2.5 * p[among] / p[among].sum())
    assert moved > 0


def test_the_experts_of_gpt_oss():
    """Softmax over the chosen logits, biases everywhere, bounded gates and values."""
    unit = {"activation": "quick_gelu", "limit": 0.7, "value_offset": 1.0}
    mixer, x = moe(num_experts=6, top_k=3, hidden=16, bias=True, router_bias=True, **unit), inputs()
    rows = []
    for token in x.flatten(0, 1):
        best = (mixer.router.weight @ token + mixer.router.bias).topk(3)
        y = 0
        for p, e in zip(best.values.softmax(0), best.indices, strict=True):
            gate = (token @ mixer.w_gate[e] + mixer.b_gate[e]).clamp(max=0.7)
            value = (token @ mixer.w_in[e] + mixer.b_in[e]).clamp(-0.7, 0.7)
            y = y + p * (gate * (1.702 * gate).sigmoid() * (value + 1) @ mixer.w_out[e] + mixer.b_out[e])
        rows.append(y)
    same(mixer(x), torch.stack(rows).view_as(x))


def test_experts_of_a_latent_space():
    options = {"gated": False, "activation": "squared_relu", "shared_experts": 1, "router": "sigmoid"}
    mixer, x = moe(num_experts=4, hidden=16, latent=8, **options), inputs()
    assert mixer.w_in.shape == (4, 8, 16)
    rows = []
    for token in x.flatten(0, 1):
        p, y = (mixer.router.weight @ token).sigmoid(), 0
        best, low = p.argsort(descending=True)[:2], mixer.latent_in.weight @ token
        for e in best:
            y = y + p[e] / p[best].sum() * (low @ mixer.w_in[e]).clamp(min=0) ** 2 @ mixer.w_out[e]
        rows.append(mixer.latent_out.weight @ y + mixer.shared(token[None, None])[0, 0])
    same(mixer(x), torch.stack(rows).view_as(x))


def routing(logits: Tensor, index: Tensor) -> Routing:
    return Routing(logits, logits.softmax(dim=-1), index, None, training=True)


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


def test_a_sigmoid_router_is_balanced_by_its_scores_shares():
    mixer, x = moe(router="sigmoid", load_balance_weight=1.0, router_z_weight=0.0), inputs()
    mixer(x)
    scores = (x.flatten(0, 1) @ mixer.router.weight.T).sigmoid()
    share = F.one_hot(scores.topk(2).indices, 8).double().mean(dim=(0, 1))
    same(mixer.auxiliary_loss(), 8 * (share * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum())


def test_scores_that_underflow_leave_no_nan():
    mixer = moe(router="sigmoid").float()
    with torch.no_grad():
        mixer.router.weight.fill_(-100.0)
    y = mixer(torch.ones(1, 3, 32))
    loss = mixer.auxiliary_loss()
    (y.sum() + loss).backward()
    assert y.isfinite().all()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in mixer.parameters() if parameter.grad is not None)


def counts(mixer: MixtureOfExperts, *calls: Tensor) -> Tensor:
    """The choices for these inputs, worked out apart; there is no bias yet."""
    scores = torch.cat([x.flatten(0, 1) for x in calls]) @ mixer.router.weight.T
    return F.one_hot(scores.topk(mixer.config.top_k).indices, mixer.config.num_experts).sum(dim=(0, 1))


def plain(mixer: MixtureOfExperts, x: Tensor) -> Tensor:
    return mixer(x)


def checkpointed(mixer: MixtureOfExperts, x: Tensor) -> Tensor:
    return checkpoint(mixer, x, use_reentrant=False)


def checkpointed_whole(mixer: MixtureOfExperts, x: Tensor) -> Tensor:
    # without an early stop, and with more of the model around
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        return checkpoint(lambda x: mixer(x.sin()).cos(), x, use_reentrant=False)


def reentrant(mixer: MixtureOfExperts, x: Tensor) -> Tensor:
    return checkpoint(mixer, x.clone().requires_grad_(), use_reentrant=True)


def nested(mixer: MixtureOfExperts, x: Tensor) -> Tensor:
    return checkpoint(lambda x: checkpoint(mixer, x, use_reentrant=False), x, use_reentrant=False)


@pytest.mark.parametrize("call", [plain, checkpointed, checkpointed_whole, reentrant, nested])
@pytest.mark.parametrize("together", [False, True])
def test_each_choice_of_a_step_counts_once(call, together):
    """Over micro-batches that go backward one by one or together, under any activation checkpointing."""
    mixer, micro = moe(expert_bias=True), [inputs(7), inputs(9, seed=2), inputs(4, seed=3)]
    seen = [x.sin() for x in micro] if call is checkpointed_whole else micro
    if together:
        sum(call(mixer, x).square().sum() for x in micro).backward()  # type: ignore[union-attr]
    else:
        for x in micro:
            call(mixer, x).square().sum().backward()
    assert mixer.router.load.tolist() == counts(mixer, *seen).tolist()
    mixer.update_router()
    assert mixer.router.load.count_nonzero() == 0


def test_nothing_counts_that_does_not_train():
    mixer, x = moe(expert_bias=True), inputs()
    with torch.no_grad():
        mixer(x)
    mixer(x)  # goes backward never
    mixer.eval()(x).sum().backward()
    assert mixer.router.load.count_nonzero() == 0
    mixer.update_router()
    assert mixer.router.expert_bias is not None
    assert mixer.router.expert_bias.count_nonzero() == 0


@pytest.mark.parametrize("recentred", [False, True])
def test_the_bias_steps_towards_the_mean_load(recentred):
    mixer = moe(num_experts=4, expert_bias=True, bias_rate=0.25, recentre_bias=recentred)
    bias, load = mixer.router.expert_bias, mixer.router.load
    assert bias is not None
    load.copy_(torch.tensor([9, 4, 0, 3]))  # of mean 4
    mixer.update_router()
    step = [-0.25, 0.0, 0.25, 0.25]
    assert bias.tolist() == ([s - 0.0625 for s in step] if recentred else step)
    load.copy_(torch.tensor([0, 8, 4, 4]))
    mixer.update_router()
    assert bias.tolist() == ([0.0 - 0.0625, -0.3125, 0.1875, 0.1875] if recentred else [0.0, -0.25, 0.25, 0.25])


def test_the_bias_is_state_and_no_parameter():
    mixer = moe(expert_bias=True)
    assert "router.expert_bias" in mixer.state_dict()
    assert "router.load" not in mixer.state_dict()
    assert not any("bias" in name for name, _ in mixer.named_parameters())
    assert "router.expert_bias" not in moe().state_dict()
    mixer.router.expert_bias.fill_(1 + 2**-20)  # type: ignore[union-attr]
    low = mixer.float().bfloat16()
    assert low.router.weight.dtype == torch.bfloat16
    assert low.router.expert_bias.dtype == torch.float32  # type: ignore[union-attr]
    assert (low.router.expert_bias == 1 + 2**-20).all()  # type: ignore[union-attr]
    assert low(inputs().bfloat16()).dtype == torch.bfloat16
    assert low._routing is not None
    assert low._routing.logits.dtype == torch.float32


def test_the_bias_alone_balances():
    options = {"expert_bias": True, "bias_rate": 0.005, "load_balance_weight": 0.0, "router_z_weight": 0.0}
    mixer, x = moe(**options), inputs(200) + 1.0
    variation = []
    for _ in range(120):
        mixer(x).sum().backward()
        variation.append(mixer.router_metrics()["load_variation"])
        mixer.update_router()
    assert variation[0] > 0.5
    assert variation[-1] < 0.1
    assert mixer.auxiliary_loss() == 0


def test_a_language_model_updates_all_its_routers():
    channels = {"moe": {"expert_bias": True, "bias_rate": 0.5}}
    lm = LanguageModel(
        LMConfig(vocab_size=11, d_model=32, pattern="attention/moe retention", depth=4, channels=channels)
    )
    lm(torch.randint(11, (2, 9)))[0].sum().backward()
    lm.update_routers()
    biases = {name: value for name, value in lm.state_dict().items() if name.endswith("expert_bias")}
    assert len(biases) == 2
    assert all(set(bias.tolist()) <= {-0.5, 0.0, 0.5} and bias.any() for bias in biases.values())


def test_losses_train_under_checkpointing_which_keeps_no_graph():
    mixer, x = moe(expert_bias=True, load_balance_weight=1.0), inputs()
    gradients = []
    for call in (plain, checkpointed):
        mixer.zero_grad()
        y = call(mixer, x)
        (y.square().sum() + mixer.auxiliary_loss()).backward()
        gradients.append([parameter.grad.clone() for parameter in mixer.parameters() if parameter.grad is not None])
    for a, b in zip(*gradients, strict=True):
        same(a, b)
    assert mixer._routing is not None
    assert mixer._routing.logits.grad_fn is None
    reentrant(mixer, x)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        mixer.auxiliary_loss()
    with torch.no_grad():
        assert mixer.auxiliary_loss() > 0


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_capacity_serves_the_earliest_first(factor):
    options = {"num_experts": 5, "top_k": 2, "hidden": 16}
    mixer, x = moe(**options, capacity_factor=factor), inputs(11, batch=3)
    capacity = math.ceil(factor * 33 * 2 / 5)
    served, dropped, expected = [0] * 5, 0, torch.zeros_like(x)
    for t in range(11):
        for b in range(3):
            p = F.softmax(mixer.router.weight @ x[b, t], dim=0)
            best = p.argsort(descending=True)[:2]
            for e in best.tolist():
                if served[e] < capacity:
                    served[e] += 1
                    hidden = F.silu(x[b, t] @ mixer.w_gate[e]) * (x[b, t] @ mixer.w_in[e])
                    expected[b, t] += p[e] / p[best].sum() * (hidden @ mixer.w_out[e])
                else:
                    dropped += 1
    y = mixer(x)
    same(y, expected)
    assert mixer.router_metrics()["dropped_share"] == pytest.approx(dropped / 66)
    assert dropped > 0
    y.sum().backward()
    assert mixer.router.weight.grad is not None
    assert mixer.router.weight.grad.isfinite().all()


@pytest.mark.parametrize(("factor", "served"), [(1e300, 20), (1e-9, 1), (1e-300, 1)])
def test_capacity_is_one_choice_to_all_of_them(factor, served):
    mixer = moe(num_experts=2, top_k=1, normalise_weights=False, capacity_factor=factor)
    with torch.no_grad():
        mixer.router.weight.zero_()
    mixer(inputs(10))
    assert mixer.router_metrics()["dropped_share"] == pytest.approx(1 - served / 20)


def test_capacity_rounds_up_and_not_for_rounding_errors():
    mixer = moe(num_experts=10, top_k=1, normalise_weights=False, capacity_factor=1.1)
    with torch.no_grad():
        mixer.router.weight.zero_()
    mixer(inputs(100, batch=1))
    assert mixer.router_metrics()["dropped_share"] == pytest.approx(0.89)  # 1.1 * 100 / 10 is 11.000000000000002
    mixer(inputs(101, batch=1))
    assert mixer.router_metrics()["dropped_share"] == pytest.approx(89 / 101)


def test_with_drops_later_tokens_change_nothing_but_the_length_does():
    mixer, x = moe(capacity_factor=0.5), inputs(20)
    y = mixer(x)
    changed = x.clone()
    changed[:, 12:] = inputs(8, seed=5)
    same(mixer(changed)[:, :12], y[:, :12])
    assert (mixer(x[:, :12]) - y[:, :12]).abs().max() > 1e-3
    assert (mixer(x[:1]) - y[:1]).abs().max() > 1e-3
    enough = moe(capacity_factor=4.0)  # E / k: room for all tokens in one expert
    same(enough(x), moe()(x))
    assert enough.router_metrics()["dropped_share"] == 0


LENGTHS = (9, 3, 5)
MASK = torch.arange(9) < torch.tensor(LENGTHS)[:, None]


@pytest.mark.parametrize("capacity", [None, 0.5])
@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_padding_counts_nowhere(router, capacity):
    """Rows with padding that a mask names, against the same tokens alone: what is asked of the router, and its room."""
    options = {"router": router, "expert_bias": True, "capacity_factor": capacity, "load_balance_weight": 0.5}
    x, results = inputs(9, batch=3), []
    padded = x.masked_fill(~MASK[..., None], 1e3)
    for call in ((x[MASK][None],), (padded, MASK)):
        mixer = moe(**options)
        y, metrics = mixer(*call), mixer.router_metrics()
        (0 * y.sum() + mixer.auxiliary_loss()).backward()
        assert mixer.router.load.sum() == sum(LENGTHS) * 2
        numbers = torch.tensor([*metrics.pop("load"), *metrics.values()], dtype=torch.float64)
        results.append([mixer.auxiliary_loss(), mixer.router.load.double(), mixer.router.weight.grad, numbers])
    for a, b in zip(*results, strict=True):
        same(a, b)


def test_padding_takes_no_room():
    mixer, x = moe(capacity_factor=0.5), inputs(9, batch=1)
    longer = torch.cat([x, inputs(40, batch=1, seed=2)], dim=1)
    same(mixer(longer, torch.arange(49)[None] < 9)[:, :9], mixer(x))
    assert (mixer(longer)[:, :9] - mixer(x)).abs().max() > 1e-3


def test_nothing_but_padding():
    mixer, x = moe(expert_bias=True), inputs()
    y = mixer(x, torch.zeros(2, 10, dtype=torch.bool))
    assert mixer.auxiliary_loss() == 0
    assert mixer.router_metrics() == {}
    (y.sum() + mixer.auxiliary_loss()).backward()
    assert mixer.router.load.count_nonzero() == 0


def test_a_padded_batch_of_a_model_is_a_packed_one():
    """Losses, loads and biases; an ignored target alone is no padding."""
    config = LMConfig(
        vocab_size=11, d_model=32, pattern="attention/moe mamba2/swiglu gla/moe", depth=3,
        channels={"moe": {"expert_bias": True, "bias_rate": 0.5}},
    )  # fmt: skip
    torch.manual_seed(0)
    padded, packed = LanguageModel(config).double(), LanguageModel(config).double()
    packed.load_state_dict(padded.state_dict())
    tokens = torch.randint(11, (3, 9))
    targets = torch.randint(11, (3, 9)).masked_fill(torch.rand(3, 9) < 0.3, -100)
    losses = [
        padded.loss(tokens, targets.masked_fill(~MASK, -100), token_mask=MASK),
        packed.loss(tokens[MASK][None], targets[MASK][None], cu_seqlens=[0, 9, 12, 17]),
    ]
    same(*losses)
    same(padded.auxiliary_loss(), packed.auxiliary_loss())
    assert {key: pytest.approx(value) for key, value in padded.router_metrics().items()} == packed.router_metrics()
    for model, loss in zip((padded, packed), losses, strict=True):
        (loss + model.auxiliary_loss()).backward()
        model.update_routers()
    for (name, a), b in zip(padded.named_parameters(), packed.parameters(), strict=True):
        assert a.grad is not None, name
        same(a.grad, b.grad)  # pyright: ignore[reportArgumentType]
    assert all(torch.equal(a, b) for a, b in zip(padded.buffers(), packed.buffers(), strict=True))
    without = LanguageModel(config).double()
    without.loss(tokens, targets.masked_fill(~MASK, -100)).backward()
    counts = [name for name, load in without.named_buffers() if "load" in name and load.sum() == 3 * 9 * 2]
    assert len(counts) == 2


@pytest.mark.parametrize("mask", [torch.ones(2, 10), torch.ones(2, 9, dtype=torch.bool), [[True] * 10] * 2])
def test_a_mask_of_another_kind_is_named(mask):
    stack = LanguageModel(LMConfig(vocab_size=11, d_model=32, pattern="gla", depth=1)).stack
    for call in (lambda x: moe()(x, mask), lambda x: stack(x.float(), token_mask=mask)):
        with pytest.raises(ValueError, match=r"token_mask is .*, expected torch.bool \[2, 10\], true for real tokens"):
            call(inputs())


@pytest.mark.parametrize("more", [{}, {"gated": False, "activation": "relu", "shared_hidden": 24}])
def test_flops_with_all_parts(more):
    mixer = moe(shared_experts=1, shared_gate=True, router="sigmoid", expert_bias=True, **more)
    with ops.use_backends(experts="parallel_torch"), FlopCounterMode(display=False) as counter:
        mixer(inputs())
    assert counter.get_total_flops() == mixer.flops(10, 2)


# of torch's compiler itself, where it meets any autograd.Function
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"expert_bias": True, "router": "sigmoid", "capacity_factor": 1.0}])
def test_compiles_whole(options):
    """Losses, counts and gradients included, and two forward passes before the backward."""
    mixer, x, before = moe(shared_experts=1, **options), inputs(), inputs(seed=2)
    results = []
    for call in (mixer, torch.compile(mixer, fullgraph=True, backend="aot_eager")):
        mixer.zero_grad()
        mixer.router.load.zero_()
        y = torch.cat([call(before), call(x, torch.arange(10).expand(2, -1) < 7)])
        (y.square().sum() + mixer.auxiliary_loss()).backward()
        gradients = [parameter.grad for parameter in mixer.parameters() if parameter.grad is not None]
        results.append([y.detach(), mixer.router.load.double(), *gradients])
    assert (results[0][1].sum() > 0) == bool(options)
    for a, b in zip(*results, strict=True):
        same(a, b)


def test_default_experts_cost_a_token_what_a_swiglu_does():
    for chosen, width in (({}, 2048), ({"top_k": 4}, 2048), ({"shared_experts": 2}, 2048), ({"gated": False}, 3072)):
        config = build_channel_mixer("moe", d_model=768, **chosen).config
        active = config.hidden_width * (config.top_k + config.shared_experts)
        assert width <= active <= width * 1.05


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"top_k": 9}, r"top_k must be 1 to num_experts \(8\), got 9"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"top_k": 1}, "its router cannot learn"),
        ({"shared_experts": -1}, "shared_experts must be at least 0, got -1"),
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"router_z_weight": -1.0}, "router_z_weight must be at least 0, got -1.0"),
        ({"router": "sigmoidal"}, "unknown router 'sigmoidal': expected one of sigmoid, softmax"),
        ({"shared_gate": True}, "got shared_experts=0"),
        ({"shared_hidden": 8}, r"shared_hidden \(8\) is that of shared experts, got shared_experts=0"),
        ({"activation": "sylu"}, "unknown activation 'sylu': expected one of gelu, .* Did you mean 'silu'"),
        ({"capacity_factor": 0.0}, "capacity_factor must be positive, got 0.0"),
        ({"bias_rate": 0.0}, "bias_rate must be positive, got 0.0"),
    ],
)
def test_wrong_options_are_named(chosen, message):
    with pytest.raises(ValueError, match=message):
        build_channel_mixer("moe", d_model=32, **chosen)
