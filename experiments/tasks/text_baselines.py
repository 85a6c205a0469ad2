"""What compressors and an n-gram model reach on the very bytes that models of text are tested on.

`gzip` and `xz` read each test file alone; a second `xz` has compressed the training text before, all of it within its
window, and is charged for what it adds. (The window of `gzip` is 32 KiB, so that training text before a file would mean
its last 32 KiB: that is left out.) What a compressor takes for a stretch of a file is the difference between the
sizes of two beginnings of it; the frame of a `.gz` or `.xz` file falls into the first. The n-gram model is trained on
the training text and does not change as it reads.
"""

from __future__ import annotations

import gzip
import json
import lzma
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from experiments.tasks import xz_after_text
from experiments.tasks.byte_ngrams import HIGHEST_ORDER, ByteNgrams
from experiments.tasks.byte_text import position_curve
from experiments.tasks.task import TaskError

SHORTEST = 16
"""Bytes of the shortest beginning that is compressed: a compressor gives whole bytes."""

__all__ = ["HIGHEST_ORDER", "Baseline", "text_baselines", "training_text"]


@dataclass(frozen=True)
class Baseline:
    """A program that predicts bytes.

    Attributes:
        name, label: its key, and its name for people.
        bits: ``[files, eval_length]``, bits for each byte of the test files; a compressor's are spread evenly over the
            stretches between 0, 16, 32, 64, ... bytes.
        seconds: of this machine, training included.
    """

    name: str
    label: str
    bits: np.ndarray
    seconds: float

    def curve(self) -> dict[str, Any]:
        """The mean over the files along the position, in the bins of ``ByteText.score``."""
        return position_curve(self.bits.sum(axis=0), np.full(self.bits.shape[1], len(self.bits)))


class Texts(Protocol):
    """A task on bytes: its test files as ``[files, eval_length]`` bytes, and its training files."""

    def held_out(self) -> np.ndarray: ...

    def training_texts(self) -> Iterable[bytes]: ...


def text_baselines(task: Texts, order: int = 6, train_bytes: int | None = None) -> list[Baseline]:
    """Every baseline on the test files of a task.

    Args:
        order: bytes of the longest n-grams.
        train_bytes: of training text that is read, such as the number that models see; all where ``None``.

    Raises:
        TaskError: the task has no such files, or ``xz`` could not be run after the training text.
        ValueError: an order or a number of bytes that cannot be.
    """
    tests, texts = list(task.held_out()), training_text(task, train_bytes)
    read = f"{sum(map(len, texts)):,} bytes of training text"
    programs: list[tuple[str, str, Callable[[], np.ndarray]]] = [
        ("gzip", "gzip -9", lambda: _compressed(tests, _gzip_size)),
        ("xz", "xz -9e", lambda: _compressed(tests, _xz_size)),
        ("xz_after_text", f"xz -9e after {read}", lambda: _xz_after(texts, tests)),
        ("ngram", f"{order}-grams of {read}", lambda: _ngram_bits(texts, tests, order)),
    ]
    found = []
    for name, label, program in programs:
        began = time.perf_counter()
        bits = program()
        found.append(Baseline(name, label, bits, time.perf_counter() - began))
    return found


def training_text(task: Texts, most: int | None) -> list[bytes]:
    """The training files in the task's order, up to ``most`` bytes of them; the last may be cut.

    Raises:
        ValueError: ``most`` is below 1.
    """
    if most is not None and most < 1:
        raise ValueError(f"the bytes of training text must be at least 1, got {most}")
    texts: list[bytes] = []
    left = most if most is not None else sys.maxsize
    for content in task.training_texts():
        texts.append(content[:left])
        left -= len(texts[-1])
        if left <= 0:
            break
    return texts


def _gzip_size(content: bytes) -> int:
    return len(gzip.compress(content, 9, mtime=0))


def _xz_size(content: bytes) -> int:
    """With a window of the file's size in place of 64 MiB, which would have to be cleared for each beginning."""
    window = max(4096, len(content))
    chain = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}
    return len(lzma.compress(content, filters=[chain]))


def _ngram_bits(texts: list[bytes], tests: list[np.ndarray], order: int) -> np.ndarray:
    model = ByteNgrams(texts, order)
    return np.stack([model.bits(test.tobytes()) for test in tests])


def _edges(length: int) -> list[int]:
    """The lengths of the beginnings that are compressed: 16, 32, 64, ... and the whole."""
    edges = [SHORTEST]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return [*edges[:-1], length]


def _spread(sizes: np.ndarray, edges: list[int]) -> np.ndarray:
    """``[files, length]`` bits of each byte, from the sizes in bytes of beginnings, ``[files, edges]``."""
    stretches = list(pairwise([0, *edges]))
    added = np.diff(sizes, axis=1, prepend=0)
    widths = np.array([right - left for left, right in stretches])
    return np.repeat(8 * added / widths, widths, axis=1)


def _compressed(tests: list[np.ndarray], size: Callable[[bytes], int]) -> np.ndarray:
    edges = _edges(len(tests[0]))
    return _spread(np.array([[size(test[:edge].tobytes()) for edge in edges] for test in tests]), edges)


def _xz_after(texts: list[bytes], tests: list[np.ndarray]) -> np.ndarray:
    edges = _edges(len(tests[0]))
    about = {"text": sum(map(len, texts)), "files": list(map(len, tests)), "edges": edges}
    data = b"".join([json.dumps(about).encode(), b"\n", *texts, *(test.tobytes() for test in tests)])
    done = subprocess.run([sys.executable, "-I", xz_after_text.__file__], input=data, capture_output=True, check=False)
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise TaskError(
            f"xz after the training text: exit code {done.returncode}" + "".join(f", {line}" for line in last)
        )
    return _spread(np.array(json.loads(done.stdout)), edges)
