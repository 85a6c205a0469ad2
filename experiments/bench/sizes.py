"""The sizes of what is measured: those that a kind of device has in common, and those of one call."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

BLOCK, BLOCKS = 64, 16
"""Tokens of a block of sparse attention, and blocks per query and head."""

STATES, TAPS = 16, 4
"""States per channel of a selective scan, and taps of a convolution."""

LEVELS = 18
"""Of log-linear attention: as many as 131,072 tokens need."""

CHOSEN = 2
"""Experts per token."""

INDEX_HEADS, INDEX_WIDTH, TOP_K = 4, 32, 64
"""Of an indexer, and the tokens that it chooses for each query."""

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Setup:
    """The sizes and settings that a kind of device is measured at; the command line may replace some.

    Attributes:
        kind: of device, as torch names it.
        heads: of attention and of the recurrences.
        widths: of each head.
        expansion: channels of a scan or convolution, and hidden units of an expert, for each of ``heads * width``.
        window: of attention, in tokens.
        experts: how many there are.
        decay: log decays are drawn between ``-decay`` and 0.
        repeated_blocks: whether a query's list of blocks may hold one twice. Drawing different ones takes a table
            of all blocks for every query, which many long sequences leave no memory for.
        lengths: of sequences.
        tokens: of all sequences of a call together; with ``None`` a call has one sequence.
        token_batches: of how many sequences one more token is decoded.
        dtypes: by name, the default first.
        budget: seconds per implementation, mode and sizes.
        skipped: how the names of backends end that are not measured.
        folder: of the records.
    """

    kind: str
    heads: int
    widths: tuple[int, ...]
    expansion: int
    window: int
    experts: int
    decay: float
    repeated_blocks: bool
    lengths: tuple[int, ...]
    tokens: int | None
    token_batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    budget: float
    skipped: tuple[str, ...]
    folder: Path

    def describe(self, title: str) -> str:
        """A benchmark's title, with these sizes in the places of their names."""

        width = self.widths[0] if len(self.widths) == 1 else "width"

        def features(heads: int) -> object:
            return f"{heads} x width" if width == "width" else heads * self.widths[0]

        wide = features(self.expansion * self.heads)
        names = {"width": width, "d_model": features(self.heads), "channels": wide, "hidden": wide}
        return title.format(heads=self.heads, window=self.window, experts=self.experts, **names)


CPU = Setup(
    kind="cpu",
    heads=8,
    widths=(64,),
    expansion=2,
    window=256,
    experts=8,
    decay=1.0,
    repeated_blocks=False,
    lengths=tuple(2**exponent for exponent in range(9, 17)),
    tokens=None,
    token_batches=(),
    dtypes=("float32", "bfloat16"),
    budget=3.0,
    skipped=(),
    folder=Path("runs/bench"),
)
CUDA = Setup(
    kind="cuda",
    heads=16,
    widths=(64, 128),
    expansion=1,
    window=1024,
    experts=16,
    decay=0.01,
    repeated_blocks=True,
    lengths=tuple(2**exponent for exponent in range(10, 18)),
    tokens=2**17,
    token_batches=(1, 64),
    dtypes=("bfloat16", "float16", "float32"),
    budget=0.2,
    skipped=("recurrent_torch", "_cpp"),  # token by token, and for CPUs
    folder=Path("docs/results/gpu"),
)
SETUPS = {setup.kind: setup for setup in (CPU, CUDA)}


@dataclass(frozen=True)
class Sizes:
    """The size of a call: ``batch`` sequences of ``length`` tokens, with heads of ``width``, on a device."""

    setup: Setup
    length: int
    width: int = 64
    batch: int = 1
    dtype: torch.dtype = torch.float32
    device: torch.device = HOST

    @property
    def heads(self) -> int:
        return self.setup.heads

    @property
    def d_model(self) -> int:
        return self.heads * self.width

    @property
    def channels(self) -> int:
        """Of a scan or a convolution; an expert has as many hidden units."""
        return self.setup.expansion * self.d_model

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def normal(self, *sizes: int) -> torch.Tensor:
        """``[batch, length, *sizes]`` normal numbers, in float32."""
        return torch.randn(self.batch, self.length, *sizes, device=self.device)

    def uniform(self, *sizes: int) -> torch.Tensor:
        """``[batch, length, *sizes]`` numbers between 0 and 1, in float32."""
        return torch.rand(self.batch, self.length, *sizes, device=self.device)
