"""From text to the tokens that a run's model was trained on, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from seqarch.checkpoints.errors import CheckpointError

FILE = "tokenizer.json"
"""In the folder of a run whose tokens are not its text's bytes, as the ``tokenizers`` library writes it."""

BYTES = 256


class Tokenizer(Protocol):
    """What ``model.tokenizer`` has."""

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Iterable[int]) -> str: ...


class ByteTokenizer:
    """A token is a byte of the text in UTF-8.

    Attributes:
        vocab_size: of the model; tokens from 256 on stand for no byte, and are left out of a text.
        start: the token that stands before a text's first byte, 256, where the model has it; ``None`` otherwise.
    """

    def __init__(self, vocab_size: int = BYTES):
        self.vocab_size = vocab_size
        self.start = BYTES if vocab_size > BYTES else None

    def encode(self, text: str) -> list[int]:
        """The bytes of a text, without :attr:`start`."""
        return list(text.encode())

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, a tensor's too; bytes that are no UTF-8 become U+FFFD."""
        return bytes(token for token in map(int, tokens) if token < BYTES).decode(errors="replace")


class FileTokenizer:
    """The tokenizer of a file that the ``tokenizers`` library wrote, which is :attr:`tokenizer`."""

    def __init__(self, path: Path):
        try:
            from tokenizers import Tokenizer as Stored
        except ImportError as error:
            raise CheckpointError(f"{path} needs the package tokenizers: pip install tokenizers") from error
        try:
            self.tokenizer = Stored.from_file(str(path))
        except Exception as error:  # The library raises Exception itself.
            raise CheckpointError(f"cannot read {path}: {error}") from error
        self.vocab_size: int = self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, a tensor's too, without special tokens."""
        return self.tokenizer.decode([int(token) for token in tokens])


def tokenizer_of(folder: Path, record: Mapping[str, Any], vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a run; ``None`` where its tokens are no text, or its record is from before it said so.

    Raises:
        CheckpointError: its ``tokenizer.json`` cannot be read.
    """
    if (file := folder / FILE).exists():
        return FileTokenizer(file)
    task = record.get("task")
    return ByteTokenizer(vocab_size) if isinstance(task, Mapping) and task.get("tokens") == "bytes" else None
