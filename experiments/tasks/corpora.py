"""Texts that anybody can have: a table of Debian packages, and reading what ``python -m experiments.corpora`` fetched.

A fetched corpus is a folder of its own in the cache: ``documents`` with the plain files, ``index.txt`` with the
SHA-256, the bytes and the path of each, ``manifest.json`` with what it is. The hash of a corpus is that of its index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.tasks.documents import html, pieces, plain, sequences
from experiments.tasks.task import TaskError
from experiments.util.paths import user_cache

DOCUMENTS, INDEX, MANIFEST = "documents", "index.txt", "manifest.json"
FETCH = "python -m experiments.corpora fetch"


@dataclass(frozen=True)
class Corpus:
    """A corpus that is made of a Debian package.

    Attributes:
        package: its name, from whatever release of Debian this machine has.
        root: the folder in the package below which its files lie; their paths are named from there.
        pattern: a regular expression that the whole path below ``root`` matches.
        title: what it is, in words.
        licence: of these files, as the package's copyright file says.
        documents: from a file's path and content to the paths and contents of its documents.
    """

    package: str
    root: str
    pattern: str
    title: str
    licence: str
    documents: Callable[[str, bytes], Iterator[tuple[str, bytes]]] = plain


CORPORA = {
    "linux-doc-6.1": Corpus(
        package="linux-doc-6.1",
        root="usr/share/doc/linux-doc-6.1/html/_sources",
        pattern=r"(?!translations/).*\.rst\.txt",
        title="Documentation of the Linux kernel 6.1, reStructuredText, in English",
        licence="GPL-2",
    ),
    "golang-1.19-src": Corpus(
        package="golang-1.19-src",
        root="usr/share/go-1.19/src",
        pattern=r"(?!(.*/)?(vendor|testdata)/|(.*/)?z(errors|syscall|sysnum|types)_).*\.go",
        title="Source code of Go 1.19 and its standard library, without tables made by programs",
        licence="Go's (BSD-3-Clause)",
    ),
    "metamath-databases": Corpus(
        package="metamath-databases",
        root="usr/share/metamath/databases",
        pattern=r"set\.mm",
        title="Formal proofs of Metamath's set.mm with their comments, in pieces of 128 KiB",
        licence="CC0-1.0",
        documents=pieces,
    ),
    "python3.11-doc": Corpus(
        package="python3.11-doc",
        root="usr/share/doc/python3.11/html/_sources",
        pattern=r".*\.rst\.txt",
        title="Documentation of Python 3.11, reStructuredText",
        licence="Python's (PSF-2.0)",
    ),
    "perl-doc": Corpus(
        package="perl-doc",
        root="usr/share/perl",
        pattern=r".*\.pod",
        title="Documentation of Perl, POD",
        licence="GPL-1+ or Artistic",
    ),
    "anarchism": Corpus(
        package="anarchism",
        root="usr/share/doc/anarchism/html",
        pattern=r".*\.html",
        title="An Anarchist FAQ, essays in English, the text of HTML pages",
        licence="GPL-2",
        documents=html,
    ),
    "ustilago-dna": Corpus(
        package="maffilter-examples",
        root="usr/share/doc/maffilter/examples/Umaydis",
        pattern=r"Umaydis\.fasta\.gz",
        title="The genome of the fungus Ustilago maydis, letters ACGTN, in pieces of 128 Ki bases",
        licence="CeCILL",
        documents=sequences,
    ),
}
"""The corpora, by the names under which they are fetched and read."""


def cache_folder() -> Path:
    """Where corpora are kept: ``SEQARCH_CORPORA``, or ``seqarch/corpora`` in the user's cache."""
    return user_cache("corpora", "SEQARCH_CORPORA")


def index_of(documents: Mapping[str, bytes]) -> str:
    """The index: a line per document with its SHA-256, bytes and path, in the order of the paths."""
    lines = (
        f"{hashlib.sha256(documents[path]).hexdigest()} {len(documents[path])} {path}" for path in sorted(documents)
    )
    return "".join(f"{line}\n" for line in lines)


def documents_hash(documents: Mapping[str, bytes]) -> str:
    """SHA-256 over all documents and their paths: that of the index."""
    return hashlib.sha256(index_of(documents).encode(errors="surrogateescape")).hexdigest()


def corpus_manifest(name: str, cache: Path) -> dict[str, Any]:
    """What is recorded of a fetched corpus.

    Raises:
        TaskError: it was not fetched, or its manifest cannot be read.
    """
    file = cache / name / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TaskError(
            f"corpus {name!r} is not in {cache}; fetch it with `{FETCH} {name}`, or read a folder of your own:"
            " task.folder=PATH"
        ) from None
    except (OSError, ValueError) as error:
        raise TaskError(f"cannot read {file} ({error}); {_anew(name)}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("sha256"), str):
        raise TaskError(f"{file} is no manifest of a corpus; {_anew(name)}")
    return manifest


def read_corpus(name: str, cache: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The documents of a fetched corpus by their paths, each as it was fetched, and the manifest.

    Raises:
        TaskError: it was not fetched, or a file of it is gone or has changed since.
    """
    manifest, folder = corpus_manifest(name, cache), cache / name
    documents: dict[str, bytes] = {}
    for path in indexed(name, cache):
        try:
            documents[path] = (folder / DOCUMENTS / path).read_bytes()
        except OSError as error:
            raise TaskError(f"cannot read {folder / DOCUMENTS / path} ({error.strerror}); {_anew(name)}") from error
    if (found := documents_hash(documents)) != manifest["sha256"]:
        raise TaskError(
            f"corpus {name!r} in {folder} changed since it was fetched: its files hash to {found[:16]}..., its manifest"
            f" says {manifest['sha256'][:16]}...; {_anew(name)}"
        )
    return documents, manifest


def indexed(name: str, cache: Path) -> list[str]:
    """The paths of a fetched corpus's documents.

    Raises:
        TaskError: its index cannot be read.
    """
    file = cache / name / INDEX
    try:
        return [line.split(" ", 2)[2] for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, IndexError) as error:
        raise TaskError(f"cannot read {file} ({error}); {_anew(name)}") from error


def _anew(name: str) -> str:
    return f"fetch it anew: `{FETCH} --again {name}`"
