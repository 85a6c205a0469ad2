"""Options of one occurrence in a pattern, ``(window=512, position=none)``: read and written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

WORD = re.compile(r"[A-Za-z_][\w.-]*")
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.])")
STRING = re.compile(r"'[^']*'|\"[^\"]*\"")
CONSTANTS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_BEGIN = re.compile(r"\s*\(\s*[A-Za-z_]\w*\s*=")
_NAME = re.compile(r"[A-Za-z_]\w*")

DEEPEST = 20
"""How many brackets may be open at once in a value."""


class Malformed(Exception):
    """What was expected, and where in the text."""

    def __init__(self, expected: str, at: int):
        super().__init__(expected)
        self.expected, self.at = expected, at


def begin_at(text: str, at: int) -> bool:
    """Whether options begin at this place, and no group of layers."""
    return _BEGIN.match(text, at) is not None


def read_options(text: str, at: int) -> tuple[dict[str, Any], int]:
    """The options in the parentheses that begin at this place, and the place after them.

    Raises:
        Malformed: they are no ``name=value`` with commas between, or a name comes twice.
    """
    reader = _Reader(text, at)
    return reader.options(), reader.at


def write_options(options: Mapping[str, Any]) -> str:
    """The options as a pattern has them, nothing where there are none.

    Raises:
        ValueError: a value is none that a pattern can have.
    """
    return f"({', '.join(f'{name}={_written(value)}' for name, value in options.items())})" if options else ""


def _written(value: Any) -> str:
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case int():
            return str(value)
        case float() if math.isfinite(value):
            return repr(value)
        case str():
            return value if WORD.fullmatch(value) and value not in CONSTANTS else _quoted(value)
        case list() | tuple():
            return f"[{', '.join(map(_written, value))}]"
        case dict() if all(isinstance(key, str) for key in value):
            return f"{{{', '.join(f'{_written(key)}: {_written(each)}' for key, each in value.items())}}}"
    expected = "a finite number, text, true, false, null, or a list or mapping of such"
    raise ValueError(f"a pattern cannot have the value {value!r}: expected {expected}")


def _quoted(text: str) -> str:
    """In the quotes that are not in it: there are no escapes."""
    mark = "'" if "'" not in text else '"'
    if mark in text:
        raise ValueError(f"a pattern cannot have the text {text!r}, with quotes of both kinds")
    return mark + text + mark


class _Reader:
    """Recursive descent over ``"(" name "=" value ("," name "=" value)* ")"``."""

    def __init__(self, text: str, at: int):
        self.text, self.at, self.open = text, at, 0

    def take(self, wanted: str | re.Pattern[str]) -> str | None:
        """The text that comes next, if it is what is wanted; spaces before it are passed over."""
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        pattern = re.compile(re.escape(wanted)) if isinstance(wanted, str) else wanted
        match = pattern.match(self.text, self.at)
        self.at = self.at if match is None else match.end()
        return None if match is None else match[0]

    def need(self, wanted: str | re.Pattern[str], expected: str) -> str:
        if (found := self.take(wanted)) is None:
            raise Malformed(expected, self.at)
        return found

    def options(self) -> dict[str, Any]:
        self.need("(", "'('")
        found: dict[str, Any] = {}

        def item() -> None:
            name = self.need(_NAME, "an option")
            if name in found:
                raise Malformed(f"the option {name} once", self.at - len(name))
            self.need("=", f"'=' after the option {name}")
            found[name] = self.value(f"a value of the option {name}")

        self.items(item, ")")
        return found

    def items(self, item: Callable[[], None], end: str) -> None:
        """Items with commas between and perhaps after them, up to what ends them."""
        if self.open == DEEPEST:
            raise Malformed(f"at most {DEEPEST} brackets within one another", self.at)
        self.open += 1
        while self.take(end) is None:
            item()
            if self.take(",") is None:
                self.need(end, f"',' or {end!r}")
                break
        self.open -= 1

    def value(self, expected: str) -> Any:
        if (text := self.take(STRING)) is not None:
            return text[1:-1]
        if (number := self.take(NUMBER)) is not None:
            return self.number(number, expected)
        if (word := self.take(WORD)) is not None:
            return CONSTANTS.get(word, word)
        if self.take("[") is not None:
            found: list[Any] = []
            self.items(lambda: found.append(self.value("a value")), "]")
            return found
        if self.take("{") is not None:
            return self.mapping()
        raise Malformed(expected, self.at)

    def mapping(self) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def item() -> None:
            text = self.take(STRING)
            key = self.need(WORD, "a key") if text is None else text[1:-1]
            self.need(":", f"':' after the key {key}")
            found[key] = self.value(f"a value of the key {key}")

        self.items(item, "}")
        return found

    def number(self, text: str, expected: str) -> int | float:
        try:
            return int(text) if text.lstrip("+-").isdigit() else float(text)
        except ValueError as error:  # of thousands of digits
            raise Malformed(expected, self.at - len(text)) from error
