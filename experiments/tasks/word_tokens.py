"""Texts as words that are encoded once each, for tokenizers that are known to cut texts at certain places.

A text is cut where the tokenizer begins a token whatever else is in the text, as before the spaces of ``a word`` or
after the letters of ``word.``. Equal pieces are found by Arrow, the tokenizer encodes those that are new, and their
tokens are put together by NumPy: the same tokens, at several times the speed, since a text has few words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np

KEPT = 1 << 17
"""Words that are remembered; after more than that all are forgotten."""

LONGEST = 64
"""Bytes of a word that is remembered."""

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
PATTERNS = tuple(
    f"{_CONTRACTION}[^\\r\\n\\p{{L}}\\p{{N}}]?\\p{{L}}+|\\p{{N}}{digits}{_REST}" for digits in ("", "{1,3}")
)
"""The words of Qwen 2 and of Llama 3; those of GPT-2 are the package's ``ByteLevel``."""

SPACE = 0x20
_BYTES = range(256)
_LETTERS = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_DIGITS = frozenset(b"0123456789")
_WHITE = frozenset(b" \t\n\v\f\r")
_MARKS = frozenset(range(0x21, 0x7F)) - _LETTERS - _DIGITS
"""The kinds of bytes; of others, those of longer characters among them, no kind is known, and nothing is cut there."""

WORD = np.array([byte >= 0x21 and byte not in (0x7F, 0xC2, 0xE1, 0xE2, 0xE3) for byte in _BYTES])
"""Bytes that begin no white space: what is beyond ASCII begins with one of these four."""


BETWEEN, BEFORE = 1, 2


def _table(between: Sequence[tuple[frozenset[int], frozenset[int]]], alone: frozenset[int]) -> np.ndarray:
    """``[65536]`` uint8, by 256 times a byte plus the next one: where a token begins around any such two.

    Args:
        between: :data:`BETWEEN` any byte of the first and any of the second.
        alone: of white space, what is a token of its own where it is the last before a word; a space begins the word's,
            so that a token begins :data:`BEFORE` it.
    """
    found = np.zeros((256, 256), np.uint8)
    for first, second in between:
        found[np.ix_(sorted(first), sorted(second))] = BETWEEN
    found[np.ix_(sorted(alone), sorted(_LETTERS | _DIGITS | _MARKS))] = BETWEEN | BEFORE
    found[SPACE] = np.where(WORD, BEFORE, 0)
    return found.ravel()


_COMMON = ((_LETTERS, _DIGITS | _MARKS | _WHITE), (_DIGITS, _LETTERS | _MARKS | _WHITE), (_MARKS, _DIGITS))
GPT2 = _table((*_COMMON, (_MARKS, _WHITE), (_MARKS - frozenset(b"'"), _LETTERS)), _WHITE - {SPACE})
"""An apostrophe may begin a contraction, which a letter ends."""
LLAMA3 = _table((*_COMMON, (frozenset(b"\r\n"), _LETTERS | _DIGITS | _MARKS)), frozenset())
"""A mark may begin a word, and line ends go with the white space or the marks before them."""


def places_to_cut(tokenizer: str) -> np.ndarray | None:
    """Where a ``tokenizer.json`` begins a token whatever is around, :data:`GPT2` or another such table; ``None`` where
    that is not known.

    It is of byte-level BPE without a normaliser, with the words of GPT-2, Llama 3 or Qwen 2, of which no token is
    looked for in the text before it is cut into words.
    """
    found = json.loads(tokenizer)
    model, words = found["model"], found.get("pre_tokenizer") or {}
    plain = model.get("type") == "BPE" and not model.get("dropout") and found.get("normalizer") is None
    if not plain or not all(token["special"] for token in found.get("added_tokens", [])):
        return None
    *first, last = words.get("pretokenizers") or [words]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not first:
        return GPT2 if last.get("use_regex", True) else None
    isolated = {"type": "Split", "behavior": "Isolated", "invert": False}
    known = len(first) == 1 and first[0] in [{**isolated, "pattern": {"Regex": pattern}} for pattern in PATTERNS]
    return LLAMA3 if known and not last.get("use_regex", True) else None


class WordTokens:
    """The tokens of words, remembered.

    Args:
        encode: makes the tokens of texts.
        cuts: where it begins a token, as :func:`places_to_cut` says.
    """

    def __init__(self, encode: Callable[[list[str]], list[np.ndarray]], cuts: np.ndarray):
        self._encode, self._cuts = encode, cuts
        self._forget()

    def _forget(self) -> None:
        """Begin with no words: the number of each, and of each number where its tokens begin and how many there are."""
        self._numbers: dict[bytes, int] = {}
        self._starts, self._counts, self._tokens = (np.zeros(0, np.int64) for _ in range(3))

    def encode(self, contents: Sequence[bytes]) -> list[np.ndarray]:
        """The tokens of each text, int64."""
        whole = np.frombuffer(b"".join(contents), np.uint8)
        ends = np.cumsum([len(content) for content in contents])
        begins = self._begins(whole, ends)
        which, words = _distinct(whole, begins)
        numbers = self._numbered(words)[which]
        starts, counts = self._starts[numbers], self._counts[numbers]
        after = np.cumsum(counts)
        places = np.arange(counts.sum()) + np.repeat(starts - after + counts, counts)
        tokens = self._tokens[places]
        return np.split(tokens, np.append(0, after)[np.searchsorted(begins, ends[:-1])])

    def _begins(self, whole: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Where words begin in texts that end there: with each text, and where it is cut."""
        is_begin = np.zeros(len(whole) + 1, np.bool_)
        pairs = whole[:-1].astype(np.uint16) << 8 | whole[1:]
        found = self._cuts[pairs]
        is_begin[1:-1] = found & BETWEEN
        is_begin[:-2] |= (found & BEFORE) > 0
        last = ends[ends > 1] - 1  # What follows there is another text.
        is_begin[last] = found[last - 1] & BETWEEN
        is_begin[np.append(0, ends)] = True
        return np.flatnonzero(is_begin[:-1])

    def _numbered(self, words: list[bytes]) -> np.ndarray:
        """The number of each of these words, of which none is there twice; those that are new are encoded."""
        if len(self._numbers) > KEPT or len(self._tokens) > 8 * KEPT:
            self._forget()
        numbers = np.array([self._numbers.get(word, -1) for word in words], np.int64)
        new = np.flatnonzero(numbers < 0)
        if len(new):
            fresh = [words[i] for i in new.tolist()]
            found = self._encode([word.decode() for word in fresh])
            first, counts = len(self._counts), np.array([len(each) for each in found], np.int64)
            numbers[new] = np.arange(first, first + len(new))
            pairs = zip(fresh, numbers[new].tolist(), strict=True)
            self._numbers.update((word, number) for word, number in pairs if len(word) <= LONGEST)
            self._starts = np.append(self._starts, len(self._tokens) + np.cumsum(counts) - counts)
            self._counts = np.append(self._counts, counts)
            self._tokens = np.concatenate([self._tokens, *found])
        return numbers


def _distinct(whole: np.ndarray, begins: np.ndarray) -> tuple[np.ndarray, list[bytes]]:
    """Which of the distinct words each word is, and these."""
    import pyarrow

    offsets = np.append(begins, len(whole)).astype(np.int64)
    buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(whole)]
    found = pyarrow.Array.from_buffers(pyarrow.large_binary(), len(begins), buffers).dictionary_encode()
    return found.indices.to_numpy(), found.dictionary.to_pylist()
