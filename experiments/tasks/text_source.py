"""One source of a text: its files, their digests, and its token files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.tasks.task import SPLITS, TaskError
from experiments.tasks.text_digests import Digest, digests, listing
from experiments.tasks.text_documents import LONGEST_CUT, Piece, Reading
from experiments.tasks.text_files import TextFile, source_files
from experiments.tasks.text_tokens import TokenizerFile
from experiments.tasks.token_cache import TokenFiles, TokenStream, token_files

KEYS = {"path": str, "weight": (int, float), "field": str}
"""The keys of an entry of ``sources``, and what each is."""


@dataclass(frozen=True)
class Source:
    """Where text is from.

    Attributes:
        path: of a file, of a folder, or a pattern.
        weight: its share of the examples, relative to those of the others; ``None`` for its share of the tokens.
        reading: how its documents are read.
        extensions: how the names of a folder's files end.
        tokenizer: what makes tokens of it.
        cache: where its token files are kept.
    """

    path: str
    weight: float | None
    reading: Reading
    extensions: tuple[str, ...]
    tokenizer: TokenizerFile
    cache: Path

    @cached_property
    def files(self) -> list[TextFile]:
        return source_files(self.path, self.extensions)

    @cached_property
    def digests(self) -> list[Digest]:
        return digests(self.files, self.cache)

    @property
    def listing(self) -> str:
        """A line per file: its SHA-256, its bytes, its path."""
        return listing([str(file.path) for file in self.files], self.digests)

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(digest.size for digest in self.digests)

    @cached_property
    def token_files(self) -> TokenFiles:
        """Its tokens, made now if they are not there."""
        reading = self.reading
        made_from = {
            "files": [[file.kind, digest.sha256] for file, digest in zip(self.files, self.digests, strict=True)],
            "field": reading.field,
            "cut": reading.cut,
            "held_out": reading.held_out,
            "skips": reading.skips,
            "tokenizer": self.tokenizer.sha256,
            "separator": self.tokenizer.tokens.separator,
        }
        return token_files(self.cache, made_from, self.tokenizer.tokens, self.pieces, f"task text: {self.path}")

    def pieces(self) -> Iterator[Piece]:
        """All documents, in pieces."""
        for file, digest in zip(self.files, self.digests, strict=True):
            yield from self.reading.pieces(file, digest)

    @cached_property
    def streams(self) -> dict[str, TokenStream]:
        """The tokens of each split."""
        return {split: TokenStream(self.token_files, split, self.tokenizer.tokens) for split in SPLITS}


def check_entry(entry: Mapping[str, Any], number: int) -> None:
    """Refuse an entry of ``sources`` that has other keys or values than there can be.

    Raises:
        ValueError: naming the entry.
    """
    where = f"sources[{number}]"
    if unknown := [key for key in entry if key not in KEYS]:
        raise ValueError(f"{where} has the key {unknown[0]!r}, expected {', '.join(KEYS)}")
    if not entry.get("path"):
        raise ValueError(f"{where} has no path: of a file, a folder or a pattern")
    for key, value in entry.items():
        if not isinstance(value, KEYS[key]) or isinstance(value, bool):
            raise ValueError(f"{where}.{key} is {value!r}, expected {'a number' if key == 'weight' else 'text'}")
    if not 0 < entry.get("weight", 1) < float("inf"):
        raise ValueError(f"{where}.weight must be positive and finite, got {entry['weight']}")


def weights(sources: list[Source]) -> list[float]:
    """The share of each source in the examples: its weight, or its share of the training tokens where none has one.

    Raises:
        TaskError: no training document is in a source.
    """
    tokens = [source.streams["train"].count for source in sources]
    pairs = zip(sources, tokens, strict=True)
    return [float(count) if source.weight is None else source.weight for source, count in pairs]


def check_size(source: Source, split: str, length: int, option: str) -> None:
    """Refuse a source that has too few tokens in a split for one window.

    Raises:
        TaskError: naming the source and the option that could be less.
    """
    stream = source.streams[split]
    if stream.count > length:
        return
    documents = sum(each.documents for each in source.streams.values())
    if not stream.documents:
        cut = min(max(1 << (source.size // 100).bit_length(), 1024), LONGEST_CUT)
        raise TaskError(
            f"task text: none of the {documents} documents of {source.path} falls into the {split} split, and documents"
            f" are kept whole; cut long ones into documents of about {cut:,} bytes by task.cut={cut}, give more of"
            " them, or raise task.held_out"
        )
    raise TaskError(
        f"task text: {option} = {length}, and the {split} split of {source.path} has {stream.count:,} tokens"
        f" ({stream.documents} of {documents} documents); choose a smaller one, give more text, or raise task.held_out"
    )
