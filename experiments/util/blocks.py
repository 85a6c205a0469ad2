"""Pages with parts that are generated: blocks between ``<!-- generated: NAME -->`` and ``<!-- end -->``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping


def fill(text: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """A page with its generated blocks renewed.

    Raises:
        ValueError: a block's markers are missing.
    """
    for name, make in blocks.items():
        marker = f"<!-- generated: {name} -->"
        pattern = re.compile(rf"{re.escape(marker)}\n.*?<!-- end -->", re.DOTALL)
        content = f"{marker}\n\n{make()}\n\n<!-- end -->"
        text, found = pattern.subn(lambda _, content=content: content, text)
        if found != 1:
            raise ValueError(f"expected one block between {marker} and <!-- end -->, found {found}")
    return text


def table(header: Iterable[str], rows: Iterable[Iterable[str]], align: str = "---", left: int = 1) -> str:
    """A table in Markdown; the first ``left`` columns are aligned left, the others as ``align`` says."""
    header = list(header)
    lines = [header, [*["---"] * left, *[align] * (len(header) - left)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
