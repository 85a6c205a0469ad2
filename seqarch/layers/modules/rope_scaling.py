"""Rotary positions for longer sequences than a model began with: the ``rope_scaling`` of released models.

Types and options have the names and the formulas of ``transformers`` (``modeling_rope_utils``), so that the
``rope_parameters`` of a ``config.json`` can be given as they are, but for ``rope_theta`` and ``partial_rotary_factor``,
the mixers' ``rotary_base`` and ``rotary_fraction``:

    linear    positions divided by ``factor`` (Chen et al. 2023, "Extending Context Window of Large Language Models via
              Positional Interpolation")
    dynamic   a larger base, which depends on ``length`` (NTK-aware scaling, as Peng et al. 2023 describe it)
    yarn      slow pairs are divided, fast ones not (Peng et al. 2023, "YaRN")
    longrope  a divisor for each pair (Ding et al. 2024, "LongRoPE"; Phi-3)
    llama3    as yarn, by wavelengths and without a change of the scores (Llama 3.1)

For ``dynamic`` and ``longrope``, ``transformers`` chooses anew in each call, by its length, so that a token's output
depends on those after it and on how a sequence is split. Here ``length``, the longest sequence that is meant, chooses
once; the two agree on a call of that length.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from seqarch.layers.modules.configured import make_config
from seqarch.layers.modules.options import check_options
from seqarch.layers.modules.rotary import frequencies
from seqarch.ops.dispatch.checks import fits, show, unknown_name


@dataclass(frozen=True, kw_only=True)
class RopeScaling(ABC):
    """How a rotation of some width and base is changed."""

    may_be_zero: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        check_options(self, self.may_be_zero)

    @abstractmethod
    def frequencies(self, width: int, base: float, device: torch.device | None = None) -> Tensor:
        """The angle of each pair per token: float64 ``[K / 2]`` for K = ``width``."""

    @property
    def amplitude(self) -> float:
        """What the turned channels of queries and keys are multiplied by."""
        return 1.0

    @property
    def score_factor(self) -> float:
        """What latent attention multiplies its scores by besides, those of channels that do not turn too."""
        return 1.0

    def check(self, width: int, base: float) -> None:
        """Raise ``ValueError`` where heads with so many turning channels, or this base, cannot be turned so."""
        return


@dataclass(frozen=True, kw_only=True)
class LinearScaling(RopeScaling):
    """Every pair turns ``factor`` times as slowly."""

    factor: float

    def frequencies(self, width: int, base: float, device: torch.device | None = None) -> Tensor:
        return frequencies(width, base, device) / self.factor


@dataclass(frozen=True, kw_only=True)
class DynamicScaling(RopeScaling):
    """The base times ``(f L / L_0 - f + 1) ** (K / (K - 2))``, f the ``factor``, L the ``length``, at least L_0.

    Attributes:
        original_max_position_embeddings: L_0, tokens that the model was trained on.
        length: L; by default L_0, which changes nothing.
    """

    factor: float
    original_max_position_embeddings: int
    length: int | None = None

    def frequencies(self, width: int, base: float, device: torch.device | None = None) -> Tensor:
        longer = max(self.length or 0, self.original_max_position_embeddings) / self.original_max_position_embeddings
        return frequencies(width, base * (self.factor * (longer - 1) + 1) ** (width / (width - 2)), device)

    def check(self, width: int, base: float) -> None:
        if width < 4:
            raise ValueError(f"rope_type 'dynamic' needs at least 4 channels that turn, got {width}")


@dataclass(frozen=True, kw_only=True)
class YarnScaling(RopeScaling):
    """Pairs that turn less than ``beta_slow`` times in the original length are divided by ``factor``, those that turn
    more than ``beta_fast`` times are not, and between the two it is in between, linearly in the pair's number.

    Attributes:
        original_max_position_embeddings: tokens that the model was trained on.
        attention_factor: what turned channels are multiplied by; by default ``0.1 ln(factor) + 1``, or with ``mscale``
            and ``mscale_all_dim`` the quotient of ``0.1 m ln(factor) + 1`` for the two.
        mscale, mscale_all_dim: these; latent attention also multiplies all scores by the square of the second.
        truncate: whether the pairs between which it changes are rounded to whole ones.
    """

    may_be_zero: ClassVar[tuple[str, ...]] = ("mscale", "mscale_all_dim")

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def frequencies(self, width: int, base: float, device: torch.device | None = None) -> Tensor:
        own = frequencies(width, base, device)
        low, high = (self._pair(turns, width, base) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        pair = torch.arange(width // 2, dtype=torch.float64, device=device)
        slow = ((pair - low) / ((high - low) or 0.001)).clamp(0, 1)
        return own / self.factor * slow + own * (1 - slow)

    def check(self, width: int, base: float) -> None:
        if base <= 1:
            raise ValueError(f"rope_type 'yarn' needs a rotary_base above 1, got {base}")

    def _pair(self, turns: float, width: int, base: float) -> float:
        """The number of the pair that turns so often in the original length, a fraction."""
        return width * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

    def _scale(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._scale(self.mscale) / self._scale(self.mscale_all_dim)
        return self._scale(1.0)

    @property
    def score_factor(self) -> float:
        return self._scale(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling(RopeScaling):
    """Each pair is divided by a number of its own, from one of two lists.

    Attributes:
        short_factor, long_factor: the divisors, K / 2 each, for ``length`` up to the original one and beyond it.
        original_max_position_embeddings: tokens that the model was trained on.
        length: the longest sequence that is meant; by default the original one.
        factor: how many times as long sequences may be, for the next only.
        attention_factor: what turned channels are multiplied by; by default
            ``sqrt(1 + ln(factor) / ln(original_max_position_embeddings))``.
    """

    short_factor: list[float]
    long_factor: list[float]
    original_max_position_embeddings: int
    length: int | None = None
    factor: float | None = None
    attention_factor: float | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("short_factor", "long_factor"):
            for each in getattr(self, name):
                if not fits(each, (float,)) or not 0 < each < math.inf:
                    raise ValueError(f"{name} must hold positive numbers, got {each!r}")
        if self.factor is None and self.attention_factor is None:
            raise ValueError("rope_type 'longrope' needs factor or attention_factor, got neither")
        if self.original_max_position_embeddings < 2:
            raise ValueError("original_max_position_embeddings must be at least 2 for longrope, got 1")

    def frequencies(self, width: int, base: float, device: torch.device | None = None) -> Tensor:
        is_long = (self.length or 0) > self.original_max_position_embeddings
        divisors = self.long_factor if is_long else self.short_factor
        return frequencies(width, base, device) / torch.tensor(divisors, dtype=torch.float64, device=device)

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        longer = max(self.factor or 1.0, 1.0)
        return math.sqrt(1 + math.log(longer) / math.log(self.original_max_position_embeddings))

    def check(self, width: int, base: float) -> None:
        for name in ("short_factor", "long_factor"):
            if len(getattr(self, name)) != width // 2:
                given = f"{len(getattr(self, name))} numbers"
                raise ValueError(f"{name} has {given}, expected {width // 2}, one per pair of {width} channels")


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(RopeScaling):
    """Wavelengths above ``L_0 / low_freq_factor`` are divided by ``factor``, those below ``L_0 / high_freq_factor`` are
    not, and between the two it is in between, linearly in the frequency.

    Attributes:
        original_max_position_embeddings: L_0, tokens that the model was trained on.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        super().__post_init__()
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor must be below high_freq_factor ({self.high_freq_factor}), got {self.low_freq_factor}"
            )

    def frequencies(self, width: int, base: float, device: torch.device | None = None) -> Tensor:
        own = frequencies(width, base, device)
        turns = own * self.original_max_position_embeddings / (2 * math.pi)
        fast = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return own / self.factor * (1 - fast) + own * fast


ROPE_TYPES: dict[str, type[RopeScaling]] = {
    "dynamic": DynamicScaling,
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
    "longrope": LongRopeScaling,
    "yarn": YarnScaling,
}


def rope_scaling(
    options: Mapping[str, Any] | None, position: str, base: float, widths: Sequence[int]
) -> RopeScaling | None:
    """The scaling that a mixer's option ``rope_scaling`` describes, ``{"rope_type": "linear", "factor": 2.0}``.

    Args:
        position: the mixer's; only ``"rotary"`` can be scaled.
        base: the mixer's ``rotary_base``.
        widths: how many channels of its heads turn.

    Raises:
        ValueError: there is no such type, it has no such option, or does not fit the widths; it names which.
    """
    if options is None:
        return None
    if position != "rotary":
        raise ValueError(f"rope_scaling needs position='rotary', got position={position!r}")
    kind = options.get("rope_type")
    if not isinstance(kind, str):
        raise ValueError(f"rope_scaling has rope_type {show(kind)}, expected one of {', '.join(ROPE_TYPES)}")
    if kind not in ROPE_TYPES:
        raise unknown_name("rope_type", kind, ROPE_TYPES)
    rest = {name: value for name, value in options.items() if name != "rope_type"}
    scaling = make_config(f"rope_type {kind!r}", ROPE_TYPES[kind], rest)
    for width in widths:
        scaling.check(width, base)
    return scaling
