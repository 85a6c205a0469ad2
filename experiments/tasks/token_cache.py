"""Token files on disk: made once from the documents of a source, shared by processes, read a window at a time.

A folder of the cache is named by a hash of what it was made from: every file's size and SHA-256, the tokenizer, how
documents are read. It holds, of each split, ``SPLIT.tokens`` (the tokens of its documents end to end, each after a
separator), ``SPLIT.documents`` (int64, where in there each begins) and ``tokens.json`` (counts, the size and SHA-256 of
each file). One process makes it, aside, while others wait; it is renamed when it is whole and on the disk. A file whose
size or times are not those it was written with is read again and compared with its SHA-256; what is damaged is made
anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from experiments.tasks.task import SPLITS, TaskError
from experiments.tasks.text_documents import LEFT_OUT, Piece
from experiments.tasks.text_tokens import Tokens
from experiments.util import owned
from experiments.util.errors import RunnerError, StorageError, writing
from experiments.util.files import make_folder, read_json, write_json
from experiments.util.paths import user_cache
from experiments.util.process_identity import mark
from seqarch.checkpoints.manifest import file_digest, sync

FORMAT = 1
ABOUT = "tokens.json"
PURPOSE, WORKSHOP = "token files", "workshop of token files"
OURS = re.compile(r"(train|validation|test)\.(tokens|documents)|\.?tokens\.json(\..+\.tmp)?|\.?owner\.json(\..+\.tmp)?")
IN_WORKSHOP = re.compile(rf"\.?owner\.json(\..+\.tmp)?|new/([0-9a-f]{{20}}/({OURS.pattern})?)?")
BATCH = 1 << 21
"""Bytes of text that are tokenised at a time."""


class TokenFiles(NamedTuple):
    """A folder of token files that is whole: where it is, and what its ``tokens.json`` says."""

    folder: Path
    about: dict[str, Any]


def cache_folder(given: str) -> Path:
    """Where token files are kept: ``given``, ``SEQARCH_TOKENS``, or ``seqarch/tokens`` in the user's cache."""
    return user_cache("tokens", "SEQARCH_TOKENS", given)


def token_files(
    cache: Path, made_from: Mapping[str, Any], tokens: Tokens, pieces: Callable[[], Iterable[Piece]], what: str
) -> TokenFiles:
    """The token files of what they are made from; made where they are not there, or damaged.

    Args:
        made_from: all that their content follows from, fit for JSON.
        pieces: begins to read the documents.
        what: names the source for people.

    Raises:
        TaskError: the documents cannot be read.
        StorageError: the cache cannot be written, or something else is in the way.
    """
    name = hashlib.sha256(json.dumps([FORMAT, made_from], sort_keys=True).encode()).hexdigest()[:20]
    folder = cache / name
    if found := _whole(folder):
        return found
    make_folder(cache)
    with _locked(cache / f"{name}.lock", what):
        if found := _whole(folder):
            return found
        _remove_leftovers(cache, name)
        print(f"{what}: tokenised into {folder}, once", file=sys.stderr, flush=True)
        _make(folder, tokens, pieces(), what)
    if found := _whole(folder):
        return found
    raise TaskError(f"task text: {folder} was removed or written to while it was made; start the same command again")


def _make(folder: Path, tokens: Tokens, pieces: Iterable[Piece], what: str) -> None:
    aside = folder.with_name(f".{folder.name}.{mark()}.tmp")
    owned.make(aside, WORKSHOP)
    began, processor = time.perf_counter(), time.process_time()
    try:
        new = aside / "new" / folder.name
        with writing(aside):
            (aside / "new").mkdir()
        owned.make(new, PURPOSE)
        with writing(new), ExitStack() as stack:
            writer = _Writer(new, tokens, stack)
            for batch in _batches(pieces):
                writer.add(batch)
        files = {}
        with writing(new):
            for path in sorted(path for path in new.iterdir() if path.name != owned.MARKER):
                files[path.name] = {**file_digest(path, synced=True), "stamp": _stamp(path)}
        write_json(
            new / ABOUT, {"format": FORMAT, "splits": writer.counts, "left_out": writer.left_out, "files": files}
        )
        _put(new, folder)
    finally:
        owned.remove(aside, IN_WORKSHOP)
    size = sum(each["bytes"] for each in writer.counts.values())
    seconds, used = time.perf_counter() - began, time.process_time() - processor
    text = f"{size:,} bytes in {seconds:.1f} s ({size / 1e6 / seconds:.1f} MB/s, {used:.1f} processor seconds)"
    print(f"{what}: {text}", file=sys.stderr, flush=True)


def _put(new: Path, folder: Path) -> None:
    """Rename what is whole to its place; what was damaged there goes, if it is token files and nothing else."""
    with writing(folder):
        if os.path.lexists(folder):
            if owned.maker(folder, PURPOSE) is None or owned.strangers(folder, OURS):
                raise StorageError(f"{folder} is in the way and not made of token files alone; move it away")
            owned.remove(folder, OURS)
        os.rename(new, folder)
        sync(folder.parent)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The pieces in their order, so many at a time that a tokenizer's threads have work."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.content)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Writer:
    """Appends documents to the files of their splits, and counts them."""

    def __init__(self, folder: Path, tokens: Tokens, stack: ExitStack):
        self._tokens, self._separator = tokens, np.array(tokens.stored_separator, tokens.dtype).tobytes()
        self._files: dict[str, tuple[IO[bytes], IO[bytes]]] = {}
        for split in SPLITS:
            paths = folder / f"{split}.tokens", folder / f"{split}.documents"
            self._files[split] = stack.enter_context(paths[0].open("wb")), stack.enter_context(paths[1].open("wb"))
        self.left_out = 0
        self.counts = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}

    def add(self, pieces: list[Piece]) -> None:
        for piece, encoded in zip(pieces, self._tokens.encode([piece.content for piece in pieces]), strict=True):
            if piece.split == LEFT_OUT:
                self.left_out += 1
                continue
            count, (tokens, documents) = self.counts[piece.split], self._files[piece.split]
            if piece.begins:
                documents.write(count["tokens"].to_bytes(8, "little"))
                tokens.write(self._separator)
                count["documents"] += 1
                count["tokens"] += 1
            tokens.write(encoded.data)
            count["tokens"] += len(encoded)
            count["bytes"] += len(piece.content)


def _whole(folder: Path) -> TokenFiles | None:
    """The token files of a folder, if they are there and what was written."""
    try:
        about = read_json(folder / ABOUT)
        if about is None or about.get("format") != FORMAT or owned.maker(folder, PURPOSE) is None:
            return None
        for name, written in about["files"].items():
            path = folder / name
            known = {key: written[key] for key in ("bytes", "sha256")}
            if _stamp(path) != written["stamp"] and file_digest(path) != known:
                return None
        return TokenFiles(folder, about)
    except (RunnerError, OSError, LookupError, TypeError, AttributeError):
        return None


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    """Held by one process at a time, and let go by the system where that one is killed."""
    with writing(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with writing(path):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{what}: another process tokenises it; waiting", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _remove_leftovers(cache: Path, name: str) -> None:
    """Remove what killed processes left of token files that this process alone may make now."""
    for path in sorted(cache.glob(f".{name}.*.tmp")):
        if owned.maker(path, WORKSHOP) is not None:
            owned.remove(path, IN_WORKSHOP)


class TokenStream:
    """The documents of a split, end to end. Tokens are read when they are asked for, and none is kept.

    The files are held open: they stay readable if they are removed, and one that was cut short is an error.
    """

    def __init__(self, files: TokenFiles, split: str, tokens: Tokens):
        count = files.about["splits"][split]
        self.count, self.bytes, self.documents = count["tokens"], count["bytes"], count["documents"]
        self._path, self._tokens = files.folder / f"{split}.tokens", tokens
        self._file, self._documents = self._open("tokens"), self._open("documents")

    def _open(self, ending: str) -> int:
        try:
            file = os.open(self._path.with_suffix(f".{ending}"), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise TaskError(_cut(self._path, error.strerror or str(error))) from error
        weakref.finalize(self, os.close, file)
        return file

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """``[n, length]`` int64, the tokens from these places on.

        Raises:
            TaskError: the file is not what it was.
        """
        width = self._tokens.dtype.itemsize
        parts = [self._read(self._file, length * width, start * width) for start in starts.tolist()]
        return self._tokens.restored(np.frombuffer(b"".join(parts), self._tokens.dtype)).reshape(len(parts), length)

    def begins(self) -> np.ndarray:
        """int64, where each document's separator stands, and the end of the stream."""
        return np.append(self.document_begins(0, self.documents), self.count)

    def document_begins(self, first: int, last: int) -> np.ndarray:
        """int64, where the separators of the documents ``first`` to ``last`` stand, the last one excluded.

        Raises:
            TaskError: the file is not what it was.
        """
        return np.frombuffer(self._read(self._documents, (last - first) * 8, first * 8), "<i8").astype(np.int64)

    def _read(self, file: int, size: int, start: int) -> bytes:
        parts: list[bytes] = []
        while size:
            try:
                part = os.pread(file, size, start)
            except OSError as error:
                raise TaskError(_cut(self._path, error.strerror or str(error))) from error
            if not part:
                raise TaskError(_cut(self._path, "it ends before the tokens that it had"))
            parts.append(part)
            size, start = size - len(part), start + len(part)
        return b"".join(parts)


def _cut(path: Path, reason: str) -> str:
    return (
        f"task text: cannot read the token file {path}: {reason}; start the same command again: tokens are made anew,"
        " and the run goes on from its last checkpoint"
    )
