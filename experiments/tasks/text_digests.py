"""The files of a source with their sizes and SHA-256: what a text is known by, and whether each file is text.

Every file is read once, on as many threads as there are cores. What was found is kept in the cache by the file's
path, size, times and number, so that the next process need not read it again, as git does. A file that was written less
than two seconds before it was read is read again: one of the same size may have been written in the same tick.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from experiments.tasks.task import TaskError
from experiments.tasks.text_files import TextFile
from experiments.util.errors import RunnerError
from experiments.util.files import make_folder, read_json, write_atomic

BLOCK = 1 << 20
PART = 1 << 14
SETTLED_SECONDS = 2.0


class Digest(NamedTuple):
    """What is known of a file.

    Attributes:
        stamp: its size in bytes, its times of change of content and of entry in ns, and its number on the disk.
        sha256: of its content.
        problem: why it is no text, ``""`` where it is or holds rows, which are looked at one by one.
    """

    stamp: tuple[int, ...]
    sha256: str
    problem: str

    @property
    def size(self) -> int:
        return self.stamp[0]


def stamp_of(path: Path) -> tuple[int, ...]:
    """What changes when a file is written.

    Raises:
        TaskError: it is not there any more, or cannot be looked at.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise TaskError(_gone(path, error)) from error
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def digests(files: Sequence[TextFile], cache: Path) -> list[Digest]:
    """Those of files, in their order.

    Raises:
        TaskError: one of them cannot be read.
    """
    memory = cache / "digests" / f"{_sha256(os.path.abspath(file.path) for file in files)}.json"
    known: dict[str, list] = {}
    with suppress(RunnerError):  # Damaged, it is made anew.
        known = read_json(memory) or {}
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        found = list(pool.map(lambda file: _digest(file, known.get(str(file.path))), files))
    finally:
        pool.shutdown(cancel_futures=True)
    settled = time.time_ns() - int(SETTLED_SECONDS * 1e9)
    kept = {
        str(file.path): [list(each.stamp), each.sha256, each.problem]
        for file, each in zip(files, found, strict=True)
        if max(each.stamp[1:3]) < settled
    }
    if kept != known:
        make_folder(memory.parent)
        write_atomic(memory, json.dumps(kept), durable=False)
    return found


def _sha256(words: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for word in words:
        digest.update(word.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()[:20]


def _digest(file: TextFile, known: object) -> Digest:
    stamp = stamp_of(file.path)
    if isinstance(known, list) and len(known) == 3 and known[0] == list(stamp):
        return Digest(stamp, str(known[1]), str(known[2]))
    digest, check, read = hashlib.sha256(), _Check(), 0
    block = memoryview(bytearray(BLOCK))  # One for all: blocks that come and go would leave memory in pieces.
    try:
        with open(file.path, "rb", buffering=0) as content:
            while size := content.readinto(block):
                digest.update(block[:size])
                if file.kind == "text":
                    check.add(block[:size])
                read += size
    except OSError as error:
        raise TaskError(_gone(file.path, error)) from error
    problem = "" if file.kind != "text" else check.end() if read else "is empty"
    return Digest(stamp, digest.hexdigest(), problem)


class _Check:
    """Reads a text block by block and finds the first byte that is zero or no UTF-8."""

    def __init__(self) -> None:
        self._rest, self._read, self._problem = b"", 0, ""

    def add(self, block: memoryview) -> None:
        for start in range(0, len(block), PART):
            if not self._problem:
                self._add(self._rest + block[start : start + PART], final=False)

    def end(self) -> str:
        """Why the text that was read is none, or ``""``."""
        if not self._problem:
            self._add(self._rest, final=True)
        return self._problem

    def _add(self, part: bytes, final: bool) -> None:
        if (place := part.find(b"\0")) >= 0:
            self._problem = f"is no text: byte {self._read + place} is zero"
            return
        if part.isascii():
            self._read, self._rest = self._read + len(part), b""
            return
        try:
            _, used = codecs.utf_8_decode(part, "strict", final)
        except UnicodeDecodeError as error:
            self._problem = f"is no text in UTF-8: byte {self._read + error.start} cannot be read"
            return
        self._read, self._rest = self._read + used, part[used:]


def _gone(path: Path, error: OSError) -> str:
    return (
        f"task text: cannot read {path}: {error.strerror}; bring it back, and the same command goes on from the last"
        " checkpoint"
    )


def listing(names: Sequence[str], found: Sequence[Digest]) -> str:
    """A line per file with its SHA-256, its bytes and its path."""
    return "".join(f"{each.sha256} {each.size} {name}\n" for name, each in zip(names, found, strict=True))
