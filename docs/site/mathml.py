"""Equations as MathML, made at build time: a page needs no script for them. A Sphinx extension."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx


def markup(text: str, block: bool) -> str:
    """The element ``<math>`` of an equation in LaTeX.

    Raises:
        ValueError: it cannot be converted.
    """
    try:
        return convert(text, display="block" if block else "inline")
    except Exception as error:
        raise ValueError(f"cannot convert the equation {text!r}: {type(error).__name__}: {error}") from error


def _inline(writer: Any, node: nodes.math) -> None:
    writer.body.append(markup(node.astext(), block=False))
    raise nodes.SkipNode


def _block(writer: Any, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="math-scroll">{markup(node.astext(), block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
