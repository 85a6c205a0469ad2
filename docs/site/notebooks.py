"""Notebooks as Markdown: their text as it is, their code in blocks."""

from __future__ import annotations

import json
import re


def markdown(text: str) -> str:
    """The page that a notebook of version 4 makes, without the outputs of its cells.

    A cell that begins with a command for the shell (``!``) is a block of ``sh``, since it is no Python.

    Raises:
        ValueError: a cell is neither Markdown nor code.
    """
    cells = json.loads(text)["cells"]
    return "\n\n".join(_cell(cell["cell_type"], "".join(cell["source"]).strip("\n")) for cell in cells) + "\n"


def _cell(kind: str, source: str) -> str:
    if kind == "markdown":
        return source
    if kind != "code":
        raise ValueError(f"a cell of the kind {kind!r}, expected 'markdown' or 'code'")
    longest = max(map(len, re.findall(r"`{3,}", source)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{'sh' if source.startswith('!') else 'python'}\n{source}\n{fence}"
