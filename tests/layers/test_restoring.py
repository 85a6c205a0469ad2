"""A layer is what its state dict says: from the meta device, into garbage, by assignment, as a copy or a pickle."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqarch.layers import CHANNEL_MIXERS, MIXERS
from seqarch.models import LanguageModel, LMConfig
from tests.support.variants import VARIANTS

PATTERNS = [*MIXERS, *(f"attention/{channel}" for channel in CHANNEL_MIXERS)]
ROUTED = {"moe": {"expert_bias": True, "num_experts": 4, "bias_rate": 0.25}}
TOKENS = torch.arange(24).view(2, 12) % 11


def build(pattern: str, **options: Any) -> LanguageModel:
    options = {"channel": "none", "channels": ROUTED, "tie_embeddings": True} | options
    return LanguageModel(LMConfig(vocab_size=11, d_model=32, pattern=pattern, depth=1, **options))


def empty_like(model: LanguageModel) -> LanguageModel:
    with torch.device("meta"):
        return LanguageModel(model.config)


def into_garbage(model: LanguageModel) -> LanguageModel:
    other = empty_like(model)
    other.to_empty(device="cpu")
    for tensor in (*other.parameters(), *(value for name, value in other.named_buffers() if "load" not in name)):
        tensor.data.fill_(torch.nan)
    other.load_state_dict(model.state_dict())
    return other


def assigned(model: LanguageModel) -> LanguageModel:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = empty_like(model)
    other.load_state_dict(torch.load(file, weights_only=True), assign=True)
    return other


def pickled(model: LanguageModel) -> LanguageModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def converted(model: LanguageModel) -> LanguageModel:
    return model.double().float()


WAYS: list[Callable[[LanguageModel], LanguageModel]] = [assigned, converted, into_garbage, pickled]


def step(model: LanguageModel) -> list[Tensor]:
    """Logits, a step of training with the routers' biases, and logits after it."""
    before = model(TOKENS)[0]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    (model.loss(TOKENS[:, :-1], TOKENS[:, 1:]) + model.auxiliary_loss()).backward()
    optimiser.step()
    model.update_routers()
    return [before.detach(), model(TOKENS)[0].detach(), *(value.detach() for value in model.state_dict().values())]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_model_is_what_its_state_dict_says(pattern: str, tied: bool):
    torch.manual_seed(0)
    options = {} if tied else {"mixers": {name: given[0] for name, given in VARIANTS.items()}}
    original = build(pattern, tie_embeddings=tied, **options)
    others = [way(copy.deepcopy(original)) for way in WAYS]
    expected = step(original)
    for other in others:
        assert (other.head.weight is other.embedding.weight) == tied
        for a, b in zip(step(other), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_tensor_of_a_module_is_a_parameter_or_a_buffer_with_numbers_of_its_own(pattern: str):
    model = build(pattern)
    held = [(name, key) for name, m in model.named_modules() for key, value in vars(m).items() if is_tensors(value)]
    assert held == []
    memory = [parameter.untyped_storage().data_ptr() for parameter in model.parameters()]
    assert len({*memory}) == len(memory)
    kept = model.state_dict().keys()
    assert [name for name, _ in model.named_buffers() if name not in kept] == (
        ["stack.layers.0.channel.router.load"] if "moe" in pattern else []
    )


def is_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and any(map(is_tensors, value)))


def test_ties_hold_in_a_model_within_another_and_when_moved():
    model = build("attention")
    outer = nn.ModuleDict({"inner": model})
    with torch.device("meta"):
        other = nn.ModuleDict({"inner": build("attention")})
    other.load_state_dict(outer.state_dict(), assign=True)
    for each in (other, other.double(), other.to("meta"), other.to_empty(device="cpu"), copy.deepcopy(other)):
        inner = each["inner"]
        assert isinstance(inner, LanguageModel)
        assert inner.head.weight is inner.embedding.weight
    free = build("attention", tie_embeddings=False)
    free.load_state_dict(model.state_dict())
    assert free.head.weight is not free.embedding.weight


def test_a_state_dict_with_two_weights_for_a_tie_is_refused():
    free, tied = build("attention", tie_embeddings=False), build("attention")
    with pytest.raises(RuntimeError, match=r"embedding.weight and head.weight are one parameter .* but differ here"):
        tied.load_state_dict(free.state_dict())
    lost = {name: torch.full_like(value, torch.nan) for name, value in tied.state_dict().items()}
    tied.load_state_dict(lost)


def test_counts_of_a_router_move_with_it():
    model = build("attention/moe")
    model.loss(TOKENS, TOKENS).backward()
    router = model.get_submodule("stack.layers.0.channel.router")
    counts = router.get_buffer("load").clone()
    assert counts.sum() == TOKENS.numel() * 2
    assert torch.equal(model.double().to(torch.bfloat16).get_submodule("stack.layers.0.channel.router").load, counts)  # pyright: ignore[reportArgumentType]


def test_a_bias_of_experts_is_wide_however_it_was_stored():
    model = build("attention/moe")
    stored = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    with torch.device("meta"):
        other = build("attention/moe")
    other.load_state_dict(stored, assign=True)
    router = other.get_submodule("stack.layers.0.channel.router")
    assert (router.weight.dtype, router.expert_bias.dtype) == (torch.bfloat16, torch.float32)  # pyright: ignore[reportAttributeAccessIssue]
