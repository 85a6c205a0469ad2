"""The text of a pattern, read without torch: of the library's parser :mod:`seqarch.models.pattern`."""

from __future__ import annotations

import re

_OPTIONS = re.compile(r"\(\s*[A-Za-z_]\w*\s*=")
_PIECE = re.compile(r"'[^']*'|\"[^\"]*\"|.", re.DOTALL)


def without_options(pattern: str) -> str:
    """A pattern without the options of its mixers and channel mixers: such as ``attention(window=512)/moe``.

    Text that is no pattern is cut at options that do not end.
    """
    kept, at = "", 0
    while begin := _OPTIONS.search(pattern, at):
        kept += pattern[at : begin.start()] + " "
        at, depth = begin.start(), 0
        for piece in _PIECE.finditer(pattern, at):
            depth += (piece[0] == "(") - (piece[0] == ")")
            at = piece.end()
            if not depth:
                break
    return kept + pattern[at:]
