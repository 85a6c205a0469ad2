"""The pattern language: the mixers of each layer of a stack.

    attention                      every layer is attention
    3*mamba2 attention             three Mamba-2 layers, then one of attention
    2*(delta_net mamba) attention  groups repeat too
    attention+mamba2               both side by side in one layer
    mamba2/moe attention/swiglu    the layer's channel mixer after a slash ("none" for none)

A pattern is tiled over the depth. Commas read as spaces. A name may be the path of a class, ``package.module:Class``,
where it is registered under that path, as the experiment runner does.
"""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass

from seqarch.ops.dispatch.checks import fits, show

_NAME = re.compile(r"[A-Za-z_]\w*(?:(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*)?")
_TOKEN = re.compile(rf"\s*(?:([0-9]+)\s*\*|({_NAME.pattern})|([()+/]))")

MOST = 10_000
"""Layers that a pattern or a stack may have: far beyond any that is built, and few enough to write out."""

DEEPEST = 100
"""How many parentheses may be open at once."""


@dataclass(frozen=True)
class LayerPattern:
    """One layer: the mixers side by side in it and its channel mixer (``None``: the stack's default)."""

    mixers: tuple[str, ...]
    channel: str | None = None

    def __str__(self) -> str:
        return "+".join(self.mixers) + (f"/{self.channel}" if self.channel else "")


def parse_pattern(pattern: str) -> list[LayerPattern]:
    """The layers that a pattern names, repetitions written out.

    Raises:
        ValueError: the pattern is no string, empty or malformed (the error shows where), or of more than :data:`MOST`
            layers.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"pattern is {show(pattern)}, expected a string such as '3*mamba2 attention'")
    parser = _Parser(pattern)
    layers = parser.sequence()
    if parser.peek():
        raise parser.error("a mixer")
    return layers


def tile_pattern(pattern: str, depth: int) -> list[LayerPattern]:
    """The layers of a stack of that depth.

    Raises:
        ValueError: the pattern is malformed, or its length does not divide the depth, or this is no whole number of at
            most :data:`MOST`.
    """
    if not fits(depth, (int,)) or depth > MOST:
        raise ValueError(f"depth is {show(depth)}, expected an int of at most {MOST} layers")
    layers = parse_pattern(pattern)
    size = len(layers)
    if depth < 1 or depth % size:
        shown = " ".join(map(str, layers))
        nearest = max(1, depth // size) * size
        raise ValueError(
            f"a depth of {depth} does not fit the pattern {pattern!r} of {size} layers ({shown}):"
            f" use a multiple of {size}, such as {nearest} or {nearest + size}"
        )
    return layers * (depth // size)


class _Parser:
    """Recursive descent over ``sequence := item+``, ``item := [count *] (layer | "(" sequence ")")``."""

    def __init__(self, text: str):
        self.text = text
        self.tokens: list[tuple[str, int]] = []
        source, at = text.replace(",", " ").rstrip(), 0
        while at < len(source):
            match = _TOKEN.match(source, at)
            if match is None:
                self.tokens.append((source[at:].strip()[0], at))
                break
            self.tokens.append((match.group().replace(" ", "").strip(), match.start()))
            at = match.end()
        self.at = self.open = 0

    def peek(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def error(self, expected: str) -> ValueError:
        found = repr(self.peek()) if self.peek() else "the end"
        return ValueError(
            f"pattern {reprlib.repr(self.text)}: expected {expected}, found {found} after {self.at} tokens"
        )

    def sequence(self) -> list[LayerPattern]:
        layers = self.item()
        while self.peek() and self.peek() != ")":
            layers += self.item()
            if len(layers) > MOST:
                raise self.error(f"at most {MOST} layers in all")
        return layers

    def item(self) -> list[LayerPattern]:
        count = 1
        if self.peek().endswith("*") and self.peek() != "*":
            digits = self.peek()[:-1]
            count = int(digits) if len(digits) < 9 else MOST + 1
            if not 1 <= count <= MOST:
                raise self.error(f"a count of 1 to {MOST}")
            self.at += 1
        if self.peek() != "(":
            return [self.layer()] * count
        if self.open == DEEPEST:
            raise self.error(f"at most {DEEPEST} parentheses within one another")
        self.at, self.open = self.at + 1, self.open + 1
        layers = self.sequence()
        if self.peek() != ")":
            raise self.error("')'")
        self.at, self.open = self.at + 1, self.open - 1
        if len(layers) * count > MOST:
            raise self.error(f"at most {MOST} layers in all")
        return layers * count

    def layer(self) -> LayerPattern:
        mixers = [self.name("a mixer")]
        while self.peek() == "+":
            self.at += 1
            mixers.append(self.name("a mixer after '+'"))
        if self.peek() != "/":
            return LayerPattern(tuple(mixers))
        self.at += 1
        return LayerPattern(tuple(mixers), self.name("a channel mixer after '/'"))

    def name(self, expected: str) -> str:
        if not _NAME.fullmatch(self.peek()):
            raise self.error(expected)
        self.at += 1
        return self.tokens[self.at - 1][0]
