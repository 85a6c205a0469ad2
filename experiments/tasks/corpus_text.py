"""Byte-level language modelling of a corpus that was fetched, or of any folder of files.

``python -m experiments.corpora fetch NAME`` fetches a corpus; ``folder`` names files of one's own, which are read as
the bytes that they are. Files are split by a hash of their path. A held-out file of which more than ``most_copied`` is
in training files, too (windows of 32 bytes, as in ``experiments/tasks/near_duplicates.py``), is left out, and the
manifest says how many were.

Windows of training and validation and the first bytes of test files are drawn as in ``stdlib_text``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from experiments.tasks.byte_text import ByteText, ByteTextConfig, in_order_of_hash, split_of
from experiments.tasks.corpora import CORPORA, cache_folder, documents_hash, read_corpus
from experiments.tasks.near_duplicates import copied_shares
from experiments.tasks.task import SPLITS, TaskError
from experiments.tasks.text_files import paths_below, why_unusable

RECORDED = ("package", "version", "architecture", "licence", "sha256")
"""What a run records of a corpus's manifest."""


@dataclass(frozen=True)
class CorpusTextConfig(ByteTextConfig):
    """Options of :class:`CorpusText`.

    Attributes:
        corpus: the name of a corpus that was fetched.
        folder: of files of one's own, read in place of the corpus; those below hidden folders and of hidden names are
            left out.
        glob: which files of the folder, as ``*.txt`` or ``chapters/**/*.md``; one without a ``/`` is of names in any
            folder below.
        unusable: what to do with an empty file of the folder, or one that is no text (it holds a zero byte): ``stop``,
            or ``skip`` it.
        sha256: what the files must hash to, or a beginning of that; empty for any. A corpus's is in its manifest, and
            the record of every run has it.
        held_out: share of the files in the validation split, and in the test split.
        held_out_long: share in the test split of the files of at least ``eval_length`` bytes, which may be few.
        most_copied: share of a held-out file that training files may have, too; 1 for all of it.
    """

    corpus: str = "linux-doc-6.1"
    folder: str = ""
    glob: str = "*"
    unusable: Literal["stop", "skip"] = "stop"
    sha256: str = ""
    held_out: float = 0.1
    held_out_long: float = 0.25
    most_copied: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not self.folder and self.corpus not in CORPORA:
            raise ValueError(f"corpus must be one of {', '.join(CORPORA)}, or folder a path, got {self.corpus!r}")
        if not re.fullmatch("[0-9a-f]{0,64}", self.sha256):
            raise ValueError(f"sha256 must be up to 64 digits of 0-9a-f, got {self.sha256!r}")
        if not 0 < self.held_out < 0.5:
            raise ValueError(f"held_out must be above 0 and below 0.5, got {self.held_out}")
        if not 0 < self.held_out_long < 1 - self.held_out:
            most = 1 - self.held_out
            raise ValueError(
                f"held_out_long must be above 0 and below 1 - held_out = {most:g}, got {self.held_out_long}"
            )
        if not 0 <= self.most_copied <= 1:
            raise ValueError(f"most_copied must lie between 0 and 1, got {self.most_copied}")
        if not self.glob.strip("/"):
            raise ValueError(f"glob must be a pattern of paths, got {self.glob!r}")


class CorpusText(ByteText):
    Config = CorpusTextConfig
    name = "corpus_text"
    title = "Byte-level modelling of a corpus"
    config: CorpusTextConfig

    @cached_property
    def _documents(self) -> tuple[dict[str, bytes], dict[str, Any]]:
        """All documents by their paths, and what the manifest says of where they are from."""
        if self.config.folder:
            folder = Path(self.config.folder)
            documents, skipped = read_folder(folder, self.config.glob, self.config.unusable)
            found = documents_hash(documents)
            about: dict[str, Any] = {"source": f"{self.config.glob} in {folder}", "sha256": found}
            about |= {"skipped as empty or no text": skipped} if skipped else {}
        else:
            documents, manifest = read_corpus(self.config.corpus, cache_folder())
            found = manifest["sha256"]
            about = {"source": CORPORA[self.config.corpus].title, **{key: manifest[key] for key in RECORDED}}
        if not found.startswith(self.config.sha256):
            what = self.config.folder or f"corpus {self.config.corpus!r}"
            raise TaskError(
                f"task corpus_text: {what} is another than the one asked for: it hashes to {found[:16]}..., and"
                f" task.sha256 is {self.config.sha256[:16]}...; bring that version back, or leave sha256 empty"
            )
        return documents, about

    @cached_property
    def _split(self) -> tuple[dict[str, dict[str, bytes]], int]:
        """The files of every split, and how many held-out ones are left out as copies."""
        documents, _ = self._documents
        splits: dict[str, dict[str, bytes]] = {split: {} for split in SPLITS}
        for path in in_order_of_hash(documents):
            splits[self._split_of(path, len(documents[path]))][path] = documents[path]
        if not splits["train"]:
            raise TaskError(f"task corpus_text: no file is in the train split, of {len(documents)}; more are needed")
        longest = max(map(len, splits["train"].values()))
        if longest < self.length:
            raise TaskError(
                f"task corpus_text: length = {self.length}, and the longest training file has {longest} bytes; choose"
                " at most that"
            )
        held_out = [(split, path) for split in SPLITS[1:] for path in splits[split]]
        if self.config.most_copied == 1:
            return splits, 0
        shares = copied_shares((documents[path] for _, path in held_out), splits["train"].values())
        copies = [each for each, share in zip(held_out, shares, strict=True) if share > self.config.most_copied]
        for split, path in copies:
            del splits[split][path]
        return splits, len(copies)

    def _split_of(self, path: str, size: int) -> str:
        long = size >= self.config.eval_length
        return split_of(path, self.config.held_out, self.config.held_out_long if long else self.config.held_out)

    def read(self) -> dict[str, dict[str, bytes]]:
        return self._split[0]

    def source(self) -> dict[str, Any]:
        about = self._documents[1]
        return {**about, "left out as copies of training files": self._split[1]}


def read_folder(folder: Path, glob: str, unusable: str) -> tuple[dict[str, bytes], int]:
    """The files of a folder by their paths below it, and how many were skipped.

    Args:
        glob, unusable: as of :class:`CorpusTextConfig`.

    Raises:
        TaskError: there is no such folder, no file matches, or one cannot be used.
    """
    if not folder.is_dir():
        raise TaskError(f"task corpus_text: folder {folder}: there is no such folder")
    documents: dict[str, bytes] = {}
    skipped = 0
    for path in paths_below(folder, glob, "task corpus_text"):
        try:
            content = (folder / path).read_bytes()
        except OSError as error:
            raise TaskError(f"task corpus_text: cannot read {folder / path}: {error.strerror}") from error
        wrong = why_unusable(content)
        if wrong and unusable == "stop":
            raise TaskError(
                f"task corpus_text: {folder / path} {wrong}; leave it out by task.glob, or all such by"
                " task.unusable=skip"
            )
        if wrong:
            skipped += 1
        else:
            documents[path] = content
    if not documents:
        of = f", of which {skipped} are empty or no text" if skipped else ""
        raise TaskError(f"task corpus_text: no file of {folder} that can be read matches glob = {glob!r}{of}")
    return documents, skipped
