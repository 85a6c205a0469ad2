"""From a file of a package to documents of plain bytes: unpacked, without markup, in pieces of a usable length."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from html.parser import HTMLParser

LONGEST = 131_072
"""Bytes after which a giant file is cut, at the next line."""

BLOCKS = frozenset(
    (
        *("address", "article", "aside", "blockquote", "br", "caption", "dd", "div", "dl", "dt", "fieldset", "figure"),
        *("figcaption", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav"),
        *("ol", "option", "p", "pre", "section", "table", "tbody", "td", "th", "thead", "title", "tr", "ul"),
    )
)
"""Elements of HTML that begin a line of their own."""

HIDDEN = frozenset(("script", "style", "template", "noscript"))


def plain(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    """The file as it is; one that is compressed, ``NAME.gz``, is unpacked.

    Raises:
        ValueError: it is named ``.gz`` and is no such file.
    """
    if not name.endswith(".gz"):
        yield name, content
        return
    try:
        yield name.removesuffix(".gz"), gzip.decompress(content)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{name} is named .gz and cannot be unpacked: {error}") from error


def html(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    """The text of an HTML page in UTF-8: one line per block, none of scripts and styles, ``pre`` as it stands."""
    reader = _Text()
    reader.feed(content.decode("utf-8", errors="replace"))
    reader.close()
    yield f"{name.removesuffix('.html')}.txt", reader.text().encode()


class _Text(HTMLParser):
    """Collects the text of a page, a list of lines."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self._lines: list[str] = [""]
        self._hidden = self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden += tag in HIDDEN
        self._preformatted += tag == "pre"
        if tag in BLOCKS:
            self._lines.append("")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(self._hidden - (tag in HIDDEN), 0)
        self._preformatted = max(self._preformatted - (tag == "pre"), 0)
        if tag in BLOCKS:
            self._lines.append("")

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if self._preformatted:
            first, *others = data.split("\n")
            self._lines[-1] += first
            self._lines.extend(others)
            return
        words = re.sub(r"\s+", " ", data)
        self._lines[-1] += words if self._lines[-1] else words.lstrip()

    def text(self) -> str:
        """The lines without spaces at their ends, none empty, with a line end each."""
        lines = (line.rstrip() for line in self._lines)
        return "".join(f"{line}\n" for line in lines if line)


def pieces(name: str, content: bytes, longest: int = LONGEST) -> Iterator[tuple[str, bytes]]:
    """A giant file in pieces of about ``longest`` bytes, each to the end of a line."""
    begin, number = 0, 0
    while begin < len(content):
        end = content.find(b"\n", begin + longest - 1) + 1 or len(content)
        yield f"{name}/{number:04}", content[begin:end]
        begin, number = end, number + 1


def sequences(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    """The sequences of a compressed FASTA file, without line ends and headers, in pieces of :data:`LONGEST` letters.

    Args:
        name: ``NAME.fasta.gz``; a piece is called by it, its sequence and its number.
    """
    for unpacked, text in plain(name, content):
        for record in text.split(b">")[1:]:
            header, _, lines = record.partition(b"\n")
            label = re.sub(r"[^\w.+-]", "_", header.decode("ascii", errors="replace"))
            letters = b"".join(lines.split())
            for number, begin in enumerate(range(0, len(letters), LONGEST)):
                yield f"{unpacked}/{label}/{number:04}", letters[begin : begin + LONGEST]
