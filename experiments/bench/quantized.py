"""One decoded token with weights of fewer bits, beside float32 and reading them once: ``experiments.bench quantized``.

Twelve layers of width 768 with random weights, one row, after a prompt of 512 tokens. In turn: the same stack in
float32, in bfloat16, by ``seqarch.quantize`` in 8 and 4 bits, and with torchao's weight-only 8 bits where that is
installed; and for each the sum of as many bytes of float32 as its weights and its state after the prompt have. A turn
is of several tokens.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.bench.benchmark import Absent
from experiments.bench.devices import Cpu
from experiments.bench.measure import ratio
from experiments.bench.record import prepare_folder, provenance, text_table
from experiments.bench.tokens import DEPTH, PROMPT, WIDTH, WITHOUT_CHANNEL, decoding, in_turns
from experiments.util.files import write_atomic
from seqarch.models.quantization import quantize, weight_bytes
from seqarch.models.stack import Stack

STACKS = ("mamba", "mamba2", "linear_attention", "gated_delta_net", "attention")
HEADER = ("stack", "weights", "MB", "token ms", "tokens/s", "times float32", "reading ms", "of the bound")


@dataclass(frozen=True)
class Token:
    """Medians of one stack with its weights in one form.

    Attributes:
        weights: the form, ``"float32"`` the one that others are compared with.
        megabytes: of all weights, scales included.
        milliseconds: of a token; ``reading`` for reading weights and state once.
        times: faster than float32, and ``share`` what ``reading`` is of ``milliseconds``, medians of the rounds.
        rounds: that the medians are of.
    """

    stack: str
    weights: str
    megabytes: float
    milliseconds: float
    reading: float
    times: float
    share: float
    rounds: int

    @property
    def cells(self) -> tuple[str, ...]:
        numbers = (self.milliseconds, 1e3 / self.milliseconds, self.times, self.reading, self.share)
        places = (2, 1, 2, 2, 2)
        shown = (f"{number:.{digits}f}" for number, digits in zip(numbers, places, strict=True))
        return self.stack, self.weights, f"{self.megabytes:.0f}", *shown


def _torchao(stack: Stack) -> Stack:
    """torchao's 8 bits, whose tensors torch's own maps multiply.

    Raises:
        Absent: it is not installed.
    """
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it says which of its GPU libraries it finds no GPU for
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise Absent(f"torchao: {error}") from error
    quantize_(stack, Int8WeightOnlyConfig())
    return stack


def _bytes(stack: nn.Module) -> int:
    """Of its weights, and of what tensors of another package are made of."""
    parts: dict[int, Any] = {id(each): each for each in stack.parameters() if hasattr(each, "__tensor_flatten__")}
    held = [getattr(each, name) for each in parts.values() for name in each.__tensor_flatten__()[0]]
    shown = sum(each.numel() * each.element_size() for each in parts.values())
    return weight_bytes(stack) - shown + sum(each.numel() * each.element_size() for each in held)


FORMS: dict[str, Callable[[Stack], Stack]] = {
    "float32": lambda stack: stack,
    "bfloat16": lambda stack: stack.bfloat16(),
    "int8": partial(quantize, name="int8"),
    "int4": partial(quantize, name="int4"),
    "torchao int8": _torchao,
}
"""What is made of a stack in float32."""


@torch.no_grad()
def measure(pattern: str, budget: float, width: int = WIDTH, depth: int = DEPTH, prompt: int = PROMPT) -> list[Token]:
    """A stack in every form that is here, ``budget`` seconds for each of what takes turns."""
    torch.manual_seed(0)
    channel = "none" if pattern in WITHOUT_CHANNEL else "swiglu"
    plain = Stack(d_model=width, pattern=pattern, depth=depth, channel=channel).eval()
    sizes, works = {}, {}
    for form, make in FORMS.items():
        try:
            stack = make(copy.deepcopy(plain))
        except Absent as reason:
            print(f"{form} is absent: {reason}")
            continue
        sizes[form] = _bytes(stack)
        works[form] = decoding(stack, stack, 1, prompt)
        works[f"{form}, reading"] = torch.ones((sizes[form] + stack.state_bytes(prompt)) // 4).sum
    times = in_turns(works, budget)
    median = {name: 1e3 * sorted(found)[len(found) // 2] for name, found in times.items()}
    return [
        Token(
            pattern,
            form,
            1e-6 * size,
            median[form],
            median[f"{form}, reading"],
            ratio(times["float32"], times[form]),
            ratio(times[f"{form}, reading"], times[form]),
            len(times[form]),
        )
        for form, size in sizes.items()
    ]


def run(only: str, folder: Path, budget: float) -> None:
    """Measure the stacks with ``only`` in their name, print a table, and write ``quantized.json`` if that is all."""
    prepare_folder(folder, ["quantized"])
    found: list[Token] = []
    for pattern in STACKS:
        if only not in pattern:
            continue
        found += measure(pattern, budget)
        if not only:
            kept = {"quantized": [asdict(each) for each in found]} | provenance(Cpu())
            write_atomic(folder / "quantized.json", json.dumps(kept, indent=1) + "\n")
    print("\n".join(text_table(HEADER, [each.cells for each in found], left=("stack", "weights"))))
