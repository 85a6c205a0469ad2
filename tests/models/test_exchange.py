"""What a layer gives to later ones: RWKV-7's first values, keys and values, the stack's input, and wrong ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from seqarch.layers import MIXERS, measured_state_bytes, register_mixer
from seqarch.layers.attention.base import Place
from seqarch.layers.linear_attention.linear_attention import LinearAttention
from seqarch.layers.modules.rotary import apply_rotary
from seqarch.models import LanguageModel, Stack
from seqarch.ops.index_topk import flops as index_flops
from seqarch.testing import assert_close
from tests.support.one_token import COMPILED
from tests.support.stack_laws import checkpointing_changes_nothing, holds_the_laws

RWKV7 = "rwkv7(value_residual=give) mamba rwkv7(value_residual=take)+attention rwkv7(value_residual=take)"
HEADS = {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "qkv_bias": True}
OPTIONS: dict[str, Any] = {
    "mixers": {"rwkv7": {"num_heads": 2, "value_rank": 4}, "attention": HEADS, "sliding_window": HEADS},
    "channel": "swiglu",
}
SHARED = (
    "attention(give_kv=all)+sliding_window(window=4, give_kv=last) mamba sliding_window(window=3, take_kv=last)"
    " attention(take_kv=all)+sliding_window(window=6, take_kv=all)"
)


class Shown(LinearAttention):
    """Linear attention of its input and of what the stack was given; it gives its own output."""

    gives = ("shown",)
    takes = ("input",)

    def exchange(
        self, x: Tensor, state: Any, cu_seqlens: Any, taken: Mapping[str, Tensor]
    ) -> tuple[Tensor, Any, Mapping[str, Tensor]]:
        y, state = self.mix(x + 2 * taken["input"], state, cu_seqlens)
        return y, state, {"shown": y}


class Second(Shown):
    gives = ()
    takes = ("shown",)

    def exchange(self, x: Tensor, state: Any, cu_seqlens: Any, taken: Mapping[str, Tensor]) -> Any:
        return *self.mix(x * taken["shown"], state, cu_seqlens), {}


@pytest.fixture(autouse=True)
def own_mixers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("seqarch.layers.MIXERS", MIXERS)
    before = dict(MIXERS)
    register_mixer("shown", Shown)
    register_mixer("second", Second)
    yield
    MIXERS.clear()
    MIXERS.update(before)


def stack(pattern: str, depth: int, **options: Any) -> Stack:
    torch.manual_seed(0)
    return Stack(d_model=32, pattern=pattern, depth=depth, **{**OPTIONS, **options}).double()


def written_out(model: Stack, x: Tensor, stream: Tensor) -> Tensor:
    """RWKV7 layer by layer, the values of the first handed on by hand."""
    first, mamba, beside, last = (layer for layer in model.layers)
    values: Any = None
    for layer in (first, mamba, beside, last):
        own: Any = layer
        outputs = []
        for mixer in own.mixers:
            y, _, given = mixer(own.norm(stream), None, None, {"first_value": values})
            values = given.get("first_value", values)
            outputs.append(y)
        weights = [1.0] if own.branch_weights is None else own.branch_weights
        stream = stream + sum(weight * y for weight, y in zip(weights, outputs, strict=True))
        stream = stream + own.channel(own.channel_norm(stream))
    return stream


def test_first_values_reach_the_layers_that_take_them():
    model, x = stack(RWKV7, 4), torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    y, state = model(x)
    expected = written_out(model, x, x)
    assert_close(y, expected, 1e-12)
    inputs = [x, *model.parameters()]
    found, right = (torch.autograd.grad(each.sin().sum(), inputs) for each in (y, expected))
    for own, other in zip(found, right, strict=True):
        assert_close(own, other, 1e-10)
    first: Any = model.layers[0]
    plain = stack(RWKV7.replace("(value_residual=give)", "").replace("(value_residual=take)", ""), 4)
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all("value_gate" in name for name in missing)
    assert len(missing) == 6
    assert first.mixers[0].gives == ("first_value",)
    assert measured_state_bytes(state) == model.state_bytes(9, 2) == plain.state_bytes(9, 2)
    added = sum(m.value_gate[0].weight.numel() + m.value_gate[2].weight.numel()  # type: ignore[union-attr, index]
                for m in (model.layers[2].mixers[0], model.layers[3].mixers[0]))  # type: ignore[union-attr, index]  # fmt: skip
    assert model.flops(9, 2) - plain.flops(9, 2) == 2 * 18 * added


@pytest.mark.parametrize("pattern", [RWKV7, SHARED, "shown mamba second shown+second", "mamba shown rwkv7 second"])
def test_stacks_that_hand_tensors_on_hold_the_laws(pattern: str):
    """Split anywhere, packed as separate, at some places, a token at a time, compiled, checkpointed."""
    model = stack(pattern, 4)
    holds_the_laws(model)
    checkpointing_changes_nothing(stack(pattern, 4), 1e-10)
    assert model.float().explain_one_token() == [COMPILED] * 4


def test_keys_and_values_of_an_earlier_layer_are_read_and_not_held():
    torch.manual_seed(0)
    model, x = stack("attention(give_kv=a) mamba attention(take_kv=a, window=5)", 3), torch.randn(2, 9, 32).double()
    layers: list[Any] = [*model.layers]
    first, middle, last = layers
    giver, taker = first.mixers[0], last.mixers[0]
    y, state = model(x)
    before, (held,) = first(x, (None,), None, handed={})[:2]
    before, _ = middle(before, (None,), None)
    keys, values = (each.repeat_interleave(2, dim=2) for each in held.cache[:2])
    (q,), _ = taker.project(last.norm(before), None, giver_place(9))
    scores = torch.einsum("bihk,bjhk->bhij", q, keys) * 8**-0.5
    apart = torch.arange(9)[:, None] - torch.arange(9)
    weights = scores.masked_fill((apart < 0) | (apart >= 5), -torch.inf).softmax(-1)
    read = torch.einsum("bhij,bjhk->bihk", weights, values).flatten(2)
    expected = before + taker.out_proj(read)
    expected = expected + last.channel(last.channel_norm(expected))
    assert_close(y, expected, 1e-12)
    both = stack("attention mamba attention(window=5)", 3)
    assert model.state_bytes(1000, 2) == measured_state_bytes(state) - giver.state_bytes(9, 2) + giver.state_bytes(
        1000, 2
    )
    assert both.state_bytes(1000, 2) - model.state_bytes(1000, 2) == both.layers[2].mixers[0].state_bytes(1000, 2)  # type: ignore[union-attr, index]
    saved = 2 * 32 * 16  # weights of its keys and values, 2 heads of 8 channels each
    assert sum(p.numel() for p in both.parameters()) - sum(p.numel() for p in model.parameters()) == saved + 2 * 16 + 8
    assert both.flops(9, 2) - model.flops(9, 2) == 2 * 18 * saved
    assert giver.cache_shape == (2, 8, 8)


INDEXED = (
    "dsa(give_index=a) mamba dsa(take_index=a)+sparse_mla(take_index=a)"
    " sparse_mla(give_index=b)+sparse_mla(take_index=a)"
)
INDEXERS: dict[str, Any] = {
    "dsa": {"top_k": 4, "num_heads": 4, "num_kv_heads": 2, "index_heads": 3, "index_width": 8},
    "sparse_mla": {"top_k": 4, "num_heads": 2, "q_lora_rank": 8, "index_width": 16},
}


def indexed(pattern: str, depth: int) -> Stack:
    return stack(pattern, depth, mixers=INDEXERS)


def test_stacks_that_hand_index_lists_on_hold_the_laws():
    holds_the_laws(indexed(INDEXED, 4))
    checkpointing_changes_nothing(indexed(INDEXED, 4), 1e-10)


def test_index_lists_of_an_earlier_layer_are_read_and_no_indexer_is_held():
    model, x = indexed("dsa(give_index=a) mamba dsa(take_index=a)", 3), torch.randn(2, 9, 32).double()
    layers: list[Any] = [*model.layers]
    giver, taker = layers[0].mixers[0], layers[2].mixers[0]
    read = torch.randn(2, 9, 32).double()
    _, _, given = giver(x, None, None, {})
    y, held, more = taker(read, None, None, given)
    assert not more
    # the same softmax over the tokens that the giver chose, query by query
    (q, k, v), _ = taker.qkv_proj(read)
    q, k = (apply_rotary(each, torch.arange(9)) for each in (q, k))
    (choice,) = given["index lists 'a'"]
    for row, t in ((0, 8), (1, 6), (1, 2)):
        seen = [s for s in choice.tokens[row, t].tolist() if s >= 0]
        assert len(seen) == min(4, t + 1)
        o = [(k[row, seen, h // 2] @ q[row, t, h] / 8**0.5).softmax(0) @ v[row, seen, h // 2] for h in range(4)]
        assert_close(y[row, t], taker.out_proj(torch.cat(o)), 1e-12)
    # its loss teaches the giver's indexer
    named = {**dict(giver.named_parameters()), **{f"own {n}": p for n, p in taker.named_parameters()}}
    assert not any("index" in name for name, _ in taker.named_parameters())
    gradients = torch.autograd.grad(taker.auxiliary_loss(), list(named.values()), allow_unused=True)
    learns = [name for name, each in zip(named, gradients, strict=True) if each is not None and each.any()]
    assert learns == [name for name in named if name.startswith("index_")]
    # neither keys, parameters nor FLOPs of an indexer of its own
    both = indexed("dsa mamba dsa", 3)
    _, state = model(x)
    assert type(state[2][0])._fields == type(held)._fields == ("cache",)
    assert measured_state_bytes(state) == model.state_bytes(9, 2) == both.state_bytes(9, 2) - 2 * 9 * 8 * 8
    indexer = 32 * (3 * 8 + 8 + 3)
    assert sum(p.numel() for p in both.parameters()) - sum(p.numel() for p in model.parameters()) == indexer + 2 * 8
    for length in (3, 9):  # up to top_k tokens nothing is chosen
        scores = index_flops(length, length, 3, 8, 2) if length > 4 else 0
        assert both.flops(length, 2) - model.flops(length, 2) == 2 * 2 * length * indexer + scores
    assert both.step_flops(8, 2) - model.step_flops(8, 2) == 2 * 2 * indexer + index_flops(1, 9, 3, 8, 2)


def giver_place(length: int) -> Place:
    return Place(torch.arange(length)[None], length, None)


def test_what_a_stack_was_given_is_its_input():
    model, x = stack("2*mamba shown/none", 3), torch.randn(2, 9, 32, dtype=torch.float64)
    before = x
    for layer in model.layers[:2]:  # type: ignore[union-attr]
        before, _ = layer(before, (None,), None)
    last: Any = model.layers[2]
    assert_close(
        model(x)[0],
        before + last.mixers[0].mix(last.norm(before) + 2 * x, last.mixers[0].init_state(2, dtype=x.dtype), None)[0],
        1e-12,
    )


def test_a_language_model_generates_with_them():
    torch.manual_seed(0)
    model = LanguageModel(vocab_size=17, d_model=32, pattern=RWKV7, depth=4, **OPTIONS)
    prompt = torch.randint(17, (1, 6))
    found = model.generate(prompt.tolist(), max_new_tokens=5, temperature=0)[0]
    tokens = prompt
    with torch.no_grad():
        for _ in range(5):
            tokens = torch.cat([tokens, model(tokens)[0][:, -1:].argmax(-1)], dim=1)
    assert found.tolist() == tokens[0].tolist()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("rwkv7(value_residual=take)", "stack: layer 0: Rwkv7 takes first_value, which no earlier layer gives"),
        ("mamba rwkv7(value_residual=take)+rwkv7(value_residual=give)", "layer 1: Rwkv7 takes first_value, which no"),
        ("2*rwkv7(value_residual=give)", None),
        (
            "rwkv7(value_residual=give)+rwkv7(value_residual=give)",
            "layer 0: Rwkv7 gives first_value, as a mixer beside",
        ),
        ("attention(take_kv=a)", "layer 0: Attention takes keys and values 'a', which no earlier layer gives"),
        (
            "attention(give_kv=a) attention(take_kv=a, num_kv_heads=4)",
            "layer 1: Attention takes what Attention gives, but it has kv_heads=4, expected 2 as",
        ),
        (
            "attention(give_kv=a) attention(take_kv=a, rotary_base=5.0)",
            r"it has rotary_base=5\.0, expected 10000\.0 as",
        ),
        (
            "sliding_window(give_kv=a, window=4) attention(take_kv=a)",
            "its window is None, expected at most the 4 tokens that 'a' holds",
        ),
        ("attention(give_kv=a, take_kv=b)", "give_kv .'a'. and take_kv .'b'.: expected one of them"),
        ("attention(take_kv=a, conv_width=3)", "has no state for a short convolution: conv_width is 3"),
        ("dsa(take_index=a)", "layer 0: DSA takes index lists 'a', which no earlier layer gives"),
        (
            "dsa(give_index=a) sparse_mla(take_index=a, top_k=8)",
            "layer 1: SparseMLA takes what DSA gives, but its top_k is 8, expected 2048 as 'a' chooses",
        ),
        (
            "dsa(give_index=a, index_loss_weight=0) dsa(take_index=a)",
            r"its index_loss_weight is 1\.0, expected 0 as the indexer of 'a' does not learn",
        ),
        ("dsa(give_index=a, take_index=b)", "give_index .'a'. and take_index .'b'.: expected one of them"),
        ("rwkv7(value_residual=always)", "unknown value_residual 'always': expected one of give, none, take"),
    ],
)
def test_what_nobody_gives_is_named(pattern: str, message: str | None):
    depth = 2 if " " in pattern or "*" in pattern else 1
    if message is None:
        assert len(stack(pattern, depth).layers) == 2
        return
    with pytest.raises(ValueError, match=message):
        stack(pattern, depth)
