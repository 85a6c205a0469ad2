"""The adapter beside the harness's own for ``transformers``, on the same folder."""

from __future__ import annotations

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from experiments.harness.adapter import SeqarchLM, sampling
from experiments.util.errors import RunnerError
from seqarch import LanguageModel
from tests.experiments.harness.conftest import SENTENCES, WORDS


@pytest.fixture(scope="module")
def hf(theirs) -> HFLM:
    return HFLM(pretrained=str(theirs), device="cpu", dtype="float32", batch_size=1, max_length=2048)


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, i, ("task", i, 1)) for i, each in enumerate(arguments)]


@pytest.mark.filterwarnings("ignore")  # those of transformers, as it generates
def test_each_request_gets_what_the_harness_itself_gets(hf, theirs):
    lm = SeqarchLM(LanguageModel.from_pretrained(theirs), batch_size=4)
    starts = [text.rpartition(" ")[0] for text in SENTENCES]
    choices = [(start, f" {word}") for start in [*starts, "", "trailing  "] for word in WORDS]
    asked = instances("loglikelihood", [*choices, ("a", " much longer continuation than context, of words")])
    for found, expected in zip(lm.loglikelihood(asked, True), hf.loglikelihood(asked, True), strict=True):
        assert found[0] == pytest.approx(expected[0], rel=1e-6)
        assert found[1] == expected[1]
    texts = instances("loglikelihood_rolling", [(" ".join(SENTENCES),), ("beta",), ("",)][:2])
    assert lm.loglikelihood_rolling(texts) == pytest.approx(hf.loglikelihood_rolling(texts, True), rel=1e-6)
    options = [{"until": [".", "\n"], "max_gen_toks": 8}, {"until": "e", "max_gen_toks": 5, "do_sample": False}]
    open_ended = instances("generate_until", [(start, how) for start in starts for how in options])
    assert lm.generate_until(open_ended, True) == hf.generate_until(open_ended, True)


def test_a_model_with_a_limit_reads_no_more_than_that(hf, theirs):
    """Windows as the harness cuts them; what cannot be cut is an error."""
    lm = SeqarchLM(LanguageModel.from_pretrained(theirs), limit=16)
    texts = instances("loglikelihood_rolling", [(" ".join(SENTENCES),)])
    short = HFLM(pretrained=hf.model, tokenizer=hf.tokenizer, batch_size=1, max_length=16)
    assert lm.loglikelihood_rolling(texts) == pytest.approx(short.loglikelihood_rolling(texts, True), rel=1e-6)
    long = " ".join(SENTENCES)
    with pytest.raises(RunnerError, match=r"a request of \d+ tokens is longer than the 16 that the model reads"):
        lm.loglikelihood(instances("loglikelihood", [(long, " beta")]), True)
    with pytest.raises(RunnerError, match="longer than the 16"):
        lm.generate_until(instances("generate_until", [(long, {})]), True)
    (short_of_room,) = lm.generate_until(instances("generate_until", [("after alpha", {"max_gen_toks": 99})]), True)
    assert len(lm.tok_encode("after alpha" + short_of_room)) <= 16 + 1  # decoded and encoded, it may be cut otherwise


def test_a_continuation_without_a_token_of_its_own_is_named(theirs):
    lm = SeqarchLM(LanguageModel.from_pretrained(theirs))
    with pytest.raises(RunnerError, match="the continuation 'eta' adds no token to a context that ends in 'b'"):
        lm.loglikelihood(instances("loglikelihood", [("b", "eta")]), True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 4}, "num_beams=4; expected only do_sample, until"),
        ({"do_sample": True, "top_p": 0.0}, "0 < top_p <= 1"),
        ({"max_gen_toks": 0}, "expected 1 token or more"),
    ],
)
def test_an_option_of_generation_that_is_not_served_is_named(options, reason):
    with pytest.raises(RunnerError, match=reason):
        sampling(options)


def test_sampling_is_asked_for_as_in_the_harness():
    assert sampling({"do_sample": True, "temperature": 0.7, "top_k": 5, "num_beams": 1}).temperature == 0.7
    assert sampling({"do_sample": False, "temperature": 0.7}).temperature == 0
    assert sampling({}).temperature == 0
    assert sampling({"until": ["", "x"], "max_new_tokens": 3}).until == ("x",)
