"""The cache of states by what texts begin with: the right state, within its bytes, and used by a generator."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from seqarch.models import LanguageModel
from seqarch.serving import Generator
from seqarch.state import PrefixCache


def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(vocab_size=11, d_model=32, pattern="gated_delta_net attention", depth=2).double().eval()


def state_of(lm: LanguageModel, mark: int, length: int = 4) -> Any:
    """A state of so many tokens that can be told from others."""
    with torch.no_grad():
        return lm(torch.full((1, length), mark))[1]


def same(a: Any, b: Any) -> bool:
    return torch.equal(a[0][0].recurrent, b[0][0].recurrent)


def test_it_finds_what_a_search_of_all_texts_finds():
    """Random texts over three tokens, so that many share a beginning, against a dictionary, with little room."""
    lm, draws = model(), random.Random(0)
    marks = [state_of(lm, mark) for mark in range(11)]
    size = lm.state_bytes(4)
    cache, kept = PrefixCache(lm, 12 * size + 7, min_tokens=1), {}
    for _ in range(400):
        text = tuple(draws.randrange(3) for _ in range(draws.randrange(1, 9)))
        if draws.random() < 0.5:
            mark = draws.randrange(11)
            assert cache.insert(text, marks[mark])
            kept.pop(text, None)
            kept[text] = mark
            if len(kept) > 12:
                del kept[next(iter(kept))]
        else:
            count, state = cache.longest(text)
            known = [text[:n] for n in range(1, len(text) + 1) if text[:n] in kept]
            assert count == max(map(len, known), default=0)
            if count:
                assert same(state, marks[kept[known[-1]]])
                kept[known[-1]] = kept.pop(known[-1])
            shared = max((n for n in range(len(text) + 1) for each in kept if each[:n] == text[:n]), default=0)
            assert cache.shared(torch.tensor(text)) == shared
        assert (len(cache), cache.bytes) == (len(kept), len(kept) * size)
    cache.clear()
    assert (len(cache), cache.bytes, cache.longest([0])) == (0, 0, (0, None))


def test_a_state_that_is_given_out_may_be_consumed():
    lm = model()
    cache, state = PrefixCache(lm, 10**6, min_tokens=2), state_of(lm, 1, 3)
    assert cache.insert([1, 1, 1], state)
    for _ in range(2):
        count, found = cache.longest([1, 1, 1, 5])
        assert count == 3
        assert same(found, state)
        found[0][0].recurrent.zero_()
    assert not cache.insert([1], state)
    assert not PrefixCache(lm, lm.state_bytes(3) - 1, min_tokens=1).insert([1, 1, 1], state)
    with pytest.raises(ValueError, match="the state has 2 rows, expected 1"):
        cache.insert([1, 1, 1], lm.init_state(2))
    with pytest.raises(ValueError, match=r"max_bytes is float 1\.5, expected an int of at least 1"):
        PrefixCache(lm, 1.5)


def test_requests_read_what_they_have_in_common_once():
    """The second finds out how far it goes along with the first, and the third begins there. All continue as ever."""
    lm, source = model(), torch.Generator().manual_seed(0)
    common, *tails = (torch.randint(11, (n,), generator=source).tolist() for n in (40, 9, 8, 7, 6))
    prompts = [[*common, row, *tail] for row, tail in enumerate(tails)]
    cache = PrefixCache(lm, 10**7)
    generator = Generator(lm, prefix_cache=cache, prefill_tokens=25)
    requests = []
    for prompt in (*prompts, prompts[0], prompts[0]):
        requests.append(generator.submit(prompt, 5))
        generator.run()
    assert [request.reused for request in requests] == [0, 0, 40, 40, 40, len(prompts[0]) - 1]
    for prompt, request in zip((*prompts, prompts[0], prompts[0]), requests, strict=True):
        assert request.result().tolist() == lm.generate(prompt, 5)[0].tolist()
    lengths = [40, *map(len, prompts), len(prompts[0]) - 1]
    assert cache.bytes == sum(map(lm.state_bytes, lengths))
    with pytest.raises(ValueError, match="prefix_cache is of another model"):
        Generator(model(), prefix_cache=cache)
