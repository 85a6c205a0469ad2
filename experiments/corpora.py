"""Corpora for text: lists them, fetches them from Debian packages without installing any, and measures baselines.

    seqarch corpora list
    seqarch corpora fetch linux-doc-6.1 ustilago-dna
    seqarch corpora show linux-doc-6.1
    seqarch corpora baselines linux-doc-6.1 --length 65536
    seqarch corpora baselines my/folder --length 1024
    seqarch corpora path

They are kept in SEQARCH_CORPORA, or seqarch/corpora in the user's cache; --cache names another folder. Exit codes: 0
all is done, 1 something could not be had, and is named.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.tasks import TaskError
from experiments.tasks.corpora import (
    CORPORA,
    DOCUMENTS,
    INDEX,
    MANIFEST,
    cache_folder,
    corpus_manifest,
    documents_hash,
    index_of,
    indexed,
    read_corpus,
)
from experiments.tasks.corpus_text import CorpusText, CorpusTextConfig
from experiments.tasks.text import Text, TextConfig
from experiments.tasks.text_baselines import HIGHEST_ORDER, text_baselines
from experiments.util import owned
from experiments.util.debian_package import download, fields, files
from experiments.util.errors import RunnerError, StorageError, choices_hint, writing
from experiments.util.files import make_folder, write_atomic, write_json
from experiments.util.output import console, exit_code
from experiments.util.process_identity import is_of_the_dead, mark
from experiments.util.program import program

CORPUS, WORKSHOP = "corpus", "workshop of a corpus"
"""The purposes of a fetched corpus's folder, and of the one in which it is made."""
ASIDE = re.compile(r"\.[\w.+-]+\.\d+-\w+-[0-9a-f]{8}\.tmp")
IN_WORKSHOP = re.compile(r"owner\.json|(apt|package|new|old)/.*")
LENGTHS = (4096, 16384, 65536)
WIDE = 200


def fetch(name: str, cache: Path, again: bool = False) -> dict[str, Any]:
    """Fetch a corpus that is not there, whole or not at all; its manifest.

    It is made in a folder beside, which only this process writes to, and renamed in the end: a process that is killed
    leaves nothing that is taken for a corpus, and the next one removes what it left.

    Args:
        again: in place of the one that is there, which stays until the new one is whole.

    Raises:
        RunnerError: the package cannot be had, or what is there is not this command's.
        TaskError: what is there is damaged.
    """
    final = cache / name
    if os.path.lexists(final) and not again:
        return read_corpus(name, cache)[1]
    make_folder(cache)
    remove_leftovers(cache)
    if again and os.path.lexists(final):
        _check_own(name, cache)
    aside = cache / f".{name}.{mark()}.tmp"
    owned.make(aside, WORKSHOP)
    try:
        with writing(aside):
            for part in ("package", "new", "old"):
                (aside / part).mkdir()
        package = download(CORPORA[name].package, aside / "package", aside / "apt")
        _make(name, package, aside / "new" / name)
        _put(aside, final, again)
    finally:
        owned.remove(aside, IN_WORKSHOP)
    return corpus_manifest(name, cache)


def _make(name: str, package: Path, folder: Path) -> None:
    """The corpus of a package, in a folder that is not there yet."""
    corpus = CORPORA[name]
    documents: dict[str, bytes] = {}
    left_out = 0
    for path, content in files(package, corpus.root):
        if not re.fullmatch(corpus.pattern, path):
            continue
        try:
            made = dict(corpus.documents(path, content))
        except ValueError as error:
            raise RunnerError(f"package {corpus.package}: {error}") from error
        usable = {each: text for each, text in made.items() if text and b"\0" not in text and _stays_below(each)}
        left_out += len(made) - len(usable)
        documents |= usable
    if not documents:
        raise RunnerError(f"package {corpus.package} has no file below {corpus.root} that matches {corpus.pattern}")
    about = fields(package, "Package", "Version", "Architecture")
    owned.make(folder, CORPUS)
    with writing(folder):
        for path, content in documents.items():
            (folder / DOCUMENTS / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / DOCUMENTS / path).write_bytes(content)
    write_atomic(folder / INDEX, index_of(documents))
    manifest = {
        "corpus": name,
        **{key.lower(): value for key, value in about.items()},
        "title": corpus.title,
        "licence": corpus.licence,
        "files": len(documents),
        "bytes": sum(map(len, documents.values())),
        "left_out": left_out,
        "sha256": documents_hash(documents),
    }
    write_json(folder / MANIFEST, manifest)


def _stays_below(path: str) -> bool:
    """Whether a path leads to something below the folder from which it starts, on one line of the index."""
    return not path.startswith("/") and ".." not in PurePosixPath(path).parts and path.isprintable()


def _put(aside: Path, final: Path, again: bool) -> None:
    """Rename a corpus that is whole to its place; one that another process put there meanwhile stays."""
    with writing(final):
        if again:
            with suppress(FileNotFoundError):  # Nothing was there, or another process is replacing it, too.
                os.rename(final, aside / "old" / final.name)
        try:
            os.rename(aside / "new" / final.name, final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def _check_own(name: str, cache: Path) -> None:
    """Refuse to replace a folder that holds anything but what a fetch wrote."""
    folder = cache / name
    advice = "nothing is removed; move it away"
    if owned.maker(folder, CORPUS) is None:
        raise StorageError(f"{folder} is not a folder that `fetch` made; {advice}")
    try:
        documents = {f"{DOCUMENTS}/{path}" for path in indexed(name, cache)}
    except TaskError:
        documents = set()
    folders = {f"{above}/" for path in documents for above in PurePosixPath(path).parents}
    ours = {owned.MARKER, INDEX, MANIFEST, *documents, *folders}
    if strange := [path for path in owned.contents(folder) if path not in ours]:
        raise StorageError(f"{folder} holds {strange[0]}, which `fetch` did not write; {advice}")


def remove_leftovers(cache: Path) -> None:
    """Remove what killed processes left of corpora that they were fetching."""
    for path in sorted(cache.glob(".*.tmp")):
        if ASIDE.fullmatch(path.name) and is_of_the_dead(path) and owned.maker(path, WORKSHOP) is not None:
            owned.remove(path, IN_WORKSHOP)


def list_corpora(screen: Console, arguments: argparse.Namespace) -> int:
    table = Table("Corpus", "Package", "Fetched", "Files", "Bytes", "Licence", "What it is", box=SIMPLE_HEAD)
    for name, corpus in CORPORA.items():
        try:
            manifest = corpus_manifest(name, arguments.cache)
        except TaskError:
            manifest = {}
        numbers = [f"{manifest[key]:,}" if key in manifest else "" for key in ("files", "bytes")]
        version = str(manifest.get("version", "no"))
        table.add_row(name, corpus.package, version, *numbers, corpus.licence, corpus.title)
    screen.print(table)
    screen.print(f"in {arguments.cache}", soft_wrap=True)
    return 0


def fetch_corpora(screen: Console, arguments: argparse.Namespace) -> int:
    worst = 0
    for name in dict.fromkeys(arguments.names):
        try:
            manifest = fetch(name, arguments.cache, arguments.again)
        except RunnerError as error:
            own = "any folder of files of your own does: task=corpus_text task.folder=PATH"
            print(f"error: corpus {name}: {error}. Without it, {own}", file=sys.stderr, flush=True)
            worst = 1
            continue
        what = f"{manifest['package']} {manifest['version']} ({manifest['architecture']})"
        size = f"{manifest['files']:,} files, {manifest['bytes']:,} bytes"
        screen.print(f"{name}: {what}, {size}, {manifest['sha256'][:16]}, in {arguments.cache / name}", soft_wrap=True)
    return worst


def show_corpus(screen: Console, arguments: argparse.Namespace) -> int:
    (name,) = arguments.names
    documents, manifest = read_corpus(name, arguments.cache)
    screen.print(arguments.cache / name, soft_wrap=True)
    for key, value in manifest.items():
        screen.print(f"  {key}: {value:,}" if isinstance(value, int) else f"  {key}: {value}", soft_wrap=True)
    sizes = [len(content) for content in documents.values()]
    for length in LENGTHS:
        screen.print(f"  files of at least {length:,} bytes: {sum(size >= length for size in sizes)}")
    return 0


def show_path(screen: Console, arguments: argparse.Namespace) -> int:
    screen.print(arguments.cache, soft_wrap=True)
    return 0


def show_baselines(screen: Console, arguments: argparse.Namespace) -> int:
    (name,) = arguments.names
    os.environ["SEQARCH_CORPORA"] = str(arguments.cache)
    task = _measured(name, arguments)
    found = text_baselines(task, arguments.order, arguments.train_bytes)
    edges = [edge for edge in (16, 256, *LENGTHS) if edge < arguments.length] + [arguments.length]
    table = Table("Baseline", "Bits per byte", *(f"to {edge:,}" for edge in edges), "Seconds", box=SIMPLE_HEAD)
    for baseline in found:
        parts = zip([0, *edges[:-1]], edges, strict=True)
        row = (f"{baseline.bits[:, left:right].mean():.3f}" for left, right in parts)
        table.add_row(baseline.label, f"{baseline.bits.mean():.3f}", *row, f"{baseline.seconds:.1f}")
    screen.print(table)
    screen.print(f"{name}: the first {arguments.length:,} bytes of {len(task.held_out())} test files")
    return 0


def _measured(name: str, arguments: argparse.Namespace) -> CorpusText | Text:
    """The task on a corpus, or on text of one's own."""
    if name in CORPORA:
        return CorpusText(CorpusTextConfig(corpus=name, eval_length=arguments.length, test_files=arguments.files))
    tested = {"test_from": "documents", "test_tokens": arguments.files * arguments.length, "cut": arguments.cut}
    return Text(TextConfig(path=name, length=arguments.length, **tested))


def _is_path(name: str) -> bool:
    return Path(name).exists() or re.search(r"[*/]", name) is not None


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        program("corpora"), description="List, fetch and measure corpora of text.", allow_abbrev=False
    )
    commands = command.add_subparsers(required=True)

    def add(name: str, action: Any, description: str, many: str | int = 0) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=description, description=description, allow_abbrev=False)
        if many:
            sub.add_argument("names", nargs=many, metavar="NAME", help=", ".join(CORPORA))
        sub.add_argument("--cache", type=Path, default=cache_folder(), help="the folder of the corpora")
        sub.set_defaults(action=action, names=[])
        return sub

    add("list", list_corpora, "the corpora, and which are fetched")
    fetching = add("fetch", fetch_corpora, "download corpora and unpack them", "+")
    fetching.add_argument("--again", action="store_true", help="in place of those that are there")
    add("show", show_corpus, "what a fetched corpus is", 1)
    measuring = add("baselines", show_baselines, "what compressors and n-grams reach on test files of a corpus", 1)
    measuring.add_argument("--cut", type=int, default=0, help="as task.cut, where NAME is a path of text of your own")
    measuring.add_argument("--length", type=int, default=65536, help="bytes of each test file (default: 65536)")
    measuring.add_argument("--files", type=int, default=32, help="test files at most (default: 32)")
    measuring.add_argument(
        "--order", type=int, default=6, help=f"bytes of an n-gram, 1 to {HIGHEST_ORDER} (default: 6)"
    )
    measuring.add_argument("--train-bytes", type=int, help="of training files that are read (default: all)")
    add("path", show_path, "the folder in which corpora are kept")
    return command


def main() -> int:
    arguments = parser().parse_args()

    def act() -> int:
        unknown = [name for name in arguments.names if name not in CORPORA]
        if unknown and not (arguments.action is show_baselines and _is_path(unknown[0])):
            raise RunnerError(f"unknown corpus {unknown[0]!r}, {choices_hint(unknown[0], CORPORA)}")
        try:
            return arguments.action(console(WIDE), arguments)
        except (TaskError, ValueError) as error:
            raise RunnerError(str(error)) from error

    return exit_code(act)


if __name__ == "__main__":
    sys.exit(main())
