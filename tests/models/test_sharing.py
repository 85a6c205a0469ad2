"""Mixers and channel mixers that layers share: the same numbers once, adapters and states of each occurrence."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from seqarch.layers import measured_state_bytes
from seqarch.models import LanguageModel, LayerPattern, Stack, dequantize, parse_pattern, quantize, weight_bytes
from seqarch.testing import assert_close
from tests.support.one_token import COMPILED
from tests.support.stack_laws import holds_the_laws

PATTERN = (
    "attention(share=a, adapter_rank=3)/swiglu(share=m) mamba2"
    " attention(share=a, adapter_rank=2, adapted=[qkv_proj])/swiglu(share=m, adapter_rank=2) attention"
)
OPTIONS: dict[str, Any] = {
    "depth": 4,
    "d_model": 32,
    "mixers": {"attention": {"num_heads": 4}, "mamba2": {"head_dim": 16, "d_state": 8}},
}


def model(pattern: str = PATTERN) -> LanguageModel:
    torch.manual_seed(0)
    made = LanguageModel(vocab_size=31, pattern=pattern, **OPTIONS)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def parts(stack: Any) -> tuple[Any, Any]:
    return tuple((stack.layers[i].mixers[0], stack.layers[i].channel) for i in (0, 2))  # type: ignore[return-value]


def tied(made: LanguageModel) -> bool:
    (first, channel), (later, later_channel) = parts(made.stack)
    return (
        first.qkv_proj.linear.inner.weight is later.qkv_proj.linear.inner.weight
        and first.out_proj.inner.weight is later.out_proj.weight
        and channel.in_proj.weight is later_channel.in_proj.inner.weight
    )


def test_numbers_are_shared_and_adapters_and_states_are_not():
    """Against the same stack with layers of their own, given the shared numbers and the adapters merged into them."""
    shared, tokens = model(), torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(1))
    plain = LanguageModel(vocab_size=31, pattern="attention mamba2 attention attention", **OPTIONS).eval()
    weights = dict(shared.state_dict(keep_vars=True))
    merged: dict[str, Tensor] = {}
    for name in plain.state_dict():
        of_first = name.replace("layers.2.mixers", "layers.0.mixers").replace("layers.2.channel.", "layers.0.channel.")
        adapted = [key.removesuffix("down.0.weight") for key in weights if key.endswith("down.0.weight")]
        inner = of_first if of_first in weights else of_first.replace("weight", "inner.weight")
        merged[name] = weights[inner]
        if (own := name.removesuffix("weight")) in adapted:
            rows = [key.removeprefix(own) for key in weights if key.startswith(f"{own}up.")]
            ups, downs = ([weights[own + row.replace("up", kind)] for row in rows] for kind in ("up", "down"))
            merged[name] = merged[name] + torch.cat([up @ down for up, down in zip(ups, downs, strict=True)])
    expected, _ = torch.func.functional_call(plain, merged, (tokens,))
    logits, state = shared(tokens)
    assert_close(logits, expected, 1e-6)
    leaves = list(shared.parameters())
    for own, other in zip(*(torch.autograd.grad(y.sin().sum(), leaves) for y in (logits, expected)), strict=True):
        assert own.any()
        assert_close(own, other, 1e-5)
    assert shared.num_parameters() == sum(tensor.numel() for tensor in shared.state_dict().values()) < 50_000
    assert measured_state_bytes(state) == shared.state_bytes(9, 2) == plain.state_bytes(9, 2)
    adapters = sum(tensor.numel() for name, tensor in weights.items() if ".up." in name or ".down." in name)
    assert shared.flops(9, 2) - plain.flops(9, 2) == 2 * 18 * adapters  # each occurrence counts, and its adapters
    assert shared.stack.explain_one_token() == [COMPILED] * 4
    with torch.no_grad():
        stepped, state = [], shared.init_state(2)
        for token in tokens.split(1, dim=1):
            out, state = shared(token, state)
            stepped.append(out)
        assert_close(torch.cat(stepped, 1), expected, 1e-5)
        assert_close(shared(tokens[:1], None, [0, 4, 9])[0][:, 4:], shared(tokens[:1, 4:])[0], 1e-5)


def test_shared_tensors_stay_one(tmp_path: Any):
    made, tokens = model(), torch.randint(31, (1, 9), generator=torch.Generator().manual_seed(1))
    copied, pickled = copy.deepcopy(made), pickle.loads(pickle.dumps(made))
    with torch.device("meta"):
        empty, assigned = LanguageModel(made.config), LanguageModel(made.config)
    empty.to_empty(device="cpu").load_state_dict(made.state_dict())
    assigned.load_state_dict(made.state_dict(), assign=True)
    made.save_pretrained(tmp_path / "saved")
    read = LanguageModel.from_pretrained(tmp_path / "saved")
    assert read.config == made.config
    expected = made(tokens)[0]
    for other in (made, copied, pickled, empty.eval(), assigned.eval(), read, copy.deepcopy(made).double().float()):
        assert tied(other)
        assert torch.equal(other(tokens)[0], expected)
        assert other.state_dict().keys() == made.state_dict().keys()
    more = made.state_dict() | {"stack.layers.2.mixers.0.out_proj.weight": torch.zeros(32, 32)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"stack\.layers\.2\.mixers\.0\.out_proj\.weight"'):
        made.load_state_dict(more)
    assert parse_pattern(str(parse_pattern(PATTERN)[2])) == [parse_pattern(PATTERN)[2]]
    assert parse_pattern(PATTERN)[2] != LayerPattern(("attention",), "swiglu")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("attention(share=a) attention(share=a, window=4)", r"attention\(share=a\) has other options than its first"),
        ("attention(adapter_rank=4)", "attention: share is None, expected a name, as adapters belong to shared layers"),
        ("attention(share=3)", "attention: share is int 3, expected a name"),
        ("attention(share=a, adapter_rank=0)", "attention: adapter_rank is int 0, expected an int of at least 1"),
        (
            "attention(share=a, adapted=[qkv_proj])",
            "attention: adapted is .*expected names of parts, beside an adapter",
        ),
        ("attention(share=a, adapter_rank=2, adapted=[qkv])", "adapted names 'qkv', expected a part with linear maps"),
        (
            "attention/moe(share=a, adapter_rank=2)",
            "adapter_rank is 2, but MixtureOfExperts has no linear maps to adapt",
        ),
    ],
)
def test_what_cannot_be_shared_is_named(pattern: str, message: str):
    with pytest.raises(ValueError, match=message):
        Stack(d_model=32, pattern=pattern, depth=1 + pattern.count(" attention"))


def test_layers_share_experts_and_their_router(tmp_path: Any):
    """Universal transformers of experts: one router, whose bias moves by the choices of all layers together."""
    torch.manual_seed(0)
    options = {"num_experts": 4, "top_k": 2, "expert_bias": True, "bias_rate": 0.1, "hidden": 32}
    made = LanguageModel(
        vocab_size=31, d_model=32, pattern="mamba2/moe(share=e) gla/moe(share=e)", depth=4, channels={"moe": options}
    )
    first, *others = made.stack.channels().values()
    assert all(other.w_in is first.w_in and other.router.load is first.router.load for other in others)
    tokens = torch.randint(31, (2, 10), generator=torch.Generator().manual_seed(1))
    (made.loss(tokens[:, :-1], tokens[:, 1:]) + made.auxiliary_loss()).backward()
    assert first.router.load.sum() == 4 * 2 * 18
    assert first.router.weight.grad.any()
    load = first.router.load.clone()
    made.update_routers()
    assert_close(first.router.expert_bias, 0.1 * torch.sign(load.double().mean() - load).float(), 1e-6)
    assert not first.router.load.any()
    logits = made.eval()(tokens)[0]
    made.save_pretrained(tmp_path / "saved")
    for read in (
        LanguageModel.from_pretrained(tmp_path / "saved"),
        LanguageModel.from_pretrained(tmp_path / "saved", experts_in_memory=2),
        copy.deepcopy(made).double().float(),
    ):
        with torch.no_grad():
            assert_close(read.eval()(tokens)[0], logits, 1e-6)
    few = LanguageModel.from_pretrained(tmp_path / "saved", experts_in_memory=2)
    assert len(few.expert_store.layers) == 1


def test_quantised_layers_share_on(tmp_path: Any):
    """Codes are there once, in files too; plain weights are shared again afterwards."""
    torch.manual_seed(0)
    pattern = "attention(share=a, adapter_rank=3)/moe(share=e) mamba2 attention(share=a)/moe(share=e) mamba2"
    made = LanguageModel(vocab_size=31, pattern=pattern, **OPTIONS, channels={"moe": {"num_experts": 4}}).eval()
    tokens, names, before = torch.randint(31, (1, 9)), made.state_dict().keys(), weight_bytes(made)
    quantize(made, "int8", group_size=32, keep="*.up.*")
    assert weight_bytes(made) < 0.5 * before
    made.save_pretrained(tmp_path / "saved")
    read = LanguageModel.from_pretrained(tmp_path / "saved")
    for model in (made, read, copy.deepcopy(made)):
        (first, experts), (later, later_experts) = parts(model.stack)
        assert first.out_proj.inner.codes is later.out_proj.codes
        assert experts.w_in.codes is later_experts.w_in.codes
        assert weight_bytes(model) == weight_bytes(made)
        assert_close(model(tokens)[0], made(tokens)[0], 1e-5)
    plain = dequantize(read)
    assert plain.state_dict().keys() == names
    (first, experts), (later, later_experts) = parts(plain.stack)
    assert first.out_proj.inner.weight is later.out_proj.weight
    assert experts.w_in is later_experts.w_in
    assert_close(plain(tokens)[0], made(tokens)[0], 1e-5)


HYBRID = "zamba2"


def test_a_mixer_of_parts_shares_some_and_holds_the_laws():
    """Zamba 2's: attention and MLP are shared, Mamba-2 is not, and the stack's input is handed to all."""
    torch.manual_seed(0)
    block = {"with_input": True, "attention": {"num_heads": 2}, "mamba2": {"head_dim": 16, "d_state": 4}, "hidden": 24}
    own = "(share=a, adapter_rank=2, adapted=[channel.in_proj])"
    options: dict[str, Any] = {"mixers": {HYBRID: block}, "norm_placements": {HYBRID: "none"}}
    stack = Stack(
        d_model=32, pattern=f"{HYBRID}{own} mamba2 {HYBRID}{own}", depth=3, channel="none", **options
    ).double()
    parts: list[Any] = [stack.layers[i].mixers[0] for i in (0, 2)]  # type: ignore[union-attr, index]
    first, later = parts
    assert first.attention.out_proj.weight is later.attention.out_proj.weight
    assert first.attention_norm.weight is later.attention_norm.weight
    for name in ("after", "mamba2_norm", "mamba2.in_proj"):
        assert first.get_submodule(name).weight is not later.get_submodule(name).weight
    holds_the_laws(stack)
    x = torch.randn(1, 12, 32, dtype=torch.float64)
    y, after = stack(x)
    assert measured_state_bytes(after) == stack.state_bytes(12)
    single = stack.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(single(x.float())[0].float(), y.float(), 0.05)
    with pytest.raises(ValueError, match="Zamba2: it takes input from an earlier layer of a stack"):
        first(x)
