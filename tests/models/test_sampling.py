"""Options of generation: as in ``transformers``, and by their effect on what a model continues with."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from seqarch.models import LanguageModel
from seqarch.models.sampling import GenerationOptions

PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8, 10]]


def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(vocab_size=11, d_model=32, pattern="gated_delta_net attention", depth=2).double()


THEIRS = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "logits_processors": lambda processors: processors[0],
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
"""In the order in which they come there."""


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_k": 90},
        {"temperature": 1.5, "top_p": 0.6},
        {"temperature": 1.3, "min_p": 0.2},
        {"temperature": 1.0, "repetition_penalty": 1.4},
        {"temperature": 0.8, "repetition_penalty": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 1.2, "logits_processors": [NoRepeatNGramLogitsProcessor(2)], "repetition_penalty": 1.1},
    ],
    ids=lambda options: " ".join(options),
)
def test_probabilities_are_those_of_transformers(given: dict[str, Any]):
    torch.manual_seed(0)
    logits, tokens = 3 * torch.randn(64, 50), torch.randint(50, (64, 30))
    theirs = LogitsProcessorList([make(given[name]) for name, make in THEIRS.items() if name in given])
    expected = theirs(tokens, logits.clone()).softmax(-1)
    options = GenerationOptions(max_new_tokens=1, **given)
    got = options.probabilities(options.adjusted(logits, list(tokens)))
    assert torch.equal(got > 0, expected > 0)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_a_penalty_and_processors_see_prompt_and_new_tokens():
    """Also where prompts differ in length, and in greedy decoding: each row continues as it would alone."""
    lm, seen = model(), []

    def never_twice(tokens: Tensor, logits: Tensor) -> Tensor:
        seen.append(tokens[0].tolist())
        return logits.index_fill(1, tokens[0], -torch.inf)

    together = lm.generate(PROMPTS, 2, logits_processors=[never_twice])
    assert seen == [*PROMPTS, *(row[:-1].tolist() for row in together)]
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert not set(prompt) & set(row[len(prompt) :].tolist())
        assert torch.equal(row, lm.generate(prompt, 2, logits_processors=[never_twice])[0])
    penalised = lm.generate(PROMPTS, 2, repetition_penalty=1e9)
    assert any(not torch.equal(a, b) for a, b in zip(penalised, lm.generate(PROMPTS, 2), strict=True))


def test_any_of_several_tokens_or_sequences_ends_a_row():
    lm = model()
    free = [row[len(prompt) :].tolist() for prompt, row in zip(PROMPTS, lm.generate(PROMPTS, 12), strict=True)]
    tokens, sequences = [free[0][3], free[1][2]], [free[2][4:7], [free[0][5]]]
    cases: list[tuple[dict[str, Any], list[list[int]]]] = [
        ({"stop_token": tokens}, [[token] for token in tokens]),
        ({"stop_sequences": sequences}, sequences),
        ({"stop_token": tokens[0], "stop_sequences": sequences[:1]}, [tokens[:1], sequences[0]]),
    ]
    for options, ends in cases:
        got = lm.generate(PROMPTS, 12, **options)
        for prompt, row, whole in zip(PROMPTS, got, free, strict=True):
            counts = [n for n in range(1, 13) if any(whole[:n][-len(end) :] == end for end in ends)]
            assert row[len(prompt) :].tolist() == whole[: min(counts, default=12)]
            assert list(lm.stream(prompt, 12, **options)) == row[len(prompt) :].tolist()


def test_several_sequences_a_prompt():
    """The prompt is read once: the first pass has its rows alone, and each continuation has a row of its own."""
    lm, rows = model(), []
    lm.stack.register_forward_pre_hook(lambda _, inputs: rows.append(tuple(inputs[0].shape[:2])))
    found = lm.generate(PROMPTS, 3, temperature=1.0, num_sequences=2, generator=torch.Generator().manual_seed(0))
    assert rows == [(1, 13), (6, 1), (6, 1)]
    assert [row[:-3].tolist() for row in found] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert any(not torch.equal(a, b) for a, b in zip(found[::2], found[1::2], strict=True))


def test_a_stream_gives_tokens_as_they_come():
    lm, passes = model(), []
    lm.stack.register_forward_pre_hook(lambda *_: passes.append(1))
    sampled = {"temperature": 1.0, "top_k": 6}
    tokens = lm.stream(PROMPTS[0], 6, **sampled, generator=torch.Generator().manual_seed(3))
    assert not passes
    first = list(islice(tokens, 2))
    assert len(passes) == 2
    assert torch.is_grad_enabled()
    whole = lm.generate(PROMPTS[0], 6, **sampled, generator=torch.Generator().manual_seed(3))[0]
    assert [*PROMPTS[0], *first, *tokens] == whole.tolist()
    with pytest.raises(ValueError, match="stream: 3 prompts were given, expected one"):
        lm.stream(PROMPTS, 3)
    with pytest.raises(ValueError, match="prompt 0 has tokens 1 to 11, expected 0 to 10"):
        lm.stream([1, 11], 3)


WRONG = [
    ({"top_k": -1}, "top_k is int -1, expected an int of at least 0"),
    ({"min_p": 1.5}, r"min_p is float 1.5, expected a float in \[0, 1\]"),
    ({"repetition_penalty": 0}, "repetition_penalty is int 0, expected a positive float"),
    ({"logits_processors": len}, "logits_processors is builtin.*, expected a list of callables"),
    ({"stop_token": [3, 11]}, r"stop_token is list \[3, 11\], expected an int from 0 to 10, or a list of such"),
    ({"stop_token": "3"}, "stop_token is str '3'"),
    (
        {"stop_sequences": [3, 4]},
        r"stop_sequences is list \[3, 4\], expected lists of tokens, each an int from 0 to 10",
    ),
    ({"stop_sequences": [[]]}, r"stop_sequences is list \[\[\]\]"),
    ({"num_sequences": 0}, "num_sequences is int 0, expected an int of at least 1"),
    ({"num_sequences": 2}, "num_sequences is 2 at temperature 0, expected 1, as all would be the same"),
    (
        {"logits_processors": [lambda _, logits: logits[0]]},
        r"processor 0 returned torch.float64 \[11\], expected logits",
    ),
    ({"logits_processors": [lambda _, logits: logits - torch.inf]}, "processor 0 returned a largest logit of -inf"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda each: str(each)[:40])
def test_a_wrong_option_is_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"generate: .*{message}"):
        model().generate([1, 2], 3, **options)
