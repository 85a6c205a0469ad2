"""Speculative decoding: the tokens, their distribution and the state are those of plain decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from seqarch.layers import MIXERS
from seqarch.models import LanguageModel
from seqarch.models.sampling import GenerationOptions
from seqarch.serving import PromptLookup, speculate
from seqarch.serving.speculative import judged
from seqarch.state import Checkpoints, StateError


class Wrong:
    """Proposes what is no token."""

    def propose(self, tokens: Sequence[int], count: int) -> tuple[list[int], None]:
        return [20] * count, None


SLOW = pytest.mark.slow
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


def model(pattern: str = "gated_delta_net attention", depth: int = 2, seed: int = 0, **options: Any) -> LanguageModel:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 11, "d_model": 32} | options
    return LanguageModel(pattern=pattern, depth=depth, **sizes).double().eval()


def tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]


class Oracle:
    """Proposes the right tokens, but for every third."""

    def __init__(self, text: Sequence[int]):
        self.text = text

    def propose(self, tokens: Sequence[int], count: int) -> tuple[list[int], None]:
        at = range(len(tokens), min(len(tokens) + count, len(self.text)))
        return [(self.text[i] + (i % 3 == 0)) % 11 for i in at], None


OPTIONS = [{}, {"repetition_penalty": 1.3}, {"stop_sequences": [[4, 4]], "stop_token": 8}]
LATER = [pytest.param(options, count, marks=pytest.mark.slow) for options in OPTIONS for count in (1, 4)]


@pytest.mark.parametrize(("options", "count"), [({}, 3), *LATER], ids=str)
def test_greedy_decoding_is_plain_decoding(options: dict[str, Any], count: int):
    lm, new = model(), 15
    plain = lm.generate(PROMPT, new, **options)[0]
    drafts = {"model": model("gla", 1), "lookup": PromptLookup(), "oracle": Oracle(plain.tolist()), "itself": model()}
    for name, draft in drafts.items():
        got = speculate(lm, PROMPT, new, draft=draft, draft_tokens=count, **options)
        assert torch.equal(got.tokens, plain), name
        assert got.passes <= len(plain) - len(PROMPT)
        if name == "itself" and len(plain) == len(PROMPT) + new:
            assert got.accepted == got.proposed == new - got.passes
        if name == "oracle" and (options, count) == ({}, 3):
            assert 0 < got.accepted < got.proposed
            assert got.passes < new / 2 + 1


@pytest.mark.parametrize("pattern", ["gated_delta_net attention", *(pytest.param(n, marks=SLOW) for n in MIXERS)])
def test_the_state_is_to_the_bit_that_of_plain_decoding(pattern: str):
    lm = model(pattern, len(pattern.split()))
    plain = lm.generate(PROMPT, 12)[0].tolist()
    with torch.no_grad():
        state = lm(torch.tensor([PROMPT[:-1]]), lm.init_state(1))[1]
        for token in plain[len(PROMPT) - 1 : -1]:
            state = lm(torch.tensor([[token]]), state)[1]
    exact = speculate(lm, PROMPT, 12, draft=Oracle(plain), exact_state=True)
    assert 0 < exact.accepted < exact.proposed
    assert exact.tokens.tolist() == plain
    assert len(tensors(exact.state)) == len(tensors(state))
    close = 1e-12 if pattern == "hyena" else 0  # its filters depend in their last bits on how many are computed at once
    for a, b in zip(tensors(exact.state), tensors(state), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=close)
    quick = speculate(lm, PROMPT, 12, draft=Oracle(plain))
    assert quick.tokens.tolist() == plain
    more = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(lm(more, quick.state)[0], lm(more, state)[0], rtol=0, atol=1e-12)


def test_judged_proposals_have_the_distribution_of_the_model():
    """By chi squared over 800 draws of three tokens, from a draft that is sure of the wrong things, and from one that
    always says the same. What an option rules out never comes.
    """
    source, count = torch.Generator().manual_seed(0), 800
    logits, other = (2 * torch.randn(3, 4, generator=source) for _ in range(2))
    options = GenerationOptions(max_new_tokens=3, temperature=1.3, top_k=3, generator=source)
    p, q = options.probabilities(logits), options.probabilities(other)
    for certain in (False, True):
        counts = torch.zeros(3, 4)
        for _ in range(count):
            proposed = [1, 2] if certain else torch.multinomial(q[:2], 1, generator=source)[:, 0].tolist()
            taken = judged(options, logits, [0], proposed, None if certain else q[:2])
            for place, token in enumerate(taken):
                counts[place, token] += 1
        assert 0 < counts[2].sum() < counts[1].sum() < counts[0].sum() == count
        assert counts[p == 0].sum() == 0
        expected = p * counts.sum(1, keepdim=True)
        statistic = ((counts - expected) ** 2 / expected)[p > 0].sum()
        assert statistic < 22.46, "the 99.9th percentile of chi squared with 6 degrees of freedom"


@pytest.mark.slow
def test_sampled_texts_have_the_distribution_of_plain_sampling():
    """Of three tokens together, by chi squared over 250 draws, against the probabilities that the model gives them."""
    sizes = {"vocab_size": 3, "embedding_std": 1.0}
    lm, prompt = model("gla", 1, **sizes), [0, 1, 2, 0, 1]
    texts = torch.cartesian_prod(*[torch.arange(3)] * 3)
    with torch.no_grad():
        whole = torch.cat([torch.tensor(prompt).expand(27, -1), texts], dim=1)
        steps = (lm(whole[:, :-1])[0][:, -3:] / 1.3).softmax(-1)
    expected = steps.gather(-1, texts[..., None]).prod(1)[:, 0] * 250
    for draft in (model("gla", 1, seed=1, **sizes), PromptLookup()):
        source, counts, accepted = torch.Generator().manual_seed(0), torch.zeros(27), 0
        for _ in range(250):
            got = speculate(lm, prompt, 3, draft=draft, draft_tokens=2, generator=source, temperature=1.3)
            counts[int(got.tokens[-3:] @ torch.tensor([9, 3, 1]))] += 1
            accepted += got.accepted
        assert 0 < accepted < 500
        statistic = ((counts - expected) ** 2 / expected).sum()
        assert statistic < 54.05, "the 99.9th percentile of chi squared with 26 degrees of freedom"


@torch.no_grad()
def test_tokens_are_taken_back_as_if_they_had_never_been_read():
    lm, text = model(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 1]
    for calls in ([1] * 12, [5, 1, 1, 5]):
        for count in (0, 1, 6, 12):
            read, expected = Checkpoints(lm, every=3, keep=9), lm.init_state(1)
            at = 0
            for size in calls:
                read.read(text[at : at + size])
                part = text[at : min(at + size, 12 - count)]
                if part:
                    expected = lm.features(torch.tensor([part]), expected)[1]
                at += size
            read.rollback(count)
            assert read.length == 12 - count
            assert all(torch.equal(a, b) for a, b in zip(tensors(read.state), tensors(expected), strict=True))
            again = read.read([7, 7])
            torch.testing.assert_close(again, lm(torch.tensor([[*text[: 12 - count], 7, 7]]))[0][0, -2:])


def test_what_cannot_be_taken_back_is_refused():
    read = Checkpoints(model(), every=2, keep=2)
    for token in range(9):
        read.read([token])
    assert (read.length, read.oldest) == (9, 6)
    before = [tensor.clone() for tensor in tensors(read.state)]
    for count in (4, -1, 1.5):
        with pytest.raises(StateError, match=r"expected 0 to 3: the oldest of 2 checkpoints is after 6 of 9 tokens"):
            read.rollback(count)
    assert all(torch.equal(a, b) for a, b in zip(tensors(read.state), before, strict=True))
    read.rollback(3)
    with pytest.raises(StateError, match="expected 0 to 0"):
        read.rollback(1)
    with pytest.raises(ValueError, match="Checkpoints: the state has 2 rows, expected 1"):
        Checkpoints(model(), model().init_state(2))


def test_a_wrong_draft_or_prompt_is_named():
    lm = model()
    wrong = [
        (PROMPT, {"draft": model(vocab_size=12)}, "the draft has a vocabulary of 12 tokens, expected 11, as the model"),
        (PROMPT, {"draft": Oracle([20] * 30), "draft_tokens": 0}, "draft_tokens is int 0, expected an int of at least"),
        ([[1], [2]], {"draft": lm}, "2 prompts were given, expected one"),
    ]
    for prompt, given, message in wrong:
        with pytest.raises(ValueError, match=f"speculate: {message}"):
            speculate(lm, prompt, 5, **given)
    with pytest.raises(
        ValueError, match="PromptLookup: longest is int 2 and shortest int 3, expected ints of at least"
    ):
        PromptLookup(longest=2, shortest=3)
    with pytest.raises(ValueError, match=r"the draft proposed \[20.*\], expected at most 4 tokens below 11"):
        speculate(lm, PROMPT, 5, draft=Wrong())
