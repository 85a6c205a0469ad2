"""The pattern language: the mixers of each layer of a stack.

    attention                      every layer is attention
    3*mamba2 attention             three Mamba-2 layers, then one of attention
    2*(delta_net mamba) attention  groups repeat too
    attention+mamba2               both side by side in one layer
    mamba2/moe attention/swiglu    the layer's channel mixer after a slash ("none" for none)
    mamba2 my_package.mixers:Leaky a class by its import path, where a name may stand
    attention(window=512) mamba2   options of this occurrence, which go before those that the name has everywhere
    attention(share=a, adapter_rank=8) mamba2 attention(share=a)   one attention in two layers, an adapter in the first

A pattern is tiled over the depth. Commas read as spaces. Options have commas between them, and their values are as YAML
or Python writes them: ``attention/moe(top_k=2, router=sigmoid)``, ``mamba2(in_factors=[1, 1, 2, 1, 1])``,
``attention(rope_scaling={rope_type: yarn, factor: 4.0})``. Quotes are needed only around text that is no single word.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from seqarch.models.pattern_options import Malformed, begin_at, read_options, write_options
from seqarch.models.sharing import OPTIONS as SHARING
from seqarch.models.sharing import check_sharing
from seqarch.ops.dispatch.checks import fits, show

_NAME = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*(?::[A-Za-z_]\w*)?"
_TOKEN = re.compile(rf"[\s,]*(?:([0-9]+)[\s,]*\*|({_NAME})|([()+/]))")
_SPACES = " \t\n\r\f\v,"
_WITHOUT_SPACES = str.maketrans("", "", _SPACES)

MOST = 10_000
"""Layers that a pattern or a stack may have: far beyond any that is built, and few enough to write out."""

DEEPEST = 100
"""How many parentheses may be open at once."""


@dataclass(frozen=True)
class LayerPattern:
    """One layer: the mixers side by side in it and its channel mixer (``None``: the stack's default).

    Attributes:
        options: of each of the mixers, as this occurrence gives them; by default none of any.
        channel_options: likewise of the channel mixer.
        sharing: of what is given as options of each of the mixers, what says which layers share it
            (:mod:`seqarch.models.sharing`); it is no longer among the options.
        channel_sharing: likewise of the channel mixer.
    """

    mixers: tuple[str, ...]
    channel: str | None = None
    options: tuple[dict[str, Any], ...] = field(default=(), hash=False)
    channel_options: dict[str, Any] = field(default_factory=dict, hash=False)
    sharing: tuple[dict[str, Any], ...] = field(default=(), init=False, hash=False)
    channel_sharing: dict[str, Any] = field(default_factory=dict, init=False, hash=False)

    def __post_init__(self):
        own = self.options or ({},) * len(self.mixers)
        if len(own) != len(self.mixers):
            raise ValueError(f"layer pattern: options of {len(own)} mixers are given, expected {len(self.mixers)}")
        if self.channel_options and self.channel in (None, "none"):
            raise ValueError("layer pattern: options of a channel mixer are given, and no channel mixer")
        parted = [_parted(each) for each in (*own, self.channel_options)]
        for name, (_, sharing) in zip((*self.mixers, self.channel or ""), parted, strict=True):
            check_sharing(name, sharing)
        options, sharing = zip(*parted, strict=True)
        parts = {"options": options[:-1], "channel_options": options[-1]}
        for name, part in (parts | {"sharing": sharing[:-1], "channel_sharing": sharing[-1]}).items():
            object.__setattr__(self, name, part)

    def __str__(self) -> str:
        shown = zip(self.mixers, self.options, self.sharing, strict=True)
        mixers = "+".join(name + write_options({**own, **sharing}) for name, own, sharing in shown)
        channel = write_options({**self.channel_options, **self.channel_sharing})
        return mixers + (f"/{self.channel}{channel}" if self.channel else "")


def _parted(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a mixer, and what is said of sharing."""
    sharing = {name: value for name, value in options.items() if name in SHARING}
    return {name: value for name, value in options.items() if name not in SHARING}, sharing


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


def write_pattern(layers: Sequence[LayerPattern]) -> str:
    """A short pattern of these layers: what repeats stands once, equal layers in a row behind their number.

    Raises:
        ValueError: an option has a value that no pattern can have.
    """
    texts = [str(layer) for layer in layers]
    period = next(n for n in range(1, len(texts) + 1) if len(texts) % n == 0 and texts == texts[:n] * (len(texts) // n))
    runs = [(text, len(list(same))) for text, same in groupby(texts[:period])]
    return " ".join(text if count == 1 else f"{count}*{text}" for text, count in runs)


class _Parser:
    """Recursive descent over ``sequence := item+``, ``item := [count *] (layer | "(" sequence ")")``.

    A token is a text, and of a name the options behind it.
    """

    def __init__(self, text: str):
        self.text = text
        self.tokens: list[tuple[str, dict[str, Any]]] = []
        at, end = 0, len(text.rstrip(_SPACES))
        while at < end:
            match = _TOKEN.match(text, at)
            if match is None:
                self.tokens.append((text[at:].strip(_SPACES)[0], {}))
                break
            self.tokens.append((match.group().translate(_WITHOUT_SPACES), {}))
            at = match.end()
            if match[2] and begin_at(text, at):
                at = self.read_options(at)
        self.at = self.open = 0

    def read_options(self, at: int) -> int:
        """Read the options of the last token, a name; the place after them."""
        name = self.tokens[-1][0]
        try:
            own, after = read_options(self.text, at)
        except Malformed as error:
            found = repr(self.text[error.at]) if error.at < len(self.text) else "the end"
            where = f"found {found} after {reprlib.repr(self.text[: error.at])}"
            raise ValueError(
                f"pattern {reprlib.repr(self.text)}: options of {name}: expected {error.expected}, {where}"
            ) from error
        self.tokens[-1] = name, own
        return after

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
        names, options = zip(*mixers, strict=True)
        if self.peek() != "/":
            return LayerPattern(names, None, options)
        self.at += 1
        channel, own = self.name("a channel mixer after '/'")
        if own and channel == "none":
            raise ValueError(f"pattern {reprlib.repr(self.text)}: 'none' is no channel mixer and has no options")
        return LayerPattern(names, channel, options, own)

    def name(self, expected: str) -> tuple[str, dict[str, Any]]:
        if not re.fullmatch(_NAME, self.peek()):
            raise self.error(expected)
        self.at += 1
        return self.tokens[self.at - 1]
