"""Baselines of text, against programs that are plainly right."""

from __future__ import annotations

import gzip
import lzma
from collections import Counter
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from experiments.tasks.byte_ngrams import FALLBACK, ByteNgrams
from experiments.tasks.corpus_text import CorpusText, CorpusTextConfig
from experiments.tasks.text_baselines import text_baselines, training_text
from tests.support.paths import ROOT

TEXTS = [
    b"the cat sat on the mat; the dog sat on the log. what a cat, what a dog!\n" * 3
    + b"other words follow here, too\n",
    b"the end of the matter is that the cat ate the rat\n",
    b"",
    b"x",
]
HELD_OUT = b"the rat sat on that cat \xff\x00 and ate it"


def plain_kneser_ney(texts: list[bytes], order: int) -> Callable[[tuple[int, ...], int], float]:
    """P(w | h) by the formulas, with dictionaries and recursion; ``h`` begins with 256 at the start of a file."""
    counts: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order + 1)]
    for text in texts:
        symbols = (256,) * (order - 1) + tuple(text)
        for end in range(order, len(symbols) + 1):
            counts[order][symbols[end - order : end]] += 1
    for length in range(order - 1, 0, -1):
        for ngram, count in counts[length + 1].items():
            counts[length][ngram[1:]] += count if ngram[1] == 256 else 1

    @cache
    def discount(length: int) -> list[float]:
        n = [0, *(sum(count == number for count in counts[length].values()) for number in (1, 2, 3, 4))]
        if not all(n[1:4]):
            return list(FALLBACK)
        share = n[1] / (n[1] + 2 * n[2])
        found = [0.0, *(k - (k + 1) * share * n[k + 1] / n[k] for k in (1, 2, 3))]
        return found if all(0 < found[k] <= k for k in (1, 2, 3)) else list(FALLBACK)

    followers: list[dict[tuple[int, ...], list[int]]] = [{} for _ in counts]
    for length in range(1, order + 1):
        for ngram, count in counts[length].items():
            followers[length].setdefault(ngram[:-1], []).append(count)

    def probability(history: tuple[int, ...], byte: int) -> float:
        length = len(history) + 1
        lower = probability(history[1:], byte) if history else 1 / 256
        if not (after := followers[length].get(history)):
            return lower
        D, count = discount(length), counts[length][(*history, byte)]
        passed = sum(D[min(each, 3)] for each in after) / sum(after)
        return (count - D[min(count, 3)]) / sum(after) + passed * lower

    return probability


@pytest.mark.parametrize("order", [1, 2, 4, 6])
def test_ngrams_agree_with_the_formulas(order):
    probability = plain_kneser_ney(TEXTS, order)
    for text in (HELD_OUT, TEXTS[0], b"t"):
        symbols = (256,) * (order - 1) + tuple(text)
        expected = [-np.log2(probability(symbols[i : i + order - 1], byte)) for i, byte in enumerate(text)]
        assert ByteNgrams(TEXTS, order).bits(text) == pytest.approx(np.array(expected), rel=1e-9)


@pytest.mark.parametrize("texts", [TEXTS, [bytes(np.random.default_rng(0).choice(list(b"ACGT"), 5000))]])
@pytest.mark.parametrize("history", [b"", b"t", b"the cat s", b"AC", b"\xff\xfe"])
def test_probabilities_of_all_bytes_sum_to_one(texts, history):
    model = ByteNgrams(texts, 5)
    after = [2.0 ** -model.bits(history + bytes([byte]))[-1] for byte in range(256)]
    assert sum(after) == pytest.approx(1.0, rel=1e-12)
    assert min(after) > 0


def test_discounts_are_estimated_where_there_is_enough_text():
    """On text with enough n-grams of every count, the fallback would be another model."""
    text = (ROOT / "docs" / "guide.md").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        estimated = ByteNgrams([text[:9000]], 3).bits(text[9000:])
        patch.setattr("experiments.tasks.byte_ngrams._discounts", lambda counts: FALLBACK)
        fallback = ByteNgrams([text[:9000]], 3).bits(text[9000:])
        assert (np.abs(fallback - estimated) > 1e-3).mean() > 0.5


@pytest.mark.parametrize(("texts", "order"), [([b"a"], 0), ([b"a"], 8), ([], 3), ([b""], 3)])
def test_what_no_model_can_be_made_of_is_refused(texts, order):
    with pytest.raises(ValueError, match=r"order must lie between 1 and 7|at least one byte of text"):
        ByteNgrams(texts, order)


@pytest.fixture(scope="module")
def library() -> CorpusText:
    return CorpusText(CorpusTextConfig(folder=str(ROOT / "seqarch"), glob="*.py", eval_length=2048, test_files=3))


def test_every_baseline_reads_the_test_bytes(library):
    found = {baseline.name: baseline for baseline in text_baselines(library, order=4)}
    tests = library.held_out()
    assert {baseline.bits.shape for baseline in found.values()} == {tests.shape}
    for test, bits in zip(tests, found["gzip"].bits, strict=True):
        assert bits.sum() == pytest.approx(8 * len(gzip.compress(test.tobytes(), 9)))
        assert bits[:64].sum() == pytest.approx(8 * len(gzip.compress(test[:64].tobytes(), 9)))
    for test, bits in zip(tests, found["xz"].bits, strict=True):
        assert bits.sum() == pytest.approx(8 * len(lzma.compress(test.tobytes(), preset=9)), abs=8 * 16)
    expected = ByteNgrams(library.files["train"].values(), 4).bits(tests[1].tobytes())
    assert found["ngram"].bits[1] == pytest.approx(expected)
    means = {name: baseline.bits.mean() for name, baseline in found.items()}
    assert max(means["ngram"], means["xz_after_text"]) < means["xz"]
    curve = found["ngram"].curve()
    assert (curve["x_end"], len(curve["x"])) == (2048, len(curve["y"]))


def test_xz_after_the_text_knows_what_was_in_it(library, monkeypatch):
    """A test file that is in the training text costs next to nothing."""
    long = [content for content in library.files["train"].values() if len(content) > 2048]
    tests = np.stack([np.frombuffer(content[:2048], np.uint8) for content in long[:2]])
    monkeypatch.setattr(library, "held_out", lambda: tests)
    found = {baseline.name: baseline for baseline in text_baselines(library, order=2)}
    assert found["xz_after_text"].bits.mean() < 0.2 < 1 < found["xz"].bits.mean()


def test_as_much_training_text_is_read_as_is_asked_for(library):
    whole = list(library.files["train"].values())
    assert training_text(library, None) == whole
    assert training_text(library, len(whole[0]) + 5) == [whole[0], whole[1][:5]]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        training_text(library, 0)
