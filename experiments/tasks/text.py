"""Language modelling of text of one's own: a folder, files, a pattern, rows of ``.jsonl``, Parquet or a saved data set.

A document is a file, or a row. Its bytes are the tokens, or those of a ``tokenizer.json``. Documents are packed: they
stand end to end, each after a separator, and a window of T tokens may lie in several; a model predicts every token of a
window from those before it, the separators too, so that it learns where a document ends. Nothing is carried from one
window to the next (``train.bptt`` carries states within one). A pass takes every token of the training split once, in
windows whose order and places are drawn anew.

With ``documents: streamed`` each row of a batch goes through documents in turn, one window a step: its state goes on
from window to window, without gradients, and is the initial one where a document begins, within a window too
(truncated backpropagation through time). The order of the documents is drawn anew in each pass; rows share a pass out
in parts of one length, so that one of them may begin within a document, with the initial state. That is of training
alone: validation and tests are the same as of packed documents.

Documents are split by a hash of their content: one stays in its split when others are added, and copies of it follow it
there. Validation reads windows of T tokens of held-out documents, evenly over them; tests read windows of other
held-out documents at T and at every ``test_lengths``, or with ``test_from: documents`` the beginnings of those that are
as long. There, separators are not asked for: bits per byte are those of the text alone, for any tokenizer by the bytes
that a token stands for in the test split on average.

Text is tokenised once, into files that all runs on this machine share (``experiments/tasks/token_cache.py``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from experiments.tasks.byte_text import EVALUATION_TOKENS, score_bits, score_rows
from experiments.tasks.task import IGNORED, SPLITS, Batch, Metric, Task, TaskError
from experiments.tasks.text_config import TextConfig
from experiments.tasks.text_documents import Reading
from experiments.tasks.text_order import deal, dealt, key_of, window_starts
from experiments.tasks.text_source import Source, check_size, weights
from experiments.tasks.text_stream import Walk, stretches
from experiments.tasks.text_tokens import BYTES, TokenizerFile, read_tokenizer
from experiments.tasks.token_cache import cache_folder

COUNTED = 1 << 20
"""Training tokens by which the guess of who knows frequencies alone is measured."""


class Text(Task):
    Config = TextConfig
    name = "text"
    title = "Language modelling of one's own text"
    reading = (
        "Bits per byte say how many bits a byte of text would take if the model compressed it, so less is better; the"
        " curve shows how prediction improves as more of a window has been read. Beyond the dotted line no model was"
        " trained: whoever stays low there carries its state further than it was taught to."
    )
    metric = Metric("bits_per_byte", "Bits per byte", "bits/byte", higher_is_better=False)
    test_options = ("test_lengths",)
    config: TextConfig
    _walked: tuple[tuple[int, int], Walk] | None = None

    def __init__(self, config: TextConfig):
        self.config, self.vocab_size, self.length = config, config.vocab_size, config.length
        self.tests = {"test": config.length, **{f"test_{length}": length for length in config.test_lengths}}
        self.longest = max(self.tests.values())
        self.continues = config.documents == "streamed"

    @property
    def tokens(self) -> str | None:
        """``bytes`` where tokens below 256 are these; ``None`` where ``tokenizer.json`` says what they are."""
        return BYTES if self.config.tokenizer == BYTES else None

    @cached_property
    def tokenizer(self) -> TokenizerFile:
        """The tokenizer, sure to be the one of the configuration.

        Raises:
            TaskError: it is another one by now, or gone.
        """
        config = self.config
        found = read_tokenizer(config.tokenizer, config.separator)
        if (found.sha256, found.tokens.vocab_size) != (config.tokenizer_sha256, config.vocab_size):
            raise TaskError(
                f"task text: the tokenizer {config.tokenizer} changed: it has {found.tokens.vocab_size} tokens and the"
                f" SHA-256 {found.sha256[:16]}..., and this run's has {config.vocab_size} and"
                f" {config.tokenizer_sha256[:16]}...; bring that one back (the run's folder has a copy)"
            )
        return found

    @cached_property
    def sources(self) -> list[Source]:
        """Where the text is from.

        Raises:
            TaskError: nothing is given.
        """
        config = self.config
        entries = config.sources or ([{"path": config.path}] if config.path else [])
        if not entries:
            raise TaskError("task text: no text is given: task.path=PATH names a file, a folder or a pattern")
        return [
            Source(
                entry["path"],
                entry.get("weight"),
                Reading(entry.get("field", config.field), config.cut, config.held_out, config.unusable == "skip"),
                tuple(config.extensions),
                self.tokenizer,
                cache_folder(config.data_cache),
            )
            for entry in entries
        ]

    @cached_property
    def shares(self) -> list[float]:
        """The share of each source in training and validation windows; adds up to 1.

        Raises:
            TaskError: a source has too little text for a window of training or validation.
        """
        for source in self.sources:
            check_size(source, "train", self.length, "length")
            check_size(source, "validation", self.length, "length")
        found = weights(self.sources)
        return [each / sum(found) for each in found]

    @cached_property
    def _dealt(self) -> np.ndarray:
        try:
            return dealt(self.shares)
        except ValueError as error:
            raise TaskError(f"task text: {error}; join it to another, or give it more weight") from error

    def train_batch(self, seed: int, start: int, size: int) -> Batch:
        which, within = deal(seed, np.arange(start, start + size), self._dealt)
        windows = np.empty((size, self.length + 1), np.int64)
        for number, source in enumerate(self.sources):
            of, stream = which == number, source.streams["train"]
            if of.any():
                key = key_of(seed, f"source {number}")
                starts = window_starts(key, within[of], stream.count, self.length)
                windows[of] = stream.windows(starts, self.length + 1)
        return Batch(windows[:, :-1], windows[:, 1:])

    def continued_batch(self, seed: int, number: int, rows: int, first: int, size: int) -> Batch:
        walk = self._walk(seed, rows)
        windows, begins = np.empty((size, self.length + 1), np.int64), np.zeros((size, self.length + 1), np.bool_)
        for row in range(size):
            pieces, begins[row, 0] = walk.window(first + row, number)
            at = 0
            for piece in pieces:
                stream, end = self.sources[piece.source].streams["train"], at + piece.end - piece.start
                windows[row, at:end] = stream.windows(np.array([piece.start]), end - at)[0]
                found = stream.document_begins(piece.first, piece.last) - piece.start
                begins[row, at + found[(found >= 0) & (found < end - at)]] = True
                at = end
        return Batch(windows[:, :-1], windows[:, 1:], begins=begins[:, :-1])

    def _walk(self, seed: int, rows: int) -> Walk:
        known = (seed, rows)
        if self._walked is None or self._walked[0] != known:
            parts = [stretches(source.streams["train"].begins()) for source in self.sources]
            try:
                self._walked = known, Walk(seed, parts, self.shares, rows, self.length)
            except ValueError as error:
                raise TaskError(f"task text: {error}") from error
        return self._walked[1]

    def evaluation(self, split: str) -> Iterator[Batch]:
        length = self.length if split == "validation" else self.tests[split]
        places = self._places(split, length)
        rows = max(1, EVALUATION_TOKENS // length)
        for number, starts in places:
            stream = self.sources[number].streams["validation" if split == "validation" else "test"]
            for first in range(0, len(starts), rows):
                windows = stream.windows(starts[first : first + rows], length + 1)
                targets = windows[:, 1:]
                asked = np.where(targets == self.tokenizer.tokens.separator, IGNORED, targets)
                yield Batch(windows[:, :-1], asked)

    def _places(self, split: str, length: int) -> list[tuple[int, np.ndarray]]:
        """Of each source that is evaluated on, its number and where windows of ``length + 1`` tokens begin."""
        is_validation = split == "validation"
        whole = self.config.validation_tokens if is_validation else self.config.test_tokens
        option_of, places = {"validation": "length", "test": "length"}, []
        for number, (source, share) in enumerate(zip(self.sources, self.shares, strict=True)):
            wanted = max(1, round(share * whole / length))
            if is_validation or self.config.test_from == "stream":
                check_size(
                    source, "validation" if is_validation else "test", length, option_of.get(split, "test_lengths")
                )
                count = (source.streams["validation" if is_validation else "test"].count - 1) // length
                starts = np.unique(np.arange(min(wanted, count)) * count // min(wanted, count)) * length
            else:
                starts = _evenly(self._long_documents(source, length), wanted)
            if len(starts):
                places.append((number, starts))
        if not places:
            raise TaskError(
                f"task text: no test document has {length} tokens (test_from is documents); choose fewer, or"
                " task.test_from=stream"
            )
        return places

    def _long_documents(self, source: Source, length: int) -> np.ndarray:
        """Where the test documents of at least ``length`` tokens begin."""
        begins = source.streams["test"].begins()
        return begins[:-1][np.diff(begins) > length]

    def held_out(self) -> np.ndarray:
        """``[documents, T]`` uint8, the beginnings of test documents that the longest test reads.

        Raises:
            TaskError: the tokens are no bytes, or the tests are of windows anywhere.
        """
        if self.config.tokenizer != BYTES or self.config.test_from != "documents":
            raise TaskError("task text: baselines are for tokenizer: bytes and test_from: documents")
        longest = max(self.tests, key=lambda split: self.tests[split])
        return np.concatenate([batch.targets for batch in self.evaluation(longest)]).astype(np.uint8)

    def training_texts(self) -> Iterator[bytes]:
        """The training documents of each source in their order; the tokens are bytes."""
        for source in self.sources:
            stream = source.streams["train"]
            for begin, end in pairwise(stream.begins().tolist()):
                yield stream.windows(np.array([begin + 1]), end - begin - 1).astype(np.uint8).tobytes()

    @cached_property
    def bytes_per_token(self) -> float:
        """Of the text in the test split, separators aside; 1 for bytes."""
        streams = [source.streams["test"] for source in self.sources]
        return sum(each.bytes for each in streams) / sum(each.count - each.documents for each in streams)

    def score(self, targets: np.ndarray, losses: np.ndarray, hits: np.ndarray) -> dict[str, Any]:
        """Means over the tokens of text; the curve is along a window."""
        unit = "bytes" if self.config.tokenizer == BYTES else "tokens"
        axis = {"x_label": "Position in the window", "x_unit": unit, "trained_to": self.length}
        return score_bits(targets, losses, hits, axis, self.bytes_per_token)

    def item_scores(self, targets: np.ndarray, losses: np.ndarray, hits: np.ndarray) -> np.ndarray:
        """The bits per byte of each window."""
        return score_rows(targets, losses, self.bytes_per_token)

    def chance(self, split: str = "test") -> tuple[float, str]:
        counts = np.ones(self.vocab_size)
        for source, share in zip(self.sources, self.shares, strict=True):
            stream = source.streams["train"]
            taken = min(stream.count, max(1, int(share * COUNTED)))
            counts += np.bincount(stream.windows(np.zeros(1, np.int64), taken)[0], minlength=self.vocab_size)
        counts[self.tokenizer.tokens.separator] = 1
        bits = -np.log2(counts / counts.sum())
        asked = np.concatenate([batch.targets[batch.targets != IGNORED] for batch in self.evaluation(split)])
        return float(bits[asked].mean() / self.bytes_per_token), "token frequencies alone"

    def manifest(self) -> dict[str, Any]:
        config, totals = self.config, {split: {"documents": 0, "tokens": 0} for split in SPLITS}
        for source in self.sources:
            for split, count in source.token_files.about["splits"].items():
                totals[split] = {key: totals[split][key] + count[key] for key in totals[split]}
        files, size = sum(len(each.files) for each in self.sources), sum(each.size for each in self.sources)
        named = "" if config.tokenizer == BYTES else f" of {config.tokenizer}, {config.tokenizer_sha256}"
        found: dict[str, Any] = {
            "source": ", ".join(
                each.path + (f" (weight {each.weight:g})" if each.weight else "") for each in self.sources
            ),
            "files": f"{files:,} files, {size:,} bytes",
            "tokens": f"{self.vocab_size}{named or ', bytes'}; the separator is {self.tokenizer.tokens.separator}",
            **{split: "{documents:,} documents, {tokens:,} tokens".format(**each) for split, each in totals.items()},
        }
        for split in ("validation", *self.tests):
            windows = sum(len(starts) for _, starts in self._places(split, self.tests.get(split, self.length)))
            found[f"{split} windows"] = f"{windows} of {self.tests.get(split, self.length)} tokens"
        if left_out := sum(each.token_files.about["left_out"] for each in self.sources):
            found["left out as no text"] = f"{left_out} files and rows"
        return {**found, "hash": hashlib.sha256(self._listing().encode(errors="surrogateescape")).hexdigest()}

    def _listing(self) -> str:
        """Every file, under the path of its source, and the tokenizer: all that runs are trained and evaluated on."""
        parts = [f"{self.config.tokenizer_sha256 or BYTES} {self.config.vocab_size} tokenizer\n"]
        for source in self.sources:
            parts.append(source.listing)
        return "".join(parts)

    def kept_files(self) -> dict[str, bytes]:
        listed = {"data_files.txt": self._listing().encode(errors="surrogateescape")}
        return listed if self.config.tokenizer == BYTES else {**listed, "tokenizer.json": self.tokenizer.content}


def _evenly(places: np.ndarray, most: int) -> np.ndarray:
    """At most so many of these places, spread evenly over them."""
    count = min(len(places), most)
    return places[np.arange(count) * len(places) // max(count, 1)]
