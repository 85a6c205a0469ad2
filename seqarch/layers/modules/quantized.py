"""Weights of 8 or 4 bits: linear maps, embeddings and experts that hold codes and scales in place of numbers.

A row of weights has a scale for every group of 32 or 64 of them along the inputs, and ``weight = code scale``, with
codes rounded to the nearest. Of 8 bits codes are from -127 to 127; of 4 bits from -8 to 7, and the scale has the sign
that makes the group's largest number -8, which uses all 16 of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch.layers.modules.linear import product
from seqarch.ops.dispatch.checks import show, unknown_name
from seqarch.ops.native import quantized_linear as kernel

CODES = {"int8": torch.int8, "int4": torch.uint8}
"""The dtype of codes by the name of a format; of 4 bits two are in a byte."""

GROUPS = {"int8": 64, "int4": 32}
"""Weights that share a scale, by default."""


@dataclass(frozen=True)
class WeightFormat:
    """How weights are held.

    Attributes:
        name: ``"int8"`` or ``"int4"``.
        group_size: how many weights side by side share a scale, 32 or 64.
    """

    name: str
    group_size: int

    def __post_init__(self):
        if not isinstance(self.name, str) or self.name not in CODES:
            raise unknown_name("format of weights", self.name, CODES)
        if type(self.group_size) is not int or self.group_size not in (32, 64):
            raise ValueError(f"group_size is {show(self.group_size)}, expected 32 or 64")

    def code_bytes(self, depth: int) -> int:
        """Bytes of the codes of a row of so many weights."""
        return depth if self.name == "int8" else -(-depth // kernel.BLOCK) * kernel.BLOCK // 2

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes ``[..., N, bytes]`` and the bits of scales ``[..., N, K / group_size]`` of ``weight [..., N, K]``."""
        grouped = weight.detach().float().unflatten(-1, (-1, self.group_size))
        scales = self.scales_of(grouped)
        return self.packed(self.rounded(grouped, scales[..., None]).flatten(-2)), scales.view(torch.int16)

    def scales_of(self, groups: Tensor) -> Tensor:
        """The scale of each group ``[..., group_size]`` by its largest weight, in bfloat16."""
        if self.name == "int8":
            return (groups.abs().amax(-1) / 127).bfloat16()
        at = groups.abs().argmax(-1, keepdim=True)
        return (groups.gather(-1, at)[..., 0] / -8).bfloat16()

    def rounded(self, weights: Tensor, scales: Tensor) -> Tensor:
        """The codes nearest to weights, as int8, for scales that broadcast."""
        least, most = (-127, 127) if self.name == "int8" else (-8, 7)
        divisor = scales.to(weights.dtype).where(scales != 0, 1.0)
        return (weights / divisor).round().clamp(least, most).to(torch.int8)

    def packed(self, codes: Tensor) -> Tensor:
        """Codes ``[..., K]`` as they are held."""
        return codes if self.name == "int8" else _packed(codes)

    def decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers ``[..., K]`` that codes and scales stand for."""
        scale = scales.view(torch.bfloat16).float()[..., None]
        depth = scales.shape[-1] * self.group_size
        plain = codes if self.name == "int8" else _unpacked(codes)[..., :depth]
        return (plain.unflatten(-1, (-1, self.group_size)) * scale).flatten(-2).to(dtype)


def _packed(codes: Tensor) -> Tensor:
    """Codes of 4 bits ``[..., K]`` plus 8 as bytes, the first of two in the lower half; rows of whole blocks of 128."""
    pairs = (F.pad(codes, (0, -codes.shape[-1] % kernel.BLOCK)) + 8).to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def _unpacked(codes: Tensor) -> Tensor:
    return torch.stack([codes & 15, codes >> 4], -1).flatten(-2).to(torch.int8) - 8


class QuantizedWeight(nn.Module):
    """Codes and scales of a tensor ``[..., N, K]``, as buffers that no conversion of dtypes changes.

    Attributes:
        codes: int8 ``[..., N, K]``, or uint8 of 4 bits.
        scales: int16 ``[..., N, K / group_size]``, the bits of numbers in bfloat16.
        like: nothing, in the dtype that the module computes in.
    """

    codes: Tensor
    scales: Tensor
    like: Tensor

    def __init__(self, codes: Tensor, scales: Tensor, form: WeightFormat, dtype: torch.dtype):
        super().__init__()
        self.form = form
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=codes.device), persistent=False)

    @classmethod
    def of(cls, weight: Tensor, form: WeightFormat, *others: Any) -> Self:
        """Of a tensor; of one without numbers, on the meta device, without numbers too."""
        return cls(*form.encode(weight), form, weight.dtype, *others)

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """The rounded weights ``[..., N, K]``."""
        return self.form.decode(self.codes, self.scales, dtype or self.like.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights."""
        return *self.scales.shape[:-1], self.scales.shape[-1] * self.form.group_size

    @property
    def weights(self) -> int:
        """How many there are."""
        return self.scales.numel() * self.form.group_size

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.form.name}, group_size={self.form.group_size}"

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if self.like.is_meta and not self.codes.is_meta:  # assigned: what is in no state dict comes along
            self.like = torch.empty_like(self.like, device=self.codes.device)


class QuantizedLinear(QuantizedWeight):
    """``nn.Linear`` with quantised weights; its bias is as it was."""

    def __init__(
        self, codes: Tensor, scales: Tensor, form: WeightFormat, dtype: torch.dtype, bias: nn.Parameter | None = None
    ):
        super().__init__(codes, scales, form, dtype)
        self.bias = bias

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def out_features(self) -> int:
        return self.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        if kernel.serves(x, self.bias):
            return kernel.quantized_linear(x, self.codes, self.scales, self.bias)
        return product(x, self.dequantized(x.dtype), self.bias)


class QuantizedEmbedding(QuantizedWeight):
    """``nn.Embedding`` with quantised rows."""

    def forward(self, tokens: Tensor) -> Tensor:
        codes, scales = (F.embedding(tokens, each) for each in (self.codes, self.scales))
        return self.form.decode(codes, scales, self.like.dtype)


class QuantizedMatrices(QuantizedWeight):
    """Matrices ``[E, K, N]`` of experts, whose products are ``x W``: codes and scales are of ``[E, N, K]``."""

    @classmethod
    def of(cls, weight: Tensor, form: WeightFormat, *others: Any) -> Self:
        return super().of(weight.mT, form, *others)

    def matrices(self) -> Tensor:
        """``[E, K, N]``."""
        return self.dequantized().mT
