"""One decoded token of a stack of each mixer, beside reading its weights and state once: ``experiments.bench tokens``.

Twelve layers of width 768 with random weights, float32, after a prompt of 512 tokens. In turn, several times each: a
token as the stack decodes it, one of four rows, one layer after another in torch, and the sum of as many numbers as the
weights have and the state after the prompt: the least time that reading them takes where the tokens before left them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.bench.benchmark import timed
from experiments.bench.devices import Cpu
from experiments.bench.measure import alternate, ratio
from experiments.bench.record import prepare_folder, provenance, text_table
from experiments.util.files import write_atomic
from seqarch.layers import MIXERS
from seqarch.models.stack import Stack, in_turn
from seqarch.models.stack_layer import StackLayer

WIDTH, DEPTH, PROMPT, ROWS = 768, 12, 512, 4
ROUNDS = 60
TOKENS = 16
"""That a turn has, one after another, as whoever decodes has them. For a single one between others' work nothing of the
one before is left in a cache: with weights of 4 bits and a large cache it takes twice as long."""

ROOM = 4096
"""Tokens that may be decoded before a cache is full."""

WITHOUT_CHANNEL = ("mamba",)
"""Mixers that stacks have alone: the others take turns with a SwiGLU."""

HYBRIDS = ("3*gated_delta_net attention", "mamba2 attention", "3*kda mla")
HEADER = ("stack", "MB", "state MB", "token ms", "torch ms", "reading ms", "of the bound", f"{ROWS} rows")


@dataclass(frozen=True)
class Token:
    """Medians of one stack.

    Attributes:
        megabytes: of weights, and ``state`` of the state after the prompt.
        milliseconds: of a token; ``torch`` layer by layer in torch; ``reading`` for reading weights and state once.
        share: ``reading`` over ``milliseconds``, the median of the rounds.
        rows: tokens of :data:`ROWS` rows over those of one, in the same time.
        rounds: that the medians are of.
    """

    stack: str
    megabytes: float
    state: float
    milliseconds: float
    torch: float
    reading: float
    share: float
    rows: float
    rounds: int

    @property
    def cells(self) -> tuple[str, ...]:
        times = (f"{each:.2f}" for each in (self.milliseconds, self.torch, self.reading, self.share, self.rows))
        return self.stack, f"{self.megabytes:.0f}", f"{self.state:.1f}", *times


def stacks() -> list[str]:
    """The patterns that are measured."""
    return [*MIXERS, *HYBRIDS]


@torch.no_grad()
def measure(pattern: str, budget: float, width: int = WIDTH, depth: int = DEPTH, prompt: int = PROMPT) -> Token:
    """One stack, ``budget`` seconds for each of what takes turns."""
    torch.manual_seed(0)
    channel = "none" if pattern in WITHOUT_CHANNEL else "swiglu"
    stack = Stack(d_model=width, pattern=pattern, depth=depth, channel=channel).eval()
    weights, state = 4 * sum(parameter.numel() for parameter in stack.parameters()), stack.state_bytes(prompt)
    layers = [layer for layer in stack.layers if isinstance(layer, StackLayer)]
    layer_by_layer = partial(in_turn, layers, cu_seqlens=None)
    works = {
        "token": decoding(stack, stack, 1, prompt),
        "rows": decoding(stack, stack, ROWS, prompt),
        "torch": decoding(stack, layer_by_layer, 1, prompt),
        "reading": torch.ones((weights + state) // 4).sum,
    }
    times = in_turns(works, budget)
    median = {name: 1e3 * sorted(found)[len(found) // 2] for name, found in times.items()}
    return Token(
        pattern,
        1e-6 * weights,
        1e-6 * state,
        median["token"],
        median["torch"],
        median["reading"],
        ratio(times["reading"], times["token"]),
        ROWS * ratio(times["token"], times["rows"]),
        min(map(len, times.values())),
    )


def in_turns(works: Mapping[str, Callable[[], Tensor]], budget: float) -> dict[str, list[float]]:
    """Seconds of a call of each, the mean of a turn of :data:`TOKENS`, for the turns of ``budget`` seconds."""
    device = Cpu()

    def turn(work: Callable[[], Tensor]) -> None:
        for _ in range(TOKENS):
            work()

    runners = {name: partial(device.seconds, timed(turn, {"work": work})) for name, work in works.items()}
    times = alternate(runners, budget, ROUNDS)
    return {name: [seconds / TOKENS for seconds in found] for name, found in times.items()}


def decoding(stack: Stack, step: Callable[..., Any], rows: int, prompt: int) -> Callable[[], Tensor]:
    """A call that decodes one more token after a prompt, in the dtype of the stack."""
    dtype = next(stack.parameters()).dtype
    prompts, x = (torch.randn(rows, length, stack.config.d_model, dtype=dtype) for length in (prompt, 1))
    _, state = stack(prompts, stack.init_state(rows, prompt + ROOM))

    def token() -> Tensor:
        nonlocal state
        y, state = step(x, state)
        return y

    return token


def run(only: str, folder: Path, budget: float) -> None:
    """Measure the stacks whose pattern has ``only`` in it, print a table, and write ``tokens.json`` if that is all."""
    prepare_folder(folder, ["tokens"])
    found: list[Token] = []
    for token in _measured(only, budget):
        found.append(token)
        print("  ".join(f"{name} {cell}" for name, cell in zip(HEADER, token.cells, strict=True)), flush=True)
        if not only:
            kept = {"tokens": [asdict(each) for each in found]} | provenance(Cpu())
            write_atomic(folder / "tokens.json", json.dumps(kept, indent=1) + "\n")
    print("\n".join(text_table(HEADER, [each.cells for each in found], left=("stack",))))


def _measured(only: str, budget: float) -> Iterator[Token]:
    return (measure(pattern, budget) for pattern in stacks() if only in pattern)
