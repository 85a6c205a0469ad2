"""Byte-level language modelling of the source files of Python's own standard library, which every machine has.

Files are read in place and split by a hash of their path. A file is the start symbol and then its bytes; a model
predicts each byte from all before it. Training windows of T tokens lie anywhere in a file, some at its beginning.
Validation windows are drawn like those of training, from held-out files, as many at a file's beginning: the two losses
are of the same quantity. Models are tested on other held-out files from the first byte on, far past T if
``eval_length`` says so: only files of at least that many bytes are taken, so that every position is averaged over the
same files.

Left out are tests (half of the bytes, and many distributions strip them), ``encodings`` (a hundred near copies of one
table, which would leak across any split), ``pydoc_data`` (one generated file) and the machine's own build settings.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.tasks.task import IGNORED, SPLITS, Batch, Metric, Task, TaskError, stream, uniforms

START = 256
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
EVALUATION_TOKENS = 16384
BINS_PER_OCTAVE = 2


@dataclass(frozen=True)
class StdlibTextConfig:
    """Options of :class:`StdlibText`.

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


class StdlibText(Task):
    Config = StdlibTextConfig
    name = "stdlib_text"
    title = "Byte-level modelling of Python source"
    reading = (
        "Bits per byte say how many bits a file would take if the model compressed it, so less is better; the curve"
        " shows how prediction improves as more of a file has been read. Beyond the dotted line no model was trained:"
        " whoever stays low there carries its state further than it was taught to."
    )
    metric = Metric("bits_per_byte", "Bits per byte", "bits/byte", higher_is_better=False)

    def __init__(self, config: StdlibTextConfig):
        self.config = config
        self.vocab_size, self.length, self.longest = 257, config.length, config.eval_length
        self.tests = {"test": config.eval_length}

    @cached_property
    def files(self) -> dict[str, dict[str, bytes]]:
        """``{split: {relative path: content}}``, each in the order of the paths' hashes."""
        root = Path(sysconfig.get_path("stdlib"))
        splits: dict[str, dict[str, bytes]] = {split: {} for split in SPLITS}
        for path in sorted(_sources(root), key=_hash):
            split = SPLITS[np.searchsorted([0.8, 0.9], _hash(path), side="right")]
            splits[split][path] = (root / path).read_bytes()
        if not splits["train"]:
            raise TaskError(f"task stdlib_text: no .py files below {root}; it reads Python's own standard library")
        return splits

    @cached_property
    def _joined(self) -> dict[str, Joined]:
        return {split: _join(self.files[split].values(), split) for split in ("train", "validation")}

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
            raise TaskError(f"task stdlib_text: no test file has eval_length = {length} bytes; choose fewer")
        return np.stack([np.frombuffer(content, np.uint8) for content in long[: self.config.test_files]])

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
        asked = targets != IGNORED
        bits, count = (losses.astype(np.float64) * asked).sum(axis=0) / np.log(2), asked.sum(axis=0)
        bins = [(left, right) for left, right in pairwise(position_bins(len(bits))) if count[left:right].any()]
        curve = {
            "x": [float(np.sqrt((left + 1) * right)) for left, right in bins],
            "y": [float(bits[left:right].sum() / count[left:right].sum()) for left, right in bins],
            "x_end": len(bits),
            "x_label": "Position in the file",
            "x_unit": "bytes",
            "trained_to": self.length,
        }
        return {
            "bits_per_byte": float(bits.sum() / count.sum()),
            "accuracy": float(hits[asked].mean()),
            "loss": float(losses[asked].mean()),
            "curve": curve,
        }

    def item_scores(self, targets: np.ndarray, losses: np.ndarray, hits: np.ndarray) -> np.ndarray:
        """The bits per byte of each file or window."""
        asked = targets != IGNORED
        return (losses.astype(np.float64) * asked).sum(axis=1) / asked.sum(axis=1) / np.log(2)

    def chance(self, split: str = "test") -> tuple[float, str]:
        tokens = self._joined["train"].tokens
        counts = np.bincount(tokens[tokens != START], minlength=256) + 1.0
        bits = -np.log2(counts / counts.sum())
        return float(bits[self.held_out()].mean()), "byte frequencies alone"

    def manifest(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for split in SPLITS:
            for path, content in self.files[split].items():
                digest.update(f"{split} {path} {hashlib.sha256(content).hexdigest()}\n".encode())
        described = {
            split: f"{len(contents)} files, {sum(map(len, contents.values())):,} bytes"
            for split, contents in self.files.items()
        }
        source = f"standard library of Python {platform.python_version()}"
        validated = f"{len(self._validation().tokens)} windows of {self.length} tokens"
        evaluated = f"the first {self.config.eval_length} bytes of {len(self.held_out())} test files"
        return {
            "source": source,
            **described,
            "validated on": validated,
            "evaluated on": evaluated,
            "hash": digest.hexdigest(),
        }


def position_bins(length: int) -> list[int]:
    """Edges 0, 1, 2, 3, 4, 6, 8, 12, ... ``length``: equally wide on a logarithmic axis."""
    steps = int(np.ceil(np.log2(length) * BINS_PER_OCTAVE)) if length > 1 else 0
    edges = {round(2 ** (step / BINS_PER_OCTAVE)) for step in range(steps + 1)}
    return sorted({0, length, *(edge for edge in edges if edge < length)})


def _join(contents: Iterable[bytes], split: str) -> Joined:
    """The files that are not empty.

    Raises:
        TaskError: there is none.
    """
    contents = [content for content in contents if content]
    if not contents:
        raise TaskError(f"task stdlib_text: no {split} file has any bytes; it needs a whole standard library")
    parts = [np.frombuffer(content, np.uint8).astype(np.int16) for content in contents]
    tokens = np.concatenate([np.concatenate([np.array([START], np.int16), part]) for part in parts])
    sizes = np.array([len(content) for content in contents])
    return Joined(tokens, np.concatenate([[0], np.cumsum(sizes + 1)[:-1]]), sizes)


def _sources(root: Path) -> Iterator[str]:
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if LEFT_OUT.isdisjoint(relative.parts) and not relative.name.startswith("_sysconfigdata"):
            yield relative.as_posix()


def _hash(path: str) -> float:
    """A number in [0, 1) that depends on the path alone."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64
