"""Documents of files, in pieces: a text is one document, and so is each row of a ``.jsonl``, Parquet or Arrow file.

Nothing holds more than a piece of a text, a line or some rows at a time, however large the file is. Which split a
document is in follows from a hash of its content alone: it stays there when others are added, and copies of it are in
the same split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.tasks.byte_text import split_at
from experiments.tasks.documents import pieces
from experiments.tasks.task import TaskError
from experiments.tasks.text_digests import Digest, stamp_of
from experiments.tasks.text_files import TextFile, why_unusable

PIECE = 1 << 18
"""Bytes of a text that are read at a time; a piece ends with a line where it has line ends."""
LONGEST_CUT = PIECE
ROWS_AT_A_TIME = 1024
LEFT_OUT = "left out"
"""In place of the split of what is no text."""


class Piece(NamedTuple):
    """A piece of a document: the split of that, or :data:`LEFT_OUT`; whether the document begins with it; its UTF-8."""

    split: str
    begins: bool
    content: bytes


@dataclass(frozen=True)
class Reading:
    """How documents are read.

    Attributes:
        field: the key, or the column, of a row that is its text.
        cut: bytes after which a document is cut into documents of their own, at the next line end; 0 for never.
        held_out: share of the documents in validation, and in the tests.
        skips: whether what is no text is left out; else it is an error.
    """

    field: str
    cut: int
    held_out: float
    skips: bool

    def pieces(self, file: TextFile, digest: Digest) -> Iterator[Piece]:
        """The pieces of a file's documents, one document after another.

        Raises:
            TaskError: something in it cannot be used, or it is not what it was when its digest was taken.
        """
        if file.kind == "text":
            if digest.problem:
                yield from self._leave_out(f"{file.path} {digest.problem}")
            else:
                yield from self._text(file.path, digest)
        else:
            rows = {"jsonl": _lines, "parquet": _parquet, "arrow": _arrow}[file.kind]
            for where, row in rows(file.path, self.field):
                yield from self._row(where, row)
        if stamp_of(file.path) != digest.stamp:
            raise TaskError(f"task text: {file.path} was changed while it was read; start the same command again")

    def _text(self, path: Path, digest: Digest) -> Iterator[Piece]:
        split, begins = self._split_of(digest.sha256), True
        for content in _whole_lines(path):
            if self.cut:
                yield from self._documents(content)
            else:
                yield Piece(split, begins, content)
                begins = False

    def _row(self, where: str, row: Any) -> Iterator[Piece]:
        problem, content = "", b""
        if isinstance(row, ValueError):
            problem = str(row)
        elif not isinstance(row, str):
            problem = f"has {row!r:.40} as its {self.field}, and a text is wanted"
        else:
            try:
                content = row.encode()
                problem = why_unusable(content)
            except UnicodeEncodeError:
                problem = "is no text: half of a surrogate pair is in it"
        if problem:
            yield from self._leave_out(f"{where} {problem}")
        else:
            yield from self._documents(content)

    def _documents(self, content: bytes) -> Iterator[Piece]:
        parts = [content] if not self.cut else (part for _, part in pieces("", content, self.cut))
        for part in parts:
            yield Piece(self._split_of(hashlib.sha256(part).hexdigest()), True, part)

    def _split_of(self, sha256: str) -> str:
        return split_at(int(sha256[:16], 16) / 2**64, self.held_out, self.held_out)

    def _leave_out(self, what: str) -> Iterator[Piece]:
        if not self.skips:
            raise TaskError(f"task text: {what}; take it out, or leave out all such by task.unusable=skip")
        yield Piece(LEFT_OUT, True, b"")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TaskError(f"task text: cannot read {path}: {error.strerror or error}") from error


def _whole_lines(path: Path) -> Iterator[bytes]:
    """A text in pieces that end with a line or, where there is none, with a character."""
    with _reading(path), open(path, "rb") as file:
        rest = b""
        while block := file.read(PIECE):
            block = rest + block
            end = block.rfind(b"\n") + 1 or _last_character(block)
            if end:
                yield block[:end]
            rest = block[end:]
        if rest:
            yield rest


def _last_character(block: bytes) -> int:
    """Where the character begins that the end of a block may cut."""
    end = len(block) - 1
    while end > 0 and block[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _lines(path: Path, wanted: str) -> Iterator[tuple[str, Any]]:
    with _reading(path), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number},"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield where, ValueError(f"is no JSON: {error}")
                continue
            if isinstance(row, dict) and wanted in row:
                yield where, row[wanted]
            else:
                there = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                yield where, ValueError(f"has no {wanted!r} but {there:.80}; task.field names the one that is text")


def _parquet(path: Path, wanted: str) -> Iterator[tuple[str, Any]]:
    parquet = _pyarrow(path).parquet
    with _reading(path), _arrow_errors(path), parquet.ParquetFile(path) as file:
        _check_column(path, file.schema_arrow, wanted)
        yield from _rows(path, file.iter_batches(ROWS_AT_A_TIME, columns=[wanted]), wanted)


def _arrow(path: Path, wanted: str) -> Iterator[tuple[str, Any]]:
    """Of a stream, as ``datasets`` writes them, or of a file of the Arrow format."""
    ipc = _pyarrow(path).ipc
    with _reading(path), _arrow_errors(path), open(path, "rb") as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = ipc.open_file(file) if is_file else ipc.open_stream(file)
        _check_column(path, reader.schema, wanted)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches)) if is_file else reader
        yield from _rows(path, batches, wanted)


def _rows(path: Path, batches: Iterable[Any], wanted: str) -> Iterator[tuple[str, Any]]:
    number = 0
    for batch in batches:
        column = batch.column(batch.schema.get_field_index(wanted))
        for start in range(0, len(column), ROWS_AT_A_TIME):
            for row in column.slice(start, ROWS_AT_A_TIME).to_pylist():
                number += 1
                yield f"{path}, row {number},", row


def _check_column(path: Path, schema: Any, wanted: str) -> None:
    if wanted not in schema.names:
        raise TaskError(
            f"task text: {path} has no column {wanted!r} but {', '.join(schema.names)}; task.field names the one that"
            " is text"
        )


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise TaskError(f"task text: {path} needs the package pyarrow: pip install pyarrow, or .[text]") from error
    return pyarrow


@contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    """Turn what Arrow raises for a file that is none of its own into an error that names it."""
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise TaskError(
            f"task text: {path} cannot be read as {path.suffix}: {str(error).partition(chr(10))[0]}"
        ) from error
