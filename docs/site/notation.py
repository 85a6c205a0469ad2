"""Equations as docstrings write them, in plain letters, as LaTeX: ``S_t = a_t S_{t-1} + k_t^T v_t``."""

from __future__ import annotations

import re

GREEK = {"alpha", "beta", "gamma", "delta", "theta", "lambda", "phi", "sigma", "Lambda"}
FUNCTIONS = {
    *(
        "act",
        "conv",
        "diag",
        "linear",
        "mean",
        "relu",
        "share",
        "sigmoid",
        "silu",
        "softmax",
        "softplus",
        "tanh",
        "window",
    ),
    *("Attention", "SwiGLU", "dt"),
}
"""Names of several letters that equations have; any other word makes a text no equation."""

COMMANDS = {"exp": r"\exp", "max": r"\max", "min": r"\min", "sum": r"\sum", "Re": r"\operatorname{Re}"}
_TOKEN = re.compile(r"\s*(?:(?P<word>[A-Za-z]+)|(?P<number>\d+(?:\.\d+)?)|(?P<sign>.))")
_OPEN = {"(": ")", "[": "]", "{": "}"}


class NoEquation(Exception):
    """The text is none that can be written as one."""


def latex(text: str) -> str | None:
    """The LaTeX of an equation; ``None`` for a text that is none, such as one with words."""
    try:
        reader = _Reader(text)
        found = reader.terms("")
        return None if reader.peek() else found
    except NoEquation:
        return None


class _Reader:
    """Recursive descent over terms, each with what is below and above it."""

    def __init__(self, text: str):
        self.tokens = [(match.lastgroup or "", match[match.lastgroup or 0]) for match in _TOKEN.finditer(text.strip())]
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def take(self) -> tuple[str, str]:
        if self.at == len(self.tokens):
            raise NoEquation
        self.at += 1
        return self.tokens[self.at - 1]

    def terms(self, end: str) -> str:
        """All that comes before a closing sign, or before the end of the text."""
        found = []
        while self.peek() != end:
            found.append(self.term())
        return " ".join(found)

    def term(self) -> str:
        kind, text = self.take()
        if kind == "word":
            return self.scripts(self.word(text))
        if kind == "number":
            return self.scripts(text)
        if text in _OPEN:
            inside = self.terms(_OPEN[text])
            self.take()
            left, right = (text, _OPEN[text]) if text != "{" else (r"\{", r"\}")
            return self.scripts(rf"{left}{inside}{right}")
        signs = {"*": r"\ast", ".": r"\cdot"}
        if text in signs or text in "+-=/,<>|'":
            return signs.get(text, text)
        raise NoEquation

    def word(self, text: str) -> str:
        if text == "sqrt" and self.peek() == "(":
            self.take()
            inside = self.terms(")")
            self.take()
            return rf"\sqrt{{{inside}}}"
        if text in COMMANDS:
            return COMMANDS[text]
        if text in GREEK:
            return rf"\{text}"
        if text in FUNCTIONS:
            return rf"\mathrm{{{text}}}"
        if len(text) == 1:
            return text
        raise NoEquation

    def scripts(self, base: str) -> str:
        """With what stands below and above it, each at most once."""
        found = {"_": "", "^": ""}
        while self.peek() in ("_", "^"):
            mark = self.take()[1]
            if found[mark]:
                raise NoEquation
            found[mark] = self.script()
        below = f"_{{{found['_']}}}" if found["_"] else ""
        above = f"^{{{found['^']}}}" if found["^"] else ""
        return base + below + above

    def script(self) -> str:
        kind, text = self.take()
        if kind == "sign" and text in "{(":
            inside = self.terms(_OPEN[text])
            self.take()
            return inside
        if kind == "sign" and text == "-":
            return f"-{self.script()}"
        if kind == "word":
            if text == "T":
                return r"\top"
            return text if len(text) <= 2 and text not in ("in",) else rf"\mathrm{{{text}}}"
        if kind == "number":
            return text
        raise NoEquation
