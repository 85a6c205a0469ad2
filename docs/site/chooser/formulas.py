"""Formulas of every mixer and channel mixer at every width of the chooser, as nested lists that a browser evaluates.

Each formula is an expression in the length T (and in a window W, where a pattern may give one), as the library's own
accounting has it (:mod:`docs.site.chooser.expressions`). Its constants depend on the width; they are written as a
polynomial in ``D / 64`` where one goes through all of them exactly, else width by width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any
from unittest.mock import patch

import torch

from docs.site.chooser.expressions import Expression, Number, Variable, follow
from seqarch.layers import CHANNEL_MIXERS, FAMILIES, MIXERS, build_channel_mixer, build_mixer
from seqarch.layers.mixer import Layer
from seqarch.layers.modules import long_conv
from seqarch.layers.sparse_attention.base import BlockSparse
from seqarch.ops.block_sparse_attention import flops as pair_flops

UNIT = 64
"""Widths are multiples of it."""

WIDTHS = (*range(64, 1025, 64), *range(1152, 2049, 128), *range(2304, 4097, 256), *range(4608, 8193, 512))

LONGEST = 2**30
"""Tokens that the chooser counts with."""

WINDOWED = {"attention": "window", "sliding_window": "window"}
"""Mixers whose formulas have a second variable, the option of that name, where a pattern gives it."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
T, W = Variable("T"), Variable("W")
Formulas = dict[str, Number]


class Refused(Exception):
    """A layer cannot be of some width, in the library's words."""


def _built(build: Callable[..., Any], name: str, width: int, **options: Any) -> Any:
    try:
        with torch.device("meta"):
            return build(name, d_model=width, **options)
    except ValueError as error:
        raise Refused(str(error)) from error


def fft_table() -> dict[str, str]:
    """FLOPs of a real transform by its length, for all lengths that are asked for."""
    sizes = (part << k for k in range(LONGEST.bit_length() + 2) for part in (1, 3, 5))
    return {str(size): str(long_conv.fft_flops(size)) for size in sizes}


def _earlier_blocks(self: Any, blocks: int, length: Number, batch_size: int) -> Number:
    """:meth:`BlockSparse.earlier_block_flops` without its loop over the blocks of a length."""
    size = self.config.block_size
    whole, rest = divmod(length, size)
    growing = min(whole, blocks + 1)
    before = growing * (growing - 1) // 2 + (whole - growing) * blocks
    pairs = whole * (size * (size + 1) // 2) + before * size * size
    pairs += rest * (rest + 1) // 2 + rest * min(whole, blocks) * size
    return pair_flops(batch_size * pairs * self.config.heads, self.config.head_width, self.config.head_width)


@contextmanager
def _followed() -> Iterator[None]:
    """What loops over a length or takes its logarithm has a form that can be followed."""
    lengths = patch.object(long_conv, "fft_length", _known(long_conv.fft_length, "fft_length"))
    transforms = patch.object(long_conv, "fft_flops", _known(long_conv.fft_flops, "fft_flops"))
    with lengths, transforms, patch.object(BlockSparse, "earlier_block_flops", _earlier_blocks):
        yield


def _known(function: Callable[[int], int], operation: str) -> Callable[[Number], Number]:
    """A function that is an operation of expressions, too."""
    return lambda number: Expression(operation, number) if isinstance(number, Expression) else function(number)


def mixer_formulas(name: str, width: int) -> Formulas:
    """Of a mixer with its default options, and with a window W where it may have one.

    Raises:
        Refused: the mixer cannot be of this width.
    """
    mixer = _built(build_mixer, name, width)
    found: Formulas = {"parameters": _parameters(mixer), **_costs(mixer, (T,))}
    if option := WINDOWED.get(name):
        mixer = _built(build_mixer, name, width, **{option: 8})
        object.__setattr__(mixer.config, option, W)
        found |= {f"{key}_windowed": formula for key, formula in _costs(mixer, (T, W)).items()}
    return found


def _costs(mixer: Any, variables: tuple[Variable, ...]) -> Formulas:
    with _followed():
        found = {"flops": follow(lambda *_: mixer.flops(T), *variables)}
        found["step_flops"] = follow(lambda *_: mixer.step_flops(T), *variables)
    for label, dtype in DTYPES.items():
        mixer.to(dtype)
        try:
            found[f"state_{label}"] = follow(lambda *_: mixer.state_bytes(T), *variables)
        except (TypeError, ValueError):  # counted by making a state of that length, whose bytes grow as a line
            found[f"state_{label}"] = _line(mixer.state_bytes)
    return found


def _line(cost: Callable[[int], int]) -> Number:
    """``a + b T``, for all lengths from 0 on that are tried.

    Raises:
        ValueError: the cost is no such line.
    """
    start, slope = cost(0), cost(1) - cost(0)
    if wrong := [at for at in (2, 3, 127, 128, 129, 4097, 2**20 + 1, LONGEST) if cost(at) != start + slope * at]:
        raise ValueError(f"a cost is no line of the length: it leaves {start} + {slope} T at {wrong}")
    return Expression("+", Expression("*", T, slope), start)


def channel_formulas(name: str, width: int) -> Formulas:
    """Of a channel mixer; ``active`` are the parameters that a token reads, all but those of experts not chosen."""
    channel = _built(build_channel_mixer, name, width)
    every = active = _parameters(channel)
    if name == "moe":
        routed = sum(channel.get_parameter(part).numel() for part in ("w_gate", "w_in", "w_out"))
        active = every - routed + routed * channel.config.top_k // channel.config.num_experts
    return {"parameters": every, "active": active, "flops": follow(channel.flops, T)}


def _parameters(layer: Layer) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


class _Written:
    """One formula as ``[operation, part, ...]``, a constant as its place among the constants, and these."""

    def __init__(self, formula: Number):
        self.constants: list[int] = []
        self.shape = self._shape(formula)

    def _shape(self, formula: Number) -> Any:
        if isinstance(formula, Variable):
            return formula.parts[0]
        if isinstance(formula, Expression):
            return [formula.operation, *map(self._shape, formula.parts)]
        self.constants.append(int(formula))
        return len(self.constants) - 1


def table(
    formulas: Callable[[str, int], Formulas], name: str, widths: Sequence[int] = WIDTHS
) -> dict[str, dict[str, Any]]:
    """The formulas of a layer: by what they count, of each shape that an expression has, its widths and constants.

    Widths at which the layer cannot be built are under ``"refused"``, with the library's words.
    """
    found: dict[str, dict[str, tuple[Any, list[int], list[list[int]]]]] = {}
    refused: dict[str, str] = {}
    for width in widths:
        try:
            here = formulas(name, width)
        except Refused as error:
            refused[str(width)] = str(error)
            continue
        for key, formula in here.items():
            written = _Written(formula)
            shapes = found.setdefault(key, {})
            _, at, constants = shapes.setdefault(repr(written.shape), (written.shape, [], []))
            at.append(width)
            constants.append(written.constants)
    written = {key: [_packed(*each) for each in shapes.values()] for key, shapes in found.items()}
    return {"formulas": written, "refused": refused}


def _packed(shape: Any, widths: list[int], constants: list[list[int]]) -> dict[str, Any]:
    columns = [_column(widths, column) for column in zip(*constants, strict=True)]
    return {"shape": shape, "widths": widths, "constants": columns}


def _column(widths: list[int], values: tuple[int, ...]) -> dict[str, list[str]]:
    """One constant at these widths: a polynomial of degree 2 at most in ``D / 64``, else a list."""
    first = [Fraction(width, UNIT) for width in widths[:3]]
    coefficients = _through(first, values[: len(first)])
    exact = all(
        sum(c * Fraction(width, UNIT) ** i for i, c in enumerate(coefficients)) == value
        for width, value in zip(widths, values, strict=True)
    )
    if exact and all(c.denominator == 1 for c in coefficients):
        while len(coefficients) > 1 and not coefficients[-1]:
            coefficients.pop()
        return {"polynomial": [str(c) for c in coefficients]}
    return {"values": [str(value) for value in values]}


def _through(at: list[Fraction], values: Sequence[int]) -> list[Fraction]:
    """The coefficients of the polynomial through up to three points (Newton's divided differences)."""
    y = [Fraction(value) for value in values]
    if len(at) == 1:
        return y
    slope = (y[1] - y[0]) / (at[1] - at[0])
    if len(at) == 2:
        return [y[0] - slope * at[0], slope]
    bend = ((y[2] - y[1]) / (at[2] - at[1]) - slope) / (at[2] - at[0])
    return [y[0] - slope * at[0] + bend * at[0] * at[1], slope - bend * (at[0] + at[1]), bend]


def tables(widths: Sequence[int] = WIDTHS) -> dict[str, Any]:
    """All that the chooser computes with."""
    return {
        "unit": UNIT,
        "widths": list(widths),
        "longest": LONGEST,
        "windowed": WINDOWED,
        "partial": list(FAMILIES["sparse attention"]),
        "families": {family: list(members) for family, members in FAMILIES.items()},
        "mixers": {name: table(mixer_formulas, name, widths) for name in MIXERS},
        "channels": {name: table(channel_formulas, name, widths) for name in CHANNEL_MIXERS},
        "fft": fft_table(),
    }
