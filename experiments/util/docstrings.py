"""This project's docstrings, taken apart: what the runner's help and the pages of the documentation are made from."""

from __future__ import annotations

import inspect
import re
import textwrap

SECTIONS = ("Args", "Attributes", "Returns", "Raises")


def split_sections(docstring: str) -> tuple[str, dict[str, str]]:
    """The prose of a docstring, and the text of each of its sections, dedented."""
    header = re.compile(rf"^({'|'.join(SECTIONS)}):\n", re.MULTILINE)
    prose, *rest = header.split(inspect.cleandoc(docstring))
    bodies = {}
    for name, body in zip(rest[::2], rest[1::2], strict=True):
        bodies[name] = textwrap.dedent(body).strip()
    return prose.strip(), bodies


def entries(section: str) -> dict[str, str]:
    """``name: text`` entries of a section; a head such as ``q, k`` stays one entry."""
    found: dict[str, str] = {}
    head = ""
    for line in section.splitlines():
        if line.startswith(" ") or not line.strip():
            found[head] += " " + line.strip()
        else:
            head, _, text = line.partition(": ")
            found[head] = text
    return found


def attributes(docstring: str) -> dict[str, str]:
    """The text on each attribute that a class's docstring describes."""
    told: dict[str, str] = {}
    for head, text in entries(split_sections(docstring)[1].get("Attributes", "")).items():
        told.update(dict.fromkeys(head.split(", "), text))
    return told


def options_text(config: type) -> dict[str, str]:
    """The text on each field of a dataclass, as its docstring and those it inherits from say."""
    told: dict[str, str] = {}
    for kind in reversed(config.__mro__[:-1]):
        told.update(attributes(kind.__doc__ or ""))
    return told
