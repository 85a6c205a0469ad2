"""Log-likelihoods and continuations: the same numbers however requests are grouped, packed and read in parts."""

from __future__ import annotations

import random

import pytest
import torch

from experiments.harness import scoring
from experiments.harness.scoring import Sampling, Scorer
from seqarch import LanguageModel
from seqarch.checkpoints.tokenizers import ByteTokenizer

PATTERNS = ["mamba2 attention", "gated_delta_net sliding_window/moe", "mamba rwkv7", "hyena"]
PROMPTS = [tuple(random.Random(0).choices(range(97, 107), k=length)) for length in (1, 2, 9, 33)]


def model_of(pattern: str) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(vocab_size=256, d_model=64, pattern=pattern, depth=2, embedding_std=1.0).double().eval()
    model.tokenizer = ByteTokenizer()
    return model


def requests() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Contexts with one and with several continuations, of several lengths, and one request twice."""
    draw = random.Random(1)
    ends = [tuple(draw.choices(range(97, 107), k=length)) for length in (1, 1, 3, 20)]
    made = [(context, end) for context in PROMPTS for end in ends[: 1 if len(context) == 9 else 4]]
    draw.shuffle(made)
    return [*made, made[0]]


def one_by_one(model: LanguageModel, context: tuple[int, ...], end: tuple[int, ...]) -> tuple[float, bool]:
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *end]]))[0][0, len(context) - 1 : -1]
    expected = torch.tensor(end)
    values = logits.log_softmax(-1).gather(-1, expected[:, None])
    return float(values.sum()), bool((logits.argmax(-1) == expected).all())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_log_likelihoods_are_those_of_each_request_alone(pattern, monkeypatch):
    model, asked = model_of(pattern), requests()
    expected = [one_by_one(model, *pair) for pair in asked]
    read = []
    for share, most_tokens, batch_size in ((True, 16_384, 8), (False, 16_384, 3), (True, 7, 2)):
        monkeypatch.setattr(scoring, "MOST_TOKENS", most_tokens)
        scorer = Scorer(model, batch_size, share)
        found = scorer.log_likelihoods(asked)
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=0, abs=1e-10)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        read.append(scorer.tokens_read)
    assert read[0] == read[2] < 0.7 * read[1]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_continuations_are_those_of_each_context_alone(pattern):
    model = model_of(pattern)
    plain = {context: model.generate([[*context]], 12)[0].tolist()[len(context) :] for context in PROMPTS}
    texts = {context: bytes(tokens).decode(errors="replace") for context, tokens in plain.items()}
    stops = {context: text[5:7] for context, text in texts.items()}
    asked = [(context, Sampling(max_new_tokens=12)) for context in (*PROMPTS, PROMPTS[2])]
    asked += [(context, Sampling(until=(stops[context], "no such"), max_new_tokens=12)) for context in PROMPTS]
    expected = [texts[context] for context in (*PROMPTS, PROMPTS[2])]
    expected += [texts[context][: texts[context].find(stops[context])] for context in PROMPTS]
    assert Scorer(model).continuations(asked, []) == expected
    end = plain[PROMPTS[3]][4]
    first = plain[PROMPTS[3]].index(end)
    assert Scorer(model).continuations([(PROMPTS[3], Sampling(max_new_tokens=12))], [end]) == [
        bytes(plain[PROMPTS[3]][:first]).decode(errors="replace")
    ]


def test_sampling_draws_from_what_it_is_asked_to():
    model = model_of(PATTERNS[0])
    greedy = Scorer(model).continuations([(PROMPTS[3], Sampling(max_new_tokens=6))], [])
    alike = [
        Sampling(max_new_tokens=6, temperature=5.0, top_k=1),
        Sampling(max_new_tokens=6, temperature=5.0, top_p=1e-9),
    ]
    for how in alike:
        assert Scorer(model).continuations([(PROMPTS[3], how)], []) == greedy
    torch.manual_seed(0)
    free = Sampling(max_new_tokens=6, temperature=5.0)
    drawn = Scorer(model).continuations([(PROMPTS[3], free)] * 4, [])
    assert len({*drawn}) == 4
