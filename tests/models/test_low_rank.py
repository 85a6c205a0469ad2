"""Adapters on projections and on heads of a role, and parameters that are named: what learns, and what is merged."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from seqarch import LanguageModel
from seqarch.layers import CHANNEL_MIXERS, MIXERS
from seqarch.models.low_rank import LoraAdapters
from seqarch.models.optimisation import train_only
from seqarch.testing import assert_close, error
from seqarch.testing.laws import FLOAT64_ERROR

TOKENS = torch.randint(31, (2, 13), generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, dict[str, Any]] = {
    "moba": {"block_size": 4},
    "dsa": {"top_k": 3},
    "sparse_mla": {"top_k": 3},
    "mla": {"q_lora_rank": 5},
    "lolcats": {"window": 4},
    "nsa": {"compressed_length": 4, "compressed_stride": 2, "block_size": 4, "window": 8},
}
ALL = " ".join(map("/".join, zip(MIXERS, [*CHANNEL_MIXERS, *["none"] * len(MIXERS)], strict=False)))


def model_of(pattern: str, **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    mixers = {name: OPTIONS[name] for name in OPTIONS if name in pattern}
    sizes = {"vocab_size": 31, "d_model": 32, "depth": len(pattern.split()), "channel": "none", "mixers": mixers}
    return LanguageModel(pattern=pattern, **{**sizes, **options}).double()


def adapted(model: LanguageModel, rank: int, alpha: float, targets: Sequence[str] = (), names: Sequence[str] = ()):
    """Its adapters, beside which only what is named learns."""
    train_only(model, names)
    return LoraAdapters(model, rank, alpha, targets)


@torch.no_grad()
def with_numbers(adapters: LoraAdapters) -> LoraAdapters:
    """As they are after some training: what starts at 0 is not any more."""
    for name, tensor in adapters.tensors().items():
        if "/up" in name:
            tensor.normal_(std=0.1)
    return adapters


def logits(model: LanguageModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS)[0]


@pytest.mark.parametrize(
    "pattern", ["mamba2/moe nsa/swiglu rg_lru/mlp", pytest.param(ALL, marks=pytest.mark.slow, id="all mixers")]
)
@pytest.mark.parametrize("targets", [(), ("q", "k", "v", "o")], ids=["projections", "roles"])
def test_adapters_change_nothing_at_first_learn_alone_and_merge_to_the_bit(pattern, targets):
    model = model_of(pattern)
    kept = copy.deepcopy(model)
    adapters = adapted(model, 3, 6.0, targets)
    assert torch.equal(logits(model), logits(kept))
    with_numbers(adapters)
    (model.train().loss(TOKENS, TOKENS) + model.auxiliary_loss()).backward()
    learning = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert [name for name, each in learning.items() if each.grad is None or not each.grad.any()] == []
    assert sum(each.numel() for each in learning.values()) == adapters.num_parameters
    assert all(each.grad is None for each in model.parameters() if not each.requires_grad)
    assert error(logits(model), logits(kept)) > 0.001
    plain = copy.deepcopy(kept)
    plain.load_state_dict(adapters.merged())
    assert torch.equal(logits(plain), logits(model))
    kept_state = kept.state_dict()
    assert adapters.plain().keys() == kept_state.keys()
    assert all(torch.equal(tensor, kept_state[name]) for name, tensor in adapters.plain().items())


def test_a_change_is_the_papers():
    """``W + (alpha / r) B A`` (Hu et al. 2021, equation 3) of a role: of q, k and v rows, of o columns."""
    model = model_of("attention", mixers={"attention": {"num_heads": 4, "num_kv_heads": 2}})
    before = model.state_dict()
    adapters = with_numbers(adapted(model, 2, 5.0, ["q", "v", "o"]))
    inside = "stack.layers.0.mixers.0"
    parts, merged = adapters.tensors(), adapters.merged()
    joined, out = f"{inside}.qkv_proj.linear.weight", f"{inside}.out_proj.weight"
    assert set(parts) == {f"{name}/{part}" for name, count in ((joined, 2), (out, 1)) for part in (
        "base", *(f"{side}.{i}" for side in ("down", "up") for i in range(count)))}  # fmt: skip
    assert adapters.num_parameters == 2 * ((32 + 32) + (32 + 16) + (32 + 32))
    expected = before[joined].clone()
    expected[:32] += 2.5 * parts[f"{joined}/up.0"] @ parts[f"{joined}/down.0"]
    expected[48:] += 2.5 * parts[f"{joined}/up.1"] @ parts[f"{joined}/down.1"]
    assert_close(merged[joined], expected, FLOAT64_ERROR, "q and v")
    assert torch.equal(merged[joined][32:48], before[joined][32:48])
    assert_close(merged[out], before[out] + 2.5 * parts[f"{out}/up.0"] @ parts[f"{out}/down.0"], FLOAT64_ERROR, "o")


def test_columns_of_two_mixers_in_one_map_are_changed_by_themselves():
    model = model_of("mamba2")
    adapters = adapted(model, 2, 2.0, ["o", "v"])
    shapes = {name.rpartition("mixers.0.")[2]: list(each.shape) for name, each in adapters.tensors().items()}
    assert shapes["in_proj.weight/up.0"] == [64, 2]
    assert shapes["in_proj.weight/down.0"] == [2, 32]
    assert shapes["out_proj.weight/down.0"] == [2, 64]


def test_under_autocast_it_is_what_is_merged():
    model = model_of("attention").float()
    adapters = with_numbers(adapted(model, 2, 2.0))
    plain = model_of("attention").float()
    plain.load_state_dict(adapters.merged())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model), logits(plain))


def test_taken_off_the_model_is_as_without():
    model = model_of("attention/mlp")
    names = [name for name, _ in model_of("attention/mlp").named_parameters()]
    adapters = with_numbers(adapted(model, 2, 2.0))
    changed = logits(model)
    with adapters.taken_off():
        assert [name for name, _ in model.named_parameters()] == names
        assert torch.equal(logits(model), logits(model_of("attention/mlp")))
    assert torch.equal(logits(model), changed)
    learning = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert learning == adapters.num_parameters


def test_parameters_are_named():
    model = model_of("mamba2 attention")
    chosen = train_only(model, ["head", "*.mixers.0.out_proj", "stack.layers.1.*norm*"])
    learning = {name for name, each in model.named_parameters() if each.requires_grad}
    assert learning == set(chosen)
    assert {"head.weight", *(f"stack.layers.{i}.mixers.0.out_proj.weight" for i in (0, 1))} <= learning
    tied = model_of("attention", tie_embeddings=True)
    train_only(tied, ["head"])
    assert [name for name, each in tied.named_parameters() if each.requires_grad] == ["embedding.weight"]
    adapters = adapted(both := model_of("attention/mlp"), 2, 2.0, ["attention"], ["embedding", "*.channel"])
    learning = {name.split(".parametrizations")[0] for name, each in both.named_parameters() if each.requires_grad}
    assert {name.partition(".")[0] for name in learning} == {"embedding", "stack"}
    assert {name for name in learning if ".channel." in name} == {
        name for name in adapters.unchanged() if ".channel." in name
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1.0), "rank is 0, expected at least 1"),
        (
            (2, 1.0, ["q_proj"]),
            "'q_proj' matches nothing in the model; .* attention, mamba2, .* out_proj, .*k, o, q, v",
        ),
        ((2, 1.0, ["mamba2", "qkv_proj"]), "no layer mamba2 has a projection qkv_proj"),
        ((2, 1.0, [], ["heads"]), "'heads' names no parameter; .* begin with embedding, head, norm, stack"),
        ((2, 1.0, ["o"], ["*.out_proj"]), r"mixers.0.out_proj.weight learns itself, and is to have an adapter"),
    ],
)
def test_what_cannot_be_is_named(arguments, message):
    model = model_of("mamba2 attention")
    with pytest.raises(ValueError, match=message):
        adapted(model, *arguments)


def test_models_without_adapters_are_refused():
    scaled = model_of("attention", mup_base_width=16, mixers={"attention": {"head_dim": 8, "num_heads": 4}})
    with pytest.raises(ValueError, match="mup_base_width, by which adapters have no learning rate"):
        adapted(scaled, 2, 1.0)
    shared = model_of("attention(share=a)/mlp attention(share=a)/mlp")
    with pytest.raises(ValueError, match=r"out_proj.weight belongs to several layers \(share\): .* without att"):
        adapted(shared, 2, 1.0)
    adapted(shared, 2, 1.0, ["mlp"])


def test_adapters_go_with_a_model_to_another_dtype():
    model = model_of("gla attention").float()
    adapters = with_numbers(adapted(model, 2, 4.0, names=["norm"]))
    model.double()
    with torch.no_grad():
        model.norm.weight.mul_(2)
    merged, other = adapters.merged(), model_of("gla attention")
    assert {each.dtype for each in merged.values()} == {torch.float64}
    other.load_state_dict(merged)
    assert torch.equal(logits(other), logits(model))


def test_nothing_is_left_to_learn_in_silence():
    model = model_of("gla")
    train_only(model, ["norm"])
    with pytest.raises(ValueError, match="'head' names only weights that do not learn"):
        train_only(model, ["head"])
    assert [name for name, each in model.named_parameters() if each.requires_grad] == ["norm.weight"]
