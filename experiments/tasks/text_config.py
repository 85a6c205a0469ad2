"""The options of the task ``text``, with all that can be refused before any text is read."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as option
from typing import Any, Literal

from experiments.tasks.task import TaskError
from experiments.tasks.text_documents import LONGEST_CUT
from experiments.tasks.text_files import EXTENSIONS
from experiments.tasks.text_source import check_entry
from experiments.tasks.text_tokens import BYTES, read_tokenizer


@dataclass(frozen=True)
class TextConfig:
    """Options of the task ``text``.

    Attributes:
        path: of the text: a file, a folder, or a pattern as ``notes/**/*.md``.
        sources: several texts in place of ``path``, a mapping for each: its ``path``, its ``weight`` (the share of the
            training windows, of all or of none; by default that of the tokens) and its ``field``.
        length: T, tokens of a window in training, in validation and in the first test.
        documents: ``packed`` trains on windows in an order drawn anew; ``streamed`` goes through documents from end to
            end, window after window, with the model's state carried on within a document (``train.carry_state``).
        test_lengths: other lengths to test at, after training.
        test_from: ``stream`` tests on windows anywhere, as validation does; ``documents`` on the beginnings of
            documents of at least that many tokens.
        validation_tokens, test_tokens: the size of the validation split, and of each test.
        tokenizer: ``bytes``, or the path of a ``tokenizer.json``.
        tokenizer_sha256: that file's; found where it is not given, and a run keeps it.
        vocab_size: number of tokens, with the separator; found where it is not given.
        separator: the name of the tokenizer's token that stands in front of each document; bytes have one of their own.
        field: the key or the column of a row that is its text.
        extensions: how the names of the files end that are read of a folder; all but ``.jsonl``, ``.ndjson``,
            ``.parquet`` and ``.arrow`` are read as text.
        cut: bytes after which a document is cut into documents of their own, at the next line end; 0 for never.
        unusable: what to do with a file or a row that is empty or no text in UTF-8: ``stop``, or ``skip`` it.
        held_out: share of the documents in the validation split, and in the test split.
        data_cache: the folder of the token files; by default ``SEQARCH_TOKENS``, or ``$XDG_CACHE_HOME/seqarch/tokens``.
    """

    path: str = ""
    sources: list[dict[str, Any]] = option(default_factory=list)
    length: int = 512
    documents: Literal["packed", "streamed"] = "packed"
    test_lengths: list[int] = option(default_factory=list)
    test_from: Literal["stream", "documents"] = "stream"
    validation_tokens: int = 65536
    test_tokens: int = 262144
    tokenizer: str = BYTES
    tokenizer_sha256: str = ""
    vocab_size: int = 0
    separator: str = "<|endoftext|>"
    field: str = "text"
    extensions: list[str] = option(default_factory=lambda: list(EXTENSIONS))
    cut: int = 0
    unusable: Literal["stop", "skip"] = "stop"
    held_out: float = 0.1
    data_cache: str = ""

    def __post_init__(self):
        if self.path and self.sources:
            raise ValueError("path and sources are both given; sources lists several texts, path names one")
        for number, entry in enumerate(self.sources):
            check_entry(entry, number)
        if len({"weight" in entry for entry in self.sources}) > 1:
            raise ValueError("sources: a weight is given for some and not for others; give all one, or none")
        self._check_numbers()
        paths = [self.path, self.tokenizer, self.data_cache, *(entry["path"] for entry in self.sources)]
        if wrong := [path for path in paths if path.startswith("~")]:
            raise ValueError(f"{wrong[0]!r} begins with a ~ that the shell did not replace; write $HOME instead")
        if wrong := [each for each in self.extensions if not each.startswith(".") or each != each.lower()]:
            raise ValueError(f"extensions begin with a dot and are in lower case, as .txt, got {wrong[0]!r}")
        if not self.vocab_size or not (self.tokenizer_sha256 or self.tokenizer == BYTES):
            self._find_tokenizer()

    def _check_numbers(self) -> None:
        lengths = [self.length, *self.test_lengths]
        if min(lengths) < 1 or len(set(lengths)) < len(lengths):
            raise ValueError(f"length and test_lengths must be at least 1 and differ, got {lengths}")
        for name in ("validation_tokens", "test_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.held_out < 0.5:
            raise ValueError(f"held_out must be above 0 and below 0.5, got {self.held_out}")
        if not (self.cut == 0 or 64 <= self.cut <= LONGEST_CUT):
            raise ValueError(f"cut must be 0 for never, or from 64 to {LONGEST_CUT} bytes, got {self.cut}")

    def _find_tokenizer(self) -> None:
        """Note what the tokenizer is now, by which a later one is told apart."""
        try:
            found = read_tokenizer(self.tokenizer, self.separator)
        except TaskError as error:
            raise ValueError(f"tokenizer: {error}") from error
        for name, value in (("tokenizer_sha256", found.sha256), ("vocab_size", found.tokens.vocab_size)):
            if getattr(self, name) not in (value, type(value)()):
                raise ValueError(f"{name} is {getattr(self, name)!r}, and that of {self.tokenizer} is {value!r}")
            object.__setattr__(self, name, value)
