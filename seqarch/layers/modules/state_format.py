"""How a small state holds numbers: codes of 16, 8 or 4 bits, rounded to the nearest or by chance.

Numbers side by side share a scale, and a number is ``code scale``: codes are whole numbers from -127 to 127, or from -7
to 7, and scales are bfloat16. Everything is held as whole numbers, bfloat16 as its 16 bits in int16. *Stochastic
rounding* goes up with the probability that makes the mean right; its noise is a hash of the seed, the position in the
sequence and the number's place, so that the same text gets the same noise in whatever row, batch or process. What
rounding leaves over can be kept in 4 bits, in units of the code's own step: it is added to the numbers before they are
rounded the next time (*error feedback*: Seide et al. 2014; with the rest in 4 bits, Modoranu et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch.ops.dispatch.checks import fits, show, unknown_name

FORMATS = {"float32": 0, "bfloat16": 0, "int8": 127, "int4": 7}
"""By name the largest code; 0 where numbers have no scale."""

ROUNDINGS = ("nearest", "stochastic")
GROUPS = {"bfloat16": 32, "int8": 64, "int4": 32}
"""Numbers that share a scale, by default; of bfloat16, which has none, numbers that lie in one row at least."""

MOST_SEED = 2**31 - 1
RESIDUALS = 7
"""The largest code of what rounding leaves over."""


class Coded(NamedTuple):
    """Numbers ``[B, ...]`` of a state as codes.

    Attributes:
        codes: float32 as the numbers are; int16 or int8 ``[B, ..., N]``, or uint8 ``[B, ..., ceil(N / 2)]`` with two in
            a byte. N is the last size, or the last few together where they are less than a group.
        scales: int16 ``[B, ..., ceil(N / group_size)]``; ``None`` without.
        residual: uint8 ``[B, ..., ceil(N / 2)]``, what rounding left over; ``None`` without error feedback.
        seen: int64 ``[B]``, tokens of each row so far, from which noise is made; ``None`` without stochastic rounding.
    """

    codes: Tensor
    scales: Tensor | None
    residual: Tensor | None
    seen: Tensor | None


@dataclass(frozen=True)
class StateFormat:
    """How the numbers of a state are held.

    Attributes:
        name: ``"float32"``, ``"bfloat16"``, ``"int8"`` or ``"int4"``.
        rounding: ``"nearest"`` or ``"stochastic"``.
        error_feedback: whether what rounding leaves over is kept, in 4 bits a number.
        group_size: how many numbers share a scale, at least 2; by default 64 of ``"int8"`` and 32 of ``"int4"``.
        seed: of stochastic rounding.
    """

    name: str
    rounding: str = "nearest"
    error_feedback: bool = False
    group_size: int | None = None
    seed: int = 0

    def __post_init__(self):
        if not isinstance(self.name, str) or self.name not in FORMATS:
            raise unknown_name("format of states", self.name, FORMATS)
        if self.rounding not in ROUNDINGS:
            raise unknown_name("rounding", self.rounding, ROUNDINGS)
        if not isinstance(self.error_feedback, bool):
            raise ValueError(f"error_feedback is {show(self.error_feedback)}, expected True or False")
        if not fits(self.seed, (int,)) or not 0 <= self.seed <= MOST_SEED:
            raise ValueError(f"seed is {show(self.seed)}, expected an int from 0 to {MOST_SEED}")
        if self.group_size is not None and not self.most:
            raise ValueError(f"group_size is {show(self.group_size)}, but numbers of {self.name!r} share no scale")
        if self.group_size is not None and not (fits(self.group_size, (int,)) and 2 <= self.group_size <= 2**16):
            raise ValueError(f"group_size is {show(self.group_size)}, expected an int from 2 to {2**16}")
        if self.name == "float32" and (self.error_feedback or self.rounding != "nearest"):
            raise ValueError("numbers of 'float32' are not rounded: expected neither stochastic nor error_feedback")

    @property
    def most(self) -> int:
        """The largest code; 0 without scales."""
        return FORMATS[self.name]

    @property
    def group(self) -> int:
        return self.group_size or GROUPS.get(self.name, 1)

    @property
    def is_stochastic(self) -> bool:
        return self.rounding == "stochastic"

    @property
    def of_inputs(self) -> StateFormat:
        """For numbers that stay as they were once they are rounded: to the nearest, and of 8 bits at least."""
        return StateFormat("int8" if self.name == "int4" else self.name, group_size=self.group_size)

    @property
    def of_tokens(self) -> StateFormat:
        """For what is written once for each token: nothing is left over for a next time."""
        return replace(self, error_feedback=False)

    def layout(self, shape: Sequence[int], lead: int = 1) -> tuple[int, ...]:
        """A shape with the last sizes taken together until they make a group, without the first ``lead`` of them."""
        sizes, row = list(shape), 1
        while self.name != "float32" and len(sizes) > lead and (len(sizes) == len(shape) or row < self.group):
            row *= sizes.pop()
        return tuple(shape) if self.name == "float32" else (*sizes, row)

    def encode(self, x: Tensor, places: Tensor | None = None, salt: int = 0) -> Coded:
        """Codes of numbers in their :meth:`layout`, without ``seen``.

        Args:
            places: int64, of each row, or of each token of each row, its place in the sequence, which noise is made of:
                the first dimensions of x; needed by stochastic rounding alone.
            salt: of noise, below 8, for tensors of which a token has several.
        """
        if self.name == "float32":
            return Coded(x.float(), None, None, None)
        codes, scales, residual = torch.ops.seqarch.encode_state(
            x, places if self.is_stochastic else None, self.name, self.is_stochastic, self.error_feedback, self.group,
            self.seed * 8 + salt,
        )  # fmt: skip
        return Coded(codes, scales if self.most else None, residual if self.error_feedback else None, None)

    def decode(self, coded: Coded, width: int, dtype: torch.dtype) -> Tensor:
        """The numbers that codes stand for, ``width`` of them in a row."""
        if self.name == "float32":
            return coded.codes.to(dtype)
        scales = coded.codes if coded.scales is None else coded.scales
        return torch.ops.seqarch.decode_state(coded.codes, scales, self.name, self.group, width).to(dtype)

    def left_over(self, coded: Coded, width: int) -> Tensor:
        """What rounding left over of numbers, float32, where error feedback keeps it."""
        scales, parts = coded.codes if coded.scales is None else coded.scales, 1 if self.is_stochastic else 2
        return torch.ops.seqarch.decode_residual(coded.residual, scales, self.name, self.group, width, parts)


def noise(places: Tensor, count: int, seed: int) -> Tensor:
    """Numbers from 0 to 1, 1 excluded, ``[*places, count]``: a hash of place, number and seed."""
    at = torch.arange(count, device=places.device)
    key = _mixed(_mixed(places + seed * 0x9E3779B1 & 0xFFFFFFFF) ^ seed & 0xFFFFFFFF)
    return (_mixed(key[..., None] ^ at * 0x85EBCA6B & 0xFFFFFFFF) >> 8).float() * 2.0**-24


def _mixed(x: Tensor) -> Tensor:
    """A hash of 32 bits (Wellons' "lowbias32"), in int64."""
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def _packed(codes: Tensor) -> Tensor:
    """Codes of 4 bits ``[..., N]``, from -8 to 7, as ``ceil(N / 2)`` bytes, the first in the lower bits."""
    bytes_ = -(-codes.shape[-1] // 2)
    pairs = F.pad(codes.to(torch.int16) + 8, (0, codes.shape[-1] % 2)).unflatten(-1, (bytes_, 2))
    return (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)


def _unpacked(packed: Tensor, width: int) -> Tensor:
    pairs = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)[..., :width]
    return pairs.to(torch.int8) - 8


def _spread(scales: Tensor, group: int, width: int) -> Tensor:
    """The scales' bits as the scale of each number, float32 ``[..., N]``."""
    wide = scales.view(torch.bfloat16).float()
    return wide.unsqueeze(-1).expand(*wide.shape, group).flatten(-2)[..., :width]


def _steps(scales: Tensor, name: str, group: int, width: int) -> Tensor:
    """The step between codes at each number: its scale or, of bfloat16, the last bit of ``scales``, then the codes."""
    if FORMATS[name]:
        return _spread(scales, group, width)
    exponents = (scales.to(torch.int32) >> 7 & 0xFF) - 7
    return (exponents.clamp(min=1) << 23).view(torch.float32)


def _scales(x: Tensor, most: int, group: int, up: bool) -> Tensor:
    """Bits of the scale of each group, the nearest in bfloat16 or, where no code may be cut off, the next one up."""
    groups = -(-x.shape[-1] // group)
    padded = F.pad(x.abs(), (0, groups * group - x.shape[-1])).unflatten(-1, (groups, group))
    scale = padded.amax(-1) / most
    if up:
        return (scale.view(torch.int32) + 0xFFFF >> 16).to(torch.int16)
    return scale.bfloat16().view(torch.int16)


def _codes(x: Tensor, noisy: Tensor | None, scales: Tensor, most: int, group: int) -> Tensor:
    scale = _spread(scales, group, x.shape[-1])
    parts = x / scale.where(scale != 0, 1.0)
    whole = parts.round() if noisy is None else (parts + noisy).floor()
    return whole.clamp(-most, most).to(torch.int8)


def _bits(x: Tensor, noisy: Tensor | None) -> Tensor:
    """Numbers as the bits of bfloat16: what is cut off is up to its last bit, or carries by chance."""
    nearest = x.bfloat16().view(torch.int16)
    if noisy is None:
        return nearest
    carried = (x.view(torch.int32) + (noisy * 2.0**16).to(torch.int32) >> 16).to(torch.int16)
    return carried.where(x.isfinite(), nearest)


@torch.library.custom_op("seqarch::encode_state", mutates_args=())
def encode_state(
    x: Tensor, places: Tensor | None, name: str, stochastic: bool, feedback: bool, group: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and what is left over of numbers ``[..., N]``; empty where a format has none."""
    x, most, none = x.float().contiguous(), FORMATS[name], torch.empty(0, dtype=torch.uint8, device=x.device)
    noisy = None
    if stochastic:
        assert places is not None
        noisy = noise(places, x[(0,) * places.ndim].numel() if x.numel() else 0, seed).view(x.shape)
    if not most:
        codes, scales = _bits(x, noisy), none
        plain, steps = codes.view(torch.bfloat16).float(), codes
    else:
        scales = steps = _scales(x, most, group, up=stochastic)
        codes = _codes(x, noisy, scales, most, group)
        plain = codes * _spread(scales, group, x.shape[-1])
    if feedback:
        step = _steps(steps, name, group, x.shape[-1])
        parts = (x - plain) / step.where(step != 0, 1.0) * RESIDUALS * (1 if stochastic else 2)
        none = _packed(parts.round().clamp(-RESIDUALS, RESIDUALS))
    return _packed(codes) if name == "int4" else codes, scales.clone(), none


@encode_state.register_fake
def _(x, places, name, stochastic, feedback, group, seed):  # type: ignore[no-untyped-def]
    lead, width = x.shape[:-1], x.shape[-1]
    half, groups = (width + 1) // 2, (width + group - 1) // group
    codes = {"bfloat16": (width, torch.int16), "int8": (width, torch.int8), "int4": (half, torch.uint8)}[name]
    scales = x.new_empty((*lead, groups), dtype=torch.int16) if FORMATS[name] else x.new_empty(0, dtype=torch.uint8)
    residual = x.new_empty((*lead, half) if feedback else (0,), dtype=torch.uint8)
    return x.new_empty((*lead, codes[0]), dtype=codes[1]), scales, residual


@torch.library.custom_op("seqarch::decode_state", mutates_args=())
def decode_state(codes: Tensor, scales: Tensor, name: str, group: int, width: int) -> Tensor:
    """Numbers ``[..., N]``, float32, of codes."""
    if not FORMATS[name]:
        return codes.view(torch.bfloat16).float()
    plain = _unpacked(codes, width) if name == "int4" else codes
    return plain * _spread(scales, group, width)


@decode_state.register_fake
def _(codes, scales, name, group, width):  # type: ignore[no-untyped-def]
    return codes.new_empty((*codes.shape[:-1], width) if FORMATS[name] else codes.shape, dtype=torch.float32)


@torch.library.custom_op("seqarch::decode_residual", mutates_args=())
def decode_residual(residual: Tensor, scales: Tensor, name: str, group: int, width: int, parts: int) -> Tensor:
    """Numbers ``[..., N]``, float32, that rounding left over, of codes in parts of a step."""
    return _unpacked(residual, width) * _steps(scales, name, group, width) / (RESIDUALS * parts)


@decode_residual.register_fake
def _(residual, scales, name, group, width, parts):  # type: ignore[no-untyped-def]
    return residual.new_empty((*residual.shape[:-1], width), dtype=torch.float32)
