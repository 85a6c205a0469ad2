"""A font for the equations: the glyphs of STIX Two Math that they use, since many machines have no font for MathML."""

from __future__ import annotations

import logging
import re
from importlib.util import find_spec
from pathlib import Path

from fontTools import subset

_MATH = re.compile(r"<math\b.*?</math>", re.DOTALL)
_TAG = re.compile(r"<[^>]*>")
ITALIC = (*range(0x1D434, 0x1D468), *range(0x1D6E2, 0x1D71C), 0x210E)
"""Code points that a browser shows in place of the single letters of an equation."""


def write(pages: Path, file: Path) -> None:
    """Write the font that the equations of the pages below a folder need, as WOFF.

    Raises:
        RuntimeError: the package that has the font is not installed.
    """
    package = find_spec("ziamath")
    if package is None or package.origin is None:
        raise RuntimeError("the font of equations is in the package ziamath, which the extra `site` installs")
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    used = set(ITALIC)
    for page in pages.rglob("*.html"):
        for equation in _MATH.findall(page.read_text(encoding="utf-8")):
            used |= set(map(ord, _TAG.sub("", equation)))
    options = subset.Options(flavor="woff", layout_features=["ssty"], notdef_outline=True)
    font = subset.load_font(str(Path(package.origin).parent / "fonts" / "STIXTwoMath-Regular.ttf"), options)
    chosen = subset.Subsetter(options)
    chosen.populate(unicodes=used | {ord(letter) for letter in "()[]{}|/"})
    chosen.subset(font)
    subset.save_font(font, str(file), options)
