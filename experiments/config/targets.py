"""What a run's widths are matched to: numbers of parameters and bytes of state, plain or with a unit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

COUNTS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
BYTES = {
    **{"": 1, "B": 1},
    **{f"{prefix}B": 10 ** (3 * (power + 1)) for power, prefix in enumerate("KMG")},
    **{f"{prefix}iB": 2 ** (10 * (power + 1)) for power, prefix in enumerate("KMG")},
}
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z%]*)\s*")


@dataclass(frozen=True)
class MatchConfig:
    """What the widths of a run's mixers and channel mixers are solved for, before anything is trained.

    Numbers are plain or text with a unit: ``140k`` or ``1.5M`` parameters, ``20KiB`` (1024 bytes each) or ``20KB``
    (1000), ``3%``.

    Attributes:
        parameters: of the language model, as ``count`` counts them; null leaves them.
        state_bytes: bytes of the model's state for one sequence, as a run's record has them; null leaves them.
        state_length: the number of tokens after which the state is measured; null for the task's training length.
        tolerance: how far the result may be from either, as a share.
        count: ``all`` parameters, or those of the ``layers``, without embedding, last norm and head.
    """

    parameters: Any = None
    state_bytes: Any = None
    state_length: int | None = None
    tolerance: Any = "3%"
    count: Literal["all", "layers"] = "all"

    def __post_init__(self):
        _ = self.wanted_parameters, self.wanted_state  # raise where they are no numbers
        if not 0 < self.share < 1:
            raise ValueError(f"tolerance must be above 0 and below 1 (100%), got {self.tolerance!r}")
        if self.state_length is not None and self.state_length < 1:
            raise ValueError(f"state_length must be at least 1 token, got {self.state_length}")

    @property
    def asks(self) -> bool:
        """Whether anything is to be matched."""
        return (self.parameters, self.state_bytes) != (None, None)

    @property
    def wanted_parameters(self) -> int | None:
        """The number of parameters; ``None`` where they are left as they are."""
        return (
            None if self.parameters is None else _whole("parameters", self.parameters, COUNTS, "140000, 140k or 1.5M")
        )

    @property
    def wanted_state(self) -> int | None:
        """The bytes of the state; ``None`` where they are left as they are."""
        return (
            None if self.state_bytes is None else _whole("state_bytes", self.state_bytes, BYTES, "20480, 20KiB or 20KB")
        )

    @property
    def share(self) -> float:
        """The tolerance, 0.03 for 3%."""
        return float(_number("tolerance", self.tolerance, {"": 1, "%": Decimal("0.01")}, "0.03 or 3%"))


def _number(name: str, given: Any, units: Mapping[str, Decimal | int], examples: str) -> Decimal:
    text = str(given) if type(given) in (int, float, str) else ""
    match = _NUMBER.fullmatch(text)
    if match is None or match[2] not in units:
        named = ", ".join(unit for unit in units if unit)
        raise ValueError(f"{name}: expected a number such as {examples} (units: {named}), got {given!r:.40}")
    return Decimal(match[1]) * units[match[2]]


def _whole(name: str, given: Any, units: Mapping[str, int], examples: str) -> int:
    number = _number(name, given, units, examples)
    if not 1 <= number < 2**53 or number != round(number):
        raise ValueError(f"{name}: expected a whole number of at least 1, got {given!r:.40}")
    return int(number)
