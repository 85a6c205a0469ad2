"""Texts cut into words that are encoded once each have the tokens of the whole text."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from experiments.tasks import word_tokens
from experiments.tasks.text_tokens import FileTokens, train_tokenizer
from experiments.tasks.word_tokens import GPT2, LLAMA3, PATTERNS, places_to_cut
from tests.support.paths import ROOT

SEPARATOR = "<|endoftext|>"
PARTS = [
    *("the", "Word", "a", "x1", "12", "2024", "'s", "'S", "'re", "'", "n't", ".", ",", "(", "...", "_", "=="),
    *(" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\v", "\x1c", "\x00", "\x7f"),
    *("\u00a0", "\u2003", "\u3000", "\u0085", "\u2028", "é", "ß", "Ж", "漢", "かな", "한", "e\u0301"),
    *("٣", "²", "🙂", "¿"),
]
"""Letters, digits, marks and white space of all kinds, in ASCII and beyond it."""


@pytest.fixture(scope="module")
def content() -> str:
    source = (ROOT / "experiments" / "tasks" / "text.py").read_text()
    texts = [source, *("".join(random.Random(i).choices(PARTS, k=200)) for i in range(40))]
    return train_tokenizer(texts, 900, SEPARATOR)


def changed(content: str, **changes: object) -> str:
    return json.dumps(json.loads(content) | changes)


def split(pattern: str) -> dict[str, object]:
    parts = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
             {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]  # fmt: skip
    return {"type": "Sequence", "pretokenizers": parts}


@pytest.mark.parametrize("pattern", [None, *PATTERNS], ids=["gpt2", "qwen2", "llama3"])
def test_tokens_are_those_of_the_whole_text(content, monkeypatch, pattern):
    """Of random texts, repeated and short ones, empty ones among them; also where words are forgotten."""
    given = content if pattern is None else changed(content, pre_tokenizer=split(pattern))
    assert places_to_cut(given) is (GPT2 if pattern is None else LLAMA3)
    tokens = FileTokens(given.encode(), SEPARATOR, "tokenizer.json")
    draw = random.Random(7)
    for number in range(150):
        if number == 100:
            monkeypatch.setattr(word_tokens, "KEPT", 50)
        texts = ["".join(draw.choices(PARTS, k=draw.choice((0, 1, 2, 3, 8, 80)))) for _ in range(12)]
        expected = tokens._encode(texts)
        found = tokens.encode([text.encode() for text in texts])
        for text, mine, other in zip(texts, found, expected, strict=True):
            assert np.array_equal(mine, other), text
            assert mine.dtype == tokens.dtype


def test_each_word_is_encoded_once(content, monkeypatch):
    tokens = FileTokens(content.encode(), SEPARATOR, "tokenizer.json")
    assert tokens._words is not None
    encode, encoded = tokens._words._encode, []
    monkeypatch.setattr(tokens._words, "_encode", lambda texts: encoded.extend(texts) or encode(texts))
    assert [part.tolist() for part in tokens.encode([b"", b""])] == [[], []]
    for _ in range(2):
        tokens.encode([b"the word, the word\n  and the", b"", b" word "])
    assert encoded == ["the", " word", ",", " the", "\n ", " and", " "]


REFUSED = {
    "a normaliser": {"normalizer": {"type": "NFC"}},
    "a space in front": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
    "words that are not known": {"pre_tokenizer": split(r"\p{L}+|.")},
    "no words": {"pre_tokenizer": None},
    "a token that is looked for first": {
        "added_tokens": [{"id": 0, "content": "a b", "special": False, "single_word": False, "lstrip": False}
                         | {"rstrip": False, "normalized": False}],
    },
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_other_tokenizers_encode_whole_texts(content, case):
    assert places_to_cut(changed(content, **REFUSED[case])) is None
