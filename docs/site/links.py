"""Links of the repository's pages, as they are on the site: to a page of it, or to a file that comes along."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

_FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:\[[^\]]*\]|[^\[\]])*)\]\((?P<target>[^)\s]+)\)")


class BrokenLink(Exception):
    """A link that leads nowhere."""


@dataclass
class Site:
    """What is where.

    Attributes:
        root: of the repository.
        pages: by the path of a page in the repository, with ``.md`` or ``.ipynb``, its path on the site, with ``.md``.
        sections: by page and anchor, of what is on the site a page or section of its own: page and anchor there.
        files: files of the repository that pages link to, filled as links are read: by path their path on the site.
    """

    root: Path
    pages: dict[str, str]
    sections: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def target(self, page: str, link: str) -> tuple[str, str]:
        """Where a link of a page of the repository leads: a path on the site, and an anchor.

        Raises:
            BrokenLink: nothing is there.
        """
        path, _, anchor = link.partition("#")
        there = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
        if (there, anchor) in self.sections:
            return self.sections[there, anchor]
        if there in self.pages:
            return self.pages[there], anchor
        for index in (f"{there}/README.md", f"{there}/index.md"):
            if index in self.pages:
                return self.pages[index], ""
        if not (self.root / there).is_file():
            raise BrokenLink(f"{page} links to {link}, and no page or file is there")
        suffix = PurePosixPath(there).suffix
        as_page = suffix in (".py", ".yaml", ".cpp", ".h", ".sh")
        self.files[there] = f"files/{there}.md" if as_page else f"files/{there}"
        return self.files[there], ""


def rewritten(text: str, page: str, placed: str, site: Site) -> str:
    """A page's text with each link as it is from the page's place on the site.

    Args:
        page: the path in the repository that the links were written for.
        placed: the path on the site.
    """

    def link(match: re.Match[str]) -> str:
        target = match["target"]
        if re.match(r"[a-z]+:", target):
            return match[0]
        there, anchor = site.target(page, target)
        relative = posixpath.relpath(there, posixpath.dirname(placed) or ".")
        where = ("" if there == placed and anchor else relative) + (f"#{anchor}" if anchor else "")
        return f"{match['image']}[{_within(match['text'], page, placed, site)}]({where})"

    return "".join(part if code else _LINK.sub(link, part) for code, part in prose(text))


def _within(text: str, page: str, placed: str, site: Site) -> str:
    """The text of a link, which may be a picture."""
    return rewritten(text, page, placed, site) if "](" in text else text


def prose(text: str) -> Iterator[tuple[bool, str]]:
    """The parts of a page in order, and of each whether it is code."""
    for fenced, part in _parts(text, _FENCE):
        if fenced:
            yield True, part
        else:
            # a link's text may be code, so only code that holds a link by itself is kept from being read as one
            yield from ((code and "](" in inner, inner) for code, inner in _joined(part))


def _joined(text: str) -> Iterator[tuple[bool, str]]:
    """Code that holds what looks like a link apart, all else together."""
    at = 0
    for match in _CODE.finditer(text):
        if "](" in match[0] and "\n\n" not in match[0] and match[0].count("`") == 2 * len(match[1]):
            yield False, text[at : match.start()]
            yield True, match[0]
            at = match.end()
    yield False, text[at:]


def _parts(text: str, pattern: re.Pattern[str]) -> Iterator[tuple[bool, str]]:
    at = 0
    for match in pattern.finditer(text):
        yield False, text[at : match.start()]
        yield True, match[0]
        at = match.end()
    yield False, text[at:]


def sections(text: str, level: int = 2) -> Mapping[str, str]:
    """The sections of a page by their headings; what comes before the first is under ``""``."""
    found, title = {"": ""}, ""
    for fenced, part in _parts(text, _FENCE):
        for line in [part] if fenced else part.splitlines(keepends=True):
            if not fenced and line.startswith("#" * level + " "):
                title = line.strip("# \n")
                found[title] = ""
            found[title] += line
    return found


def anchor(title: str) -> str:
    """The anchor that a heading has."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
