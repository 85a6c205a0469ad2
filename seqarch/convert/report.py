"""What a conversion copied, and what starts anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby


@dataclass(frozen=True)
class ConvertedMixer:
    """A mixer that took projections of another one.

    Attributes:
        layer: its number in the stack.
        source, target: names of the two mixers, as the patterns have them.
        copied: by role (``"q"``, ``"k"``, ``"v"``, ``"o"``) how often each head was repeated: 1 for a plain copy.
        kept: names of further parts that were copied as they are.
        refused: by role, or by the name of a part, of the source, why the target does not have it.
        numbers: how many of the target's parameters were copied, and how many there are.
    """

    layer: int
    source: str
    target: str
    copied: dict[str, int] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    numbers: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        roles = [role if count == 1 else f"{role} ({count} times)" for role, count in self.copied.items()]
        said = [f"{self.source} -> {self.target}", f"copied {', '.join([*roles, *self.kept]) or 'nothing'}"]
        said.append(f"{self.numbers[0]:,} of {self.numbers[1]:,} numbers")
        said += [f"without {name}: {reason}" for name, reason in self.refused.items()]
        return "; ".join(said)


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        kept_layers: numbers of the layers that were copied whole.
        mixers: of the others.
        new: names of tensors outside of mixers that the source does not have, as the weights of branches.
    """

    kept_layers: tuple[int, ...]
    mixers: tuple[ConvertedMixer, ...]
    new: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A line for each run of layers that fared alike."""
        lines = [f"layers kept whole: {_ranges(self.kept_layers) or 'none'}"]
        for said, same in groupby(self.mixers, key=str):
            lines.append(f"layer {_ranges([each.layer for each in same])}: {said}")
        return "\n".join([*lines, *([f"new: {', '.join(self.new)}"] if self.new else [])])


def _ranges(numbers: Sequence[int]) -> str:
    """``0-2, 4``: numbers in ascending order."""
    runs = [list(run) for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0][1]) if len(run) == 1 else f"{run[0][1]}-{run[-1][1]}" for run in runs)
