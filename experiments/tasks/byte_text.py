"""Language modelling of the bytes of files: what is the same for every source of files.

A file is the start symbol and then its bytes; a model predicts each byte from all before it. Training windows of T
tokens lie anywhere in a training file, some at its beginning. Validation windows are drawn like those of training, from
held-out files, as many at a file's beginning: the two losses are of the same quantity. Models are tested on other
held-out files from the first byte on, far past T if ``eval_length`` says so: only files of at least that many bytes are
taken, so that every position is averaged over the same files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from experiments.tasks.task import IGNORED, SPLITS, Batch, Metric, Task, TaskError, stream, uniforms

START = 256
EVALUATION_TOKENS = 16384
BINS_PER_OCTAVE = 2
WHO_GUESSES = "byte frequencies alone"


@dataclass(frozen=True)
class ByteTextConfig:
    """Options of every :class:`ByteText`.

    Attributes:
        length: T, tokens of a training window.
        eval_length: bytes of each held-out file that models are tested on.
        validation_files: the size of validation: its windows have as many tokens as so many files of ``eval_length``
            bytes, and are drawn from all files that are held out for it.
        test_files: how many held-out files of at least ``eval_length`` bytes are tested on at most.
        from_start: share of the windows of training and validation that begin at a file's first byte.
    """

    length: int = 512
    eval_length: int = 4096
    validation_files: int = 8
    test_files: int = 32
    from_start: float = 0.25

    def __post_init__(self):
        for name in ("length", "eval_length", "validation_files", "test_files"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.from_start <= 1:
            raise ValueError(f"from_start must lie between 0 and 1, got {self.from_start}")


class Joined(NamedTuple):
    """Files end to end, each with its start symbol; where each begins; its number of bytes."""

    tokens: np.ndarray
    begins: np.ndarray
    sizes: np.ndarray


class ByteText(Task):
    """Bytes of the files that :meth:`read` gives; a task of its own says which they are.

    Attributes:
        config: a :class:`ByteTextConfig`.
    """

    reading = (
        "Bits per byte say how many bits a file would take if the model compressed it, so less is better; the curve"
        " shows how prediction improves as more of a file has been read. Beyond the dotted line no model was trained:"
        " whoever stays low there carries its state further than it was taught to."
    )
    metric = Metric("bits_per_byte", "Bits per byte", "bits/byte", higher_is_better=False)
    tokens = "bytes"
    config: Any

    def __init__(self, config: Any):
        self.config = config
        self.vocab_size, self.length, self.longest = 257, config.length, config.eval_length
        self.tests = {"test": config.eval_length}

    def read(self) -> dict[str, dict[str, bytes]]:
        """``{split: {path: content}}`` of every split, each in the order in which files are taken from it.

        Raises:
            TaskError: there are none, or they cannot be read.
        """
        raise TypeError(f"{type(self).__name__} defines no read")

    def source(self) -> dict[str, Any]:
        """What the files are, for the manifest: at least ``source``, in words."""
        raise TypeError(f"{type(self).__name__} defines no source")

    @cached_property
    def files(self) -> dict[str, dict[str, bytes]]:
        """What :meth:`read` gives."""
        return self.read()

    @cached_property
    def _joined(self) -> dict[str, Joined]:
        return {split: self._join(split) for split in ("train", "validation")}

    def _join(self, split: str) -> Joined:
        contents = [content for content in self.files[split].values() if content]
        if not contents:
            raise TaskError(f"task {self.name}: no {split} file has any bytes; more files are needed")
        return join(contents)

    def train_batch(self, seed: int, start: int, size: int) -> Batch:
        u_file, u_start, u_offset = uniforms(stream(seed, "train"), start, size, 3).T
        return self._windows("train", u_file, u_start, u_offset)

    def _windows(self, split: str, u_file: np.ndarray, u_start: np.ndarray, u_offset: np.ndarray) -> Batch:
        """Windows by three numbers in (0, 1): of which file, whether from its first byte on, and where else."""
        tokens, begins, sizes = self._joined[split]
        file = np.searchsorted(np.cumsum(sizes) / sizes.sum(), u_file)
        room = np.maximum(sizes[file] - self.length, 0) + 1
        offset = np.where(u_start < self.config.from_start, 0, (u_offset * room).astype(np.int64))
        within = offset[:, None] + np.arange(self.length + 1)
        window = tokens[np.minimum(begins[file][:, None] + within, len(tokens) - 1)].astype(np.int64)
        # A file shorter than the window ends in start symbols that nobody is asked to predict.
        past = within > sizes[file][:, None]
        window[past] = START
        return Batch(window[:, :-1], np.where(past, IGNORED, window)[:, 1:], ~past[:, :-1])

    def held_out(self) -> np.ndarray:
        """``[files, eval_length]`` bytes of the test files."""
        length = self.config.eval_length
        long = [content[:length] for content in self.files["test"].values() if len(content) >= length]
        if not long:
            raise TaskError(f"task {self.name}: no test file has eval_length = {length} bytes; choose fewer")
        return np.stack([np.frombuffer(content, np.uint8) for content in long[: self.config.test_files]])

    def training_texts(self) -> Iterable[bytes]:
        """The training files in the order of their hashes."""
        return self.files["train"].values()

    def evaluation(self, split: str) -> Iterator[Batch]:
        whole = self._validation() if split == "validation" else self._test()
        rows = max(1, EVALUATION_TOKENS // whole.tokens.shape[1])
        for start in range(0, len(whole.tokens), rows):
            yield whole.rows(slice(start, start + rows))

    def _validation(self) -> Batch:
        """Windows like those of training; the share of those from a file's first byte is ``from_start``, not drawn."""
        count = max(1, self.config.validation_files * self.config.eval_length // self.length)
        u_file, u_offset = uniforms(stream(0, "validation"), 0, count, 2).T
        return self._windows("validation", u_file, (np.arange(count) + 0.5) / count, u_offset)

    def _test(self) -> Batch:
        targets = self.held_out().astype(np.int64)
        return Batch(np.concatenate([np.full((len(targets), 1), START), targets[:, :-1]], axis=1), targets)

    def score(self, targets: np.ndarray, losses: np.ndarray, hits: np.ndarray) -> dict[str, Any]:
        """Means over the bytes that are there; the curve is along a file or, of validation, along a window."""
        axis = {"x_label": "Position in the file", "x_unit": "bytes", "trained_to": self.length}
        return score_bits(targets, losses, hits, axis)

    def item_scores(self, targets: np.ndarray, losses: np.ndarray, hits: np.ndarray) -> np.ndarray:
        """The bits per byte of each file or window."""
        return score_rows(targets, losses)

    def chance(self, split: str = "test") -> tuple[float, str]:
        tokens = self._joined["train"].tokens
        counts = np.bincount(tokens[tokens != START], minlength=256) + 1.0
        bits = -np.log2(counts / counts.sum())
        return float(bits[self.held_out()].mean()), WHO_GUESSES

    def manifest(self) -> dict[str, Any]:
        described = {
            split: f"{len(contents)} files, {sum(map(len, contents.values())):,} bytes"
            for split, contents in self.files.items()
        }
        return {
            **self.source(),
            **described,
            "validated on": f"{len(self._validation().tokens)} windows of {self.length} tokens",
            "evaluated on": f"the first {self.config.eval_length} bytes of {len(self.held_out())} test files",
            "hash": self._hash(),
        }

    def _hash(self) -> str:
        """SHA-256 over the files of every split, their paths and order."""
        digest = hashlib.sha256()
        for split in SPLITS:
            for path, content in self.files[split].items():
                line = f"{split} {path} {hashlib.sha256(content).hexdigest()}\n"
                digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()


def score_bits(
    targets: np.ndarray, losses: np.ndarray, hits: np.ndarray, axis: dict[str, Any], bytes_per_token: float = 1.0
) -> dict[str, Any]:
    """What :meth:`Task.score` returns of a text: means over the targets that are asked for, and the curve along a row.

    Args:
        axis: the curve's ``x_label``, ``x_unit`` and ``trained_to``.
    """
    asked = targets != IGNORED
    bits, count = (losses.astype(np.float64) * asked).sum(axis=0) / np.log(2), asked.sum(axis=0)
    return {
        "bits_per_byte": float(bits.sum() / count.sum() / bytes_per_token),
        "accuracy": float(hits[asked].mean()),
        "loss": float(losses[asked].mean()),
        "curve": {**position_curve(bits / bytes_per_token, count), **axis},
    }


def score_rows(targets: np.ndarray, losses: np.ndarray, bytes_per_token: float = 1.0) -> np.ndarray:
    """``[N]`` float64, the bits per byte of each row; 0 of one of which nothing is asked."""
    asked = targets != IGNORED
    bits = (losses.astype(np.float64) * asked).sum(axis=1) / np.maximum(asked.sum(axis=1), 1) / np.log(2)
    return bits / bytes_per_token


def position_bins(length: int) -> list[int]:
    """Edges 0, 1, 2, 3, 4, 6, 8, 12, ... ``length``: equally wide on a logarithmic axis."""
    steps = int(np.ceil(np.log2(length) * BINS_PER_OCTAVE)) if length > 1 else 0
    edges = {round(2 ** (step / BINS_PER_OCTAVE)) for step in range(steps + 1)}
    return sorted({0, length, *(edge for edge in edges if edge < length)})


def position_curve(sums: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """The means of something in the bins of positions, each at the geometric middle of its positions.

    Args:
        sums, counts: ``[T]``, of the values at each position, and how many there are; a bin without any is left out.

    Returns:
        ``x``, ``y`` and ``x_end`` of a curve, as :meth:`Task.score` has it.
    """
    bins = [(left, right) for left, right in pairwise(position_bins(len(sums))) if counts[left:right].any()]
    return {
        "x": [float(np.sqrt((left + 1) * right)) for left, right in bins],
        "y": [float(sums[left:right].sum() / counts[left:right].sum()) for left, right in bins],
        "x_end": len(sums),
    }


def in_order_of_hash(paths: Any) -> list[str]:
    """Paths in an order that has nothing to do with their names, and is the same everywhere."""
    return sorted(paths, key=path_hash)


def path_hash(path: str) -> float:
    """A number in [0, 1) that depends on the path alone."""
    return int.from_bytes(hashlib.sha256(path.encode(errors="surrogateescape")).digest()[:8], "big") / 2**64


def split_of(path: str, validation: float = 0.1, test: float = 0.1) -> str:
    """The split of a path, by its hash.

    Args:
        validation, test: shares of the paths in these splits.
    """
    return split_at(path_hash(path), validation, test)


def split_at(number: float, validation: float, test: float) -> str:
    """The split of what has this number in [0, 1); shares as of :func:`split_of`."""
    return SPLITS[np.searchsorted([1 - test - validation, 1 - test], number, side="right")]


def join(contents: Iterable[bytes]) -> Joined:
    """Files end to end; none is empty."""
    parts = [np.frombuffer(content, np.uint8).astype(np.int16) for content in contents]
    tokens = np.concatenate([np.concatenate([np.array([START], np.int16), part]) for part in parts])
    sizes = np.array([len(content) for content in contents])
    return Joined(tokens, np.concatenate([[0], np.cumsum(sizes + 1)[:-1]]), sizes)
