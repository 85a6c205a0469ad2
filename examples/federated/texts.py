"""Four clients' texts: of four kinds and very different lengths, all from Python's own library."""

from __future__ import annotations

import argparse
import ast
import calendar
import inspect
import random
import typing
import unicodedata
from functools import cache
from pydoc_data.topics import topics

import torch
from torch import Tensor

TEST_BYTES = 8192
"""The end of each client's text, on which nobody trains."""


def manual() -> str:
    """Python's manual of its language: English prose."""
    return "\n".join(topics[name] for name in sorted(topics))


def source() -> str:
    """Source code in Python."""
    return "".join(inspect.getsource(module) for module in (argparse, typing, ast, inspect))


def names() -> str:
    """Names of characters, in no order."""
    found = [name for number in range(0xA0, 0x1400) if (name := unicodedata.name(chr(number), ""))]
    return "\n".join(random.Random(0).sample(found, len(found)))


def calendars() -> str:
    """Columns of numbers: two decades."""
    return "".join(calendar.TextCalendar().formatyear(year) for year in range(2000, 2020))


CLIENTS = {
    "manual": (manual, 240_000),
    "source": (source, 120_000),
    "names": (names, 60_000),
    "calendar": (calendars, 24_000),
}
"""Each client's text, and how many bytes of it there are, with those for its test."""


@cache
def text(client: str) -> Tensor:
    """The bytes of a client's text, ``[bytes]``."""
    make, size = CLIENTS[client]
    found = torch.tensor(list(make().encode()[:size]))
    if len(found) < size:
        raise ValueError(f"the text of {client} has {len(found)} bytes, expected {size}")
    return found


class Reader:
    """A client's text in rows, read piece after piece from left to right.

    Args:
        client: whose text it is.
        at: how many pieces were read before.

    Attributes:
        state: the model's after the last piece, for the next; nothing at the beginning of the rows.
    """

    ROWS, PIECE = 8, 128

    def __init__(self, client: str, at: int = 0):
        train = text(client)[:-TEST_BYTES]
        length = (len(train) // self.ROWS - 1) // self.PIECE * self.PIECE
        self.rows = train[: self.ROWS * (length + 1)].view(self.ROWS, length + 1)
        self.pieces = length // self.PIECE
        self.at = at % self.pieces
        self.state = None

    def piece(self) -> Tensor:
        """The next piece ``[rows, bytes + 1]``, which begins with the last byte of the one before it."""
        if self.at == 0:
            self.state = None
        start, self.at = self.at * self.PIECE, (self.at + 1) % self.pieces
        return self.rows[:, start : start + self.PIECE + 1]


def test_rows(client: str) -> Tensor:
    """What a client is tested on, ``[16, 512]``."""
    return text(client)[-TEST_BYTES:].view(16, 512)
