"""From text to tokens: its bytes, or the tokens of a ``tokenizer.json``, the format of the ``tokenizers`` package."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.tasks.task import TaskError
from experiments.tasks.word_tokens import WordTokens, places_to_cut

BYTES = "bytes"
"""In place of the path of a tokenizer: each byte is a token."""
STORED_SEPARATOR = 255
"""The byte 0xFF, which is in no UTF-8: what a file of bytes has in place of the separator, 256."""


class Tokens:
    """What turns documents into tokens.

    Attributes:
        vocab_size: number of tokens.
        separator: the token in front of each document.
        dtype: of a token in a file.
    """

    vocab_size: int
    separator: int
    dtype: np.dtype

    def encode(self, contents: Sequence[bytes]) -> list[np.ndarray]:
        """The tokens of pieces of UTF-8, as they are kept in a file."""
        raise TypeError(f"{type(self).__name__} defines no encode")

    @property
    def stored_separator(self) -> int:
        """The separator as a file has it."""
        return self.separator

    def restored(self, stored: np.ndarray) -> np.ndarray:
        """int64, the tokens that a file has."""
        return stored.astype(np.int64)


class ByteTokens(Tokens):
    """Tokens 0 to 255 are bytes, 256 is the separator."""

    vocab_size, separator, dtype = 257, 256, np.dtype("u1")

    @property
    def stored_separator(self) -> int:
        return STORED_SEPARATOR

    def encode(self, contents: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(content, np.uint8) for content in contents]

    def restored(self, stored: np.ndarray) -> np.ndarray:
        tokens = stored.astype(np.int64)
        tokens[tokens == STORED_SEPARATOR] = self.separator
        return tokens


class FileTokens(Tokens):
    """Those of a ``tokenizer.json``. Names of special tokens that stand in a text are read as the text that they are.

    Args:
        content: of the file.
        separator: the name of the token that separates documents.
        path: for errors.

    Raises:
        TaskError: it is no tokenizer, or has no such token.
    """

    def __init__(self, content: bytes, separator: str, path: str):
        try:
            self._tokenizer: Any = _tokenizers().Tokenizer.from_buffer(content)
        except (ValueError, TypeError) as error:
            raise TaskError(f"tokenizer {path} is no tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        self.dtype = np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")
        found = self._tokenizer.token_to_id(separator)
        if found is None:
            added = sorted(token.content for token in self._tokenizer.get_added_tokens_decoder().values())
            raise TaskError(
                f"tokenizer {path} has no token {separator!r} to separate documents; task.separator names one of its"
                f" own: {', '.join(added[:8]) or 'it has no special ones'}"
            )
        self.separator = int(found)
        cuts = places_to_cut(content.decode()) if find_spec("pyarrow") else None
        self._words = None if cuts is None else WordTokens(self._encode, cuts)

    def encode(self, contents: Sequence[bytes]) -> list[np.ndarray]:
        if self._words is not None:
            return [tokens.astype(self.dtype) for tokens in self._words.encode(contents)]
        return self._encode([content.decode() for content in contents])

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(each.ids, self.dtype) for each in encoded]


class TokenizerFile(NamedTuple):
    """A tokenizer's file as it is now: its content, the SHA-256 of that, and what it makes."""

    content: bytes
    sha256: str
    tokens: Tokens


def read_tokenizer(path: str, separator: str) -> TokenizerFile:
    """The tokenizer in a file, or :data:`BYTES`.

    Raises:
        TaskError: it cannot be read, is none, or has no such separator.
    """
    if path == BYTES:
        return TokenizerFile(b"", "", ByteTokens())
    try:
        found = os.stat(path)
        return _read(path, separator, (found.st_size, found.st_mtime_ns, found.st_ino))
    except OSError as error:
        raise TaskError(
            f"tokenizer {path}: {error.strerror}; expected {BYTES!r} or the path of a tokenizer.json, such as"
            " `python -m experiments.tokenizer` trains; the folder of a run that had one has a copy"
        ) from error


@lru_cache(maxsize=4)
def _read(path: str, separator: str, stamp: tuple[int, ...]) -> TokenizerFile:
    """The tokenizer in a file, which is read once as long as its stamp stays."""
    content = Path(path).read_bytes()
    return TokenizerFile(content, hashlib.sha256(content).hexdigest(), FileTokens(content, separator, path))


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise TaskError("a tokenizer.json needs the package tokenizers: pip install tokenizers, or .[text]") from error
    return tokenizers


def train_tokenizer(texts: Iterable[str], vocab_size: int, separator: str) -> str:
    """The content of a ``tokenizer.json``: byte-level BPE, whose token 0 is the separator and 1 to 256 are bytes.

    Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", on bytes and within the words
    of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".

    Raises:
        TaskError: there is too little text for so many tokens.
    """
    library = _tokenizers()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[separator],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        raise TaskError(f"the text has pairs for {found} tokens only, and {vocab_size} are asked for; ask for fewer")
    return tokenizer.to_str()
