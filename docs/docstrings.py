"""This project's docstrings as Markdown: what ``docs.tables`` builds its pages from."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from dataclasses import MISSING, fields
from pathlib import Path

from experiments.util.docstrings import options_text

_SOURCE = re.compile(r'(?:Von )?[A-Z][A-Za-z-]+(?: et al\.| and [A-Z][a-z]+)? \d{4}(?:, "[^"]+")?')
_MATH = re.compile(r"^\.\. math::\n((?:[ \t]+\S.*\n?|\n)+)", re.MULTILINE)


def markdown(text: str) -> str:
    """reStructuredText, as far as the docstrings use it, as GitHub's Markdown."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text.replace("``", "`"))
    return _MATH.sub(lambda match: f"```math\n{textwrap.dedent(match[1]).strip()}\n```\n\n", text)


def cell(text: str) -> str:
    """One line of Markdown that may stand in a table."""
    return " ".join(markdown(text).split()).replace("|", r"\|")


def option_rows(config: type, but: str = "") -> list[tuple[str, str, str]]:
    """Name, default and meaning of a dataclass's options, as its docstring and those it inherits from say."""
    told, rows = options_text(config), []
    for field in fields(config):
        if field.name != but:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            shown = f"{default:g}" if isinstance(default, float) else repr(default)
            rows.append((f"`{field.name}`", f"`{shown}`", cell(told[field.name])))
    return rows


def first_sentence(docstring: str) -> str:
    """A docstring's first paragraph, on one line."""
    return " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())


def source(docstring: str, what: str) -> str:
    """The first paper that a docstring names.

    Raises:
        ValueError: it names none.
    """
    match = _SOURCE.search(" ".join(docstring.split()))
    if match is None:
        raise ValueError(f'the docstring of {what} names no source, such as: Sun et al. 2023, "Retentive Network"')
    return match.group()


def module_docstring(path: Path) -> str:
    """That of a file, which is read and not imported: it may need what this machine lacks.

    Raises:
        ValueError: it has none.
    """
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not docstring:
        raise ValueError(f"{path} has no docstring")
    return docstring
