"""A model of seqarch in the hands of ``transformers``: logits, losses, padding, states, generation, embeddings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache

import seqarch.interop.hf as hf
from seqarch import LanguageModel
from seqarch.layers import FAMILIES, MIXERS
from seqarch.layers.mixer import measured_state_bytes
from seqarch.testing import assert_close, error

BOUND = 1e-5
SHORT: dict[str, dict[str, Any]] = {
    "attention": {"conv_width": 3},
    "dsa": {"top_k": 3},
    "sparse_mla": {"top_k": 3},
    "big_bird": {"block_size": 2},
    "longformer": {"window": 3},
    "lolcats": {"window": 3},
    "moba": {"block_size": 2},
    "nsa": {"compressed_length": 4, "compressed_stride": 2, "block_size": 4, "window": 3},
    "sliding_window": {"window": 3},
}
"""Options by which the mixers of blocks and windows have several in a short text."""

MASK = torch.tensor(
    [[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 0, 0, 0], [0] * 7, [0, 0, 0, 0, 0, 0, 1], [1, 1] + [0] * 5]
)
"""Padding before, none, on both sides, a row of nothing else, all but one token, after."""


def model_of(pattern: str, **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    mixers = {name: SHORT[name] for name in SHORT if name in pattern}
    depth = options.pop("depth", len(pattern.split()))
    return LanguageModel(
        **{"vocab_size": 31, "d_model": 32, "mixers": mixers, "pattern": pattern, "depth": depth, **options}
    ).eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(1))


def check_padding(model: LanguageModel, bound: float = BOUND) -> None:
    """Each row of a padded batch is what it is alone, and so are the states after it, by what comes next."""
    wrapped, given, more = hf.wrap(model), tokens(*MASK.shape), tokens(len(MASK), 4)
    out = wrapped(given, attention_mask=MASK)
    state: Any = out.past_key_values
    assert (state.get_seq_length(), state.batch_size) == (7, len(MASK))
    dense = wrapped(given, attention_mask=MASK, use_cache=False)
    assert dense.past_key_values is None
    later = wrapped(
        more[:, :3], attention_mask=torch.cat([MASK, torch.ones_like(more[:, :3])], 1), past_key_values=state
    )
    last = wrapped(more[:, 3:], past_key_values=later.past_key_values)
    for i, real in enumerate(MASK.bool()):
        for logits in (out.logits, dense.logits):
            alone = model(given[i : i + 1, real])[0][0]
            assert not real.any() or error(logits[i, real], alone) <= bound, f"row {i}"
            assert not logits[i, ~real].any()
        whole = model(torch.cat([given[i, real], more[i]])[None])[0][0, -4:]
        assert_close(torch.cat([later.logits[i], last.logits[i]]), whole, bound, f"after row {i}")


QUICK = {members[0] for members in FAMILIES.values()}
"""A mixer of each family; rows of unequal prompts, which padding is made of, ``models/test_rows.py`` has for all."""


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MIXERS])
@torch.no_grad()
def test_padded_rows_are_as_each_alone(name: str):
    check_padding(model_of(name, channel="none"))


@torch.no_grad()
def test_padded_rows_of_a_hybrid_with_experts_are_as_each_alone():
    model = model_of("mamba2/moe attention+gated_delta_net/swiglu sliding_window/mlp", logit_cap=5.0)
    check_padding(model)
    check_padding(model.double(), 1e-12)
    narrow = hf.wrap(model.to(torch.bfloat16))
    given = narrow(tokens(*MASK.shape), attention_mask=MASK).logits
    assert given.dtype == torch.bfloat16
    alone = narrow(tokens(*MASK.shape)[:1, 3:]).logits
    assert_close(given[:1, 3:].float(), alone.float(), 2e-2, "bfloat16")


@torch.no_grad()
def test_calls_are_those_of_the_model_and_states_go_on():
    model = model_of("mamba2 attention")
    wrapped, given = hf.wrap(model), tokens(2, 9)
    whole, after = model(given)
    out = wrapped(given, attention_mask=torch.ones_like(given))
    assert torch.equal(out.logits, whole)
    cache: Any = out.past_key_values
    assert cache.state_bytes() == measured_state_bytes(after)
    assert len(cache) == 2
    first = wrapped(given[:, :5]).past_key_values
    assert_close(wrapped(given[:, 5:], past_key_values=first).logits, whole[:, 5:], BOUND, "in two calls")
    assert_close(wrapped(given, logits_to_keep=2).logits, whole[:, -2:], BOUND, "the last two")
    assert_close(wrapped(given, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]], BOUND, "two")
    as_tuple = wrapped(given, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], whole)
    assert wrapped(given, use_cache=False).past_key_values is None
    assert wrapped.train()(given).past_key_values is None
    assert wrapped(given, use_cache=True).past_key_values is not None
    one = wrapped.eval()(given[:1, :1])
    assert_close(one.logits, whole[:1, :1], BOUND, "one token")
    empty = wrapped(given[:, :0])
    assert empty.logits.shape == (2, 0, 31)
    assert torch.equal(wrapped(given, past_key_values=empty.past_key_values).logits, whole)


def test_the_loss_is_theirs_with_the_layers_own_terms_in_training():
    model = model_of("mamba2/moe attention", channels={"moe": {"load_balance_weight": 0.1}})
    wrapped, given = hf.wrap(model), tokens(3, 9)
    labels = given.masked_fill(torch.rand(3, 9) < 0.3, -100)
    logits = wrapped(given).logits
    counted = (labels[:, 1:] != -100).sum()
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert torch.equal(
        wrapped(given, labels=labels).loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    )
    assert_close(wrapped(given, labels=labels, num_items_in_batch=50).loss, total / 50, BOUND, "a part of 50")
    padded = torch.ones_like(given).masked_fill(torch.arange(9) < torch.tensor([[0], [2], [4]]), 0)
    masked = labels.masked_fill(padded == 0, -100)
    apart = sum(
        F.cross_entropy(model(row[None, keep.bool()])[0][0, :-1], wanted[keep.bool()][1:], reduction="sum")
        for row, wanted, keep in zip(given, masked, padded, strict=True)
    )
    loss = wrapped(given, attention_mask=padded, labels=masked, num_items_in_batch=1).loss
    assert_close(loss, apart, BOUND, "padded")
    wrapped.train()
    trained = wrapped(given, labels=labels, num_items_in_batch=counted * 4).loss
    extra = model.auxiliary_loss()
    assert float(extra.detach()) > 0
    assert_close(trained, total / (4 * counted) + extra / 4, BOUND, "in four parts")
    assert_close(wrapped(given, labels=labels).loss, total / counted + model.auxiliary_loss(), BOUND, "at once")


def test_sequences_packed_into_a_row_know_nothing_of_one_another():
    model = model_of("gated_delta_net attention")
    wrapped, given = hf.wrap(model).train(), tokens(1, 9)
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4]])
    expected = torch.cat([model(each)[0] for each in given.split([3, 1, 5], dim=1)], dim=1)
    assert_close(wrapped(given, position_ids=positions).logits, expected, BOUND, "by positions")
    ends = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    both: dict[str, Any] = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 5, "max_length_k": 5}
    assert_close(wrapped(given, position_ids=positions, **both).logits, expected, BOUND, "by boundaries")
    numbers = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2]])
    assert_close(wrapped(given, seq_idx=numbers).logits, expected, BOUND, "by numbers")
    head = wrapped.base_model(input_ids=given, position_ids=positions, use_cache=False, return_dict=True)
    assert_close(model.logits(head.last_hidden_state), expected, BOUND, "without the head")
    assert wrapped.eval()(given, position_ids=positions).past_key_values is None
    padded = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
    counted = (padded.cumsum(1) - 1).clamp(min=0)
    assert_close(wrapped(given, padded, counted).logits[:, 2:], model(given[:, 2:])[0], BOUND, "padded")


def greedy(model: LanguageModel, prompt: Any, count: int) -> list[list[int]]:
    return [row[-count:].tolist() for row in model.generate(prompt, count)]


@pytest.mark.parametrize("pattern", ["mamba2 attention", "gated_delta_net/moe sliding_window", "hyena rwkv7"])
def test_generation_is_that_of_the_model(pattern: str):
    model = model_of(pattern, embedding_std=1.0)
    wrapped, given = hf.wrap(model), tokens(3, 6)
    out = wrapped.generate(given, max_new_tokens=7, do_sample=False)
    assert out[:, 6:].tolist() == greedy(model, given, 7)
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]
    padded = torch.tensor([[0] * (5 - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (5 - len(row)) + [1] * len(row) for row in prompts])
    for use_cache in (True, False):
        out = wrapped.generate(padded, attention_mask=mask, max_new_tokens=7, do_sample=False, use_cache=use_cache)
        assert out[:, 5:].tolist() == greedy(model, prompts, 7), use_cache
    out = wrapped.generate(padded, attention_mask=mask, max_new_tokens=7, do_sample=False, prefill_chunk_size=None)
    torch.manual_seed(3)
    sampled = wrapped.generate(given, max_new_tokens=7, do_sample=True, top_k=0, temperature=0.7)
    torch.manual_seed(3)
    again = wrapped.generate(given, max_new_tokens=7, do_sample=True, top_k=0, temperature=0.7, use_cache=False)
    assert torch.equal(sampled, again)
    assert not torch.equal(sampled, wrapped.generate(given, max_new_tokens=7, do_sample=False))


def beams(model: LanguageModel, prompt: list[int], width: int, count: int) -> list[int]:
    """The likeliest continuation that a search finds which scores all of each beam anew."""
    kept: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(count):
        longer = []
        for score, row in kept:
            logits = model(torch.tensor([prompt + row]))[0][0, -1].log_softmax(-1)
            longer += [(score + float(value), [*row, token]) for token, value in enumerate(logits)]
        kept = sorted(longer, reverse=True)[:width]
    return kept[0][1]


@pytest.mark.parametrize("pattern", ["attention mamba2", "sliding_window+kda min_gru"])
@torch.no_grad()
def test_beams_carry_their_states_along(pattern: str):
    """Padded prompts, and states that grow: rows are chosen anew after each token."""
    model = model_of(pattern, embedding_std=1.0)
    wrapped, prompts = hf.wrap(model), [[1, 2, 3, 4], [5, 6]]
    padded, mask = torch.tensor([prompts[0], [0, 0, *prompts[1]]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    out = wrapped.generate(padded, attention_mask=mask, num_beams=3, max_new_tokens=5, do_sample=False)
    expected = [beams(model, prompt, 3, 5) for prompt in prompts]
    assert out[:, 4:].tolist() == expected
    assert expected != greedy(model, prompts, 5)
    several = wrapped.generate(padded, attention_mask=mask, num_beams=3, num_return_sequences=3, max_new_tokens=5)
    assert several[::3, 4:].tolist() == expected
    assert len({tuple(row) for row in several.tolist()}) == 6


@torch.no_grad()
def test_caches_are_chosen_by_rows_and_go_on_in_generation():
    model = model_of("attention mamba2")
    wrapped, given = hf.wrap(model), tokens(3, 6)
    cache: Any = wrapped(given).past_key_values
    chosen = copy.deepcopy(cache)
    chosen.batch_select_indices(torch.tensor([2, 0]))
    chosen.batch_repeat_interleave(2)
    assert chosen.batch_size == 4
    expected = wrapped(torch.cat([given, given], 1)[[2, 2, 0, 0]]).logits[:, 6:]
    assert_close(wrapped(given[[2, 2, 0, 0]], past_key_values=chosen).logits, expected, BOUND, "chosen")
    kept = copy.deepcopy(cache)
    kept.batch_select_indices(torch.tensor([False, True, False]))
    assert kept.batch_size == 1
    kept.reset()
    assert (kept.get_seq_length(), kept.batch_size, kept.state_bytes(), len(kept)) == (0, -1, 0, 0)
    longer = torch.cat([given, tokens(3, 8)[:, 6:]], 1)
    out = wrapped.generate(longer, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert out[:, 8:].tolist() == greedy(model, longer, 4)
    out = wrapped.generate(given, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert out.past_key_values.get_seq_length() == 9
    with pytest.raises(ValueError, match=r"a state cannot forget tokens: crop\(2\) was called"):
        out.past_key_values.crop(2)
    out.past_key_values.crop(0)


def test_embeddings_are_had_set_tied_and_resized():
    for tied in (False, True):
        model = model_of("mamba2", tie_embeddings=tied)
        wrapped, given = hf.wrap(model), tokens(2, 5)
        before = wrapped(given).logits
        assert wrapped.get_input_embeddings() is model.embedding
        assert wrapped.get_output_embeddings() is model.head
        wrapped.resize_token_embeddings(40, mean_resizing=False)
        assert (model.config.vocab_size, wrapped.config.vocab_size, wrapped.vocab_size) == (40, 40, 40)
        assert (model.head.weight is model.embedding.weight) == tied
        assert_close(wrapped(given).logits[..., :31], before, BOUND, "resized")
        assert wrapped(given.fill_(39), labels=given).logits.shape[-1] == 40
        assert model.loss(given, given).isfinite()
        wrapped.resize_token_embeddings(20)
        assert model.head.weight.shape == (20, 32)


@pytest.mark.parametrize(
    "pattern",
    [
        "attention/moe mamba2 gated_delta_net",
        "dsa(give_index=a)/moe(share=e) mamba2 dsa(take_index=a)/moe(share=e)",
    ],
)
def test_gradients_of_layers_that_are_computed_again_are_the_same(pattern: str):
    model = model_of(pattern, channels={"moe": {"load_balance_weight": 0.1}}).train()
    wrapped, given = hf.wrap(model), tokens(2, 9)
    mask = torch.ones_like(given).index_fill(1, torch.tensor([0, 1]), 0)

    def gradients() -> list[Tensor]:
        wrapped.zero_grad()
        wrapped(given, attention_mask=mask, labels=given.masked_fill(mask == 0, -100)).loss.backward()
        return [parameter.grad.clone() for parameter in wrapped.parameters()]  # type: ignore[union-attr]

    calls = []
    model.stack.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    plain = gradients()
    assert len(calls) == 1
    for every, again in ((1, 2), (2, 1)):
        wrapped.activation_checkpointing_enable(every_n_layers=every)
        assert wrapped.is_activation_checkpointing
        calls.clear()
        for a, b in zip(gradients(), plain, strict=True):
            assert_close(a, b, BOUND, "gradient")
        assert len(calls) == again
    assert wrapped.eval().generate(given, max_new_tokens=3).shape == (2, 12)
    cache = wrapped(given).past_key_values
    with pytest.raises(
        ValueError, match="a state is consumed by the call that is given it, and gradient checkpointing"
    ):
        wrapped.train()(given, past_key_values=cache)
    wrapped.activation_checkpointing_disable()
    assert not wrapped.is_activation_checkpointing
    calls.clear()
    gradients()
    assert len(calls) == 1
    model.stack.schedule = lambda *_: None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="gradient checkpointing: the stack has a schedule of its own"):
        wrapped.activation_checkpointing_enable()


def test_what_is_wrong_is_one_error_that_names_it():
    wrapped, given = hf.wrap(model_of("mamba2 attention")), tokens(2, 5)
    cache = wrapped(given).past_key_values
    other = hf.wrap(model_of("gated_delta_net attention"))(given).past_key_values
    three = hf.wrap(model_of("mamba2 attention mamba2"))(given).past_key_values
    holes, ones = torch.tensor([[1] * 5, [1, 0, 1, 1, 1]]), torch.ones_like(given)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"input_ids": None}, "input_ids are None, expected integers"),
        ({"input_ids": given.float()}, r"input_ids are torch\.float32 \[2, 5\], expected integers \[B, T\]"),
        ({"input_ids": given + 31}, "language model: tokens has entries from .*, expected 0 to 30"),
        ({"labels": given[:, 1:]}, r"labels are torch\.int64 \[2, 4\], expected torch\.int64 \[2, 5\], as input_ids"),
        ({"labels": given.int()}, r"labels are torch\.int32 \[2, 5\], expected torch\.int64 \[2, 5\]"),
        ({"labels": given, "logits_to_keep": 1}, "logits_to_keep is int 1 beside labels, which need all logits"),
        ({"attention_mask": holes}, "attention_mask has padding between the tokens of row 1, expected it before or"),
        ({"attention_mask": ones[:, 1:]}, r"attention_mask is \[2, 4\], expected \[2, 5\]$"),
        ({"attention_mask": ones[:, None, None]}, r"attention_mask is \[2, 1, 1, 5\], expected \[2, 5\]$"),
        ({"attention_mask": ones * 2}, "attention_mask has numbers that are neither 0 nor 1"),
        ({"attention_mask": ones[:, 1:], "past_key_values": cache}, r"expected \[2, 5\] or \[2, 10\]$"),
        ({"past_key_values": other}, r"Mamba2: state\.conv is of shape \[2, 3, 96\], expected \[2, 3, 320\]"),
        ({"past_key_values": three}, "the state is of 3 layers, expected 2"),
        ({"past_key_values": DynamicCache()}, "past_key_values is DynamicCache, expected a SeqarchCache"),
        ({"past_key_values": cache, "use_cache": False}, "past_key_values were given with use_cache=False"),
        ({"input_ids": given[:1], "past_key_values": cache}, "the state has 2 rows, the call 1 sequences"),
        ({"position_ids": torch.arange(5)[None].expand(2, 5) + 1}, "position_ids do not count the tokens one by one"),
        ({"position_ids": torch.tensor([[0, 1, 0, 1, 2]] * 2)}, "position_ids do not count the tokens one by one"),
        ({"position_ids": torch.ones(2, 5)}, r"position_ids are torch\.float32 \[2, 5\], expected integers \[2, 5\]"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 5])}, "2 sequences are packed into 2 rows, expected one row"),
        ({"seq_idx": torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 1, 1]])}, "2 sequences are packed into 2 rows"),
        (
            {"input_ids": given[:1], "cu_seq_lens_q": torch.tensor([0, 2, 5]), "use_cache": True},
            "sequences packed into one row leave a state each: expected use_cache=False",
        ),
        ({"inputs_embeds": torch.zeros(2, 5, 32)}, "inputs_embeds was given, and a model of seqarch neither takes nor"),
        ({"output_hidden_states": True}, "output_hidden_states was given"),
        ({"output_attentions": True}, "output_attentions was given"),
    ]
    for given_too, message in wrong:
        with pytest.raises(ValueError, match=message):
            wrapped(**{"input_ids": given, **given_too})
    mask = torch.tensor([[1] * 5, [1, 1, 1, 1, 0]])
    with pytest.raises(
        ValueError, match="generate: row 1 of attention_mask ends with padding, expected padding on the"
    ):
        wrapped.generate(given, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"generate: input_ids are \[2, 0\], expected at least one token a row"):
        wrapped.generate(given[:, :0], max_new_tokens=2)
    with pytest.raises(ValueError, match="generate: cache_implementation is 'static', expected None"):
        wrapped.generate(given, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(
        ValueError, match="assisted generation is not supported with stateful models, such as SeqarchForCausalLM"
    ):
        wrapped.generate(given[:1], max_new_tokens=2, assistant_model=wrapped)
    with pytest.raises(ValueError, match="SeqarchForCausalLM: got dict"):
        hf.SeqarchForCausalLM({"d_model": 3})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="SeqarchConfig: format is 9, and this version of seqarch reads 1"):
        hf.SeqarchConfig(format=9)
    with pytest.raises(ValueError, match="unknown mixer 'mamba22'"):
        AutoModelForCausalLM.from_config(
            hf.SeqarchConfig(model={"vocab_size": 3, "d_model": 8, "pattern": "mamba22", "depth": 1})
        )
