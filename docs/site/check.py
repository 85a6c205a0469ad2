"""What must hold of the built site: every link of every page leads somewhere within it, and no page is large."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGEST = 1_000_000
"""Bytes of a page with all that it loads."""


class _Page(HTMLParser):
    """The anchors of a page, what it links to and what it loads."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors, self.links, self.loads = {""}, [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag in ("script", "img", "source", "iframe") and given.get("src"):
            self.loads.append(given["src"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon"):
            self.loads.append(given.get("href", ""))
        elif tag == "a" and "href" in given:
            self.links.append(given["href"])


def problems(folder: Path) -> Iterator[str]:
    """What is wrong with the pages below a folder, a line each."""
    folder = folder.resolve()
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    for path, page in pages.items():
        name = path.relative_to(folder)
        size = path.stat().st_size
        for load in page.loads:
            if load.startswith("data:"):  # within the page
                continue
            there = _there(path, load)
            if there is None:
                yield f"{name} loads {load}, which is not on this site"
            elif not there.is_file():
                yield f"{name} loads {load}, and no file is there"
            else:
                size += there.stat().st_size
        if size > LARGEST:
            yield f"{name} and what it loads are {size:,} bytes, expected {LARGEST:,} at most"
        for link in page.links:
            yield from _broken(folder, path, link, pages)


def _there(path: Path, link: str) -> Path | None:
    """The file that a link names; ``None`` for an address elsewhere."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    return (path.parent / unquote(parts.path)).resolve() if parts.path else path


def _broken(folder: Path, path: Path, link: str, pages: dict[Path, _Page]) -> Iterator[str]:
    there, anchor = _there(path, link), unquote(urlsplit(link).fragment)
    name = path.relative_to(folder)
    if there is None:
        return
    if there.is_dir() or not there.exists() or not there.is_relative_to(folder):
        yield f"{name} links to {link}, and no page is there"
    elif anchor and there in pages and anchor not in pages[there].anchors and name.name != "chooser.html":
        yield f"{name} links to {link}, and that page has no such anchor"
