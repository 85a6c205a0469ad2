"""Norms, gated units and rotary positions by compiled CPU kernels, each in one pass over memory and one in the backward
pass, where torch makes up to six and twelve.

In a small model these take as long as the products of matrices between them (docs/log.md). A kernel serves float32 and
float64 on a CPU, where torch runs calls just as they are made; callers have torch's functions for all else.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqarch.ops.dispatch.eager import active_transform, are_fake, has_dispatch_mode, is_batched, is_eager
from seqarch.ops.native import cpu_library
from seqarch.ops.native.custom_op import by_torch
from seqarch.ops.native.huge_pages import like

LEAST_NUMBERS = 2**12
"""Of fewer, as of a decoded token, torch's functions are done before the kernel is called."""

_ACTIVATIONS = {None: 0, "silu": 1, "sigmoid": 3}
"""The header's numbers."""

_norm = cpu_library.Kernel("rms_norm_forward", "rms_norm_inputs", "rms_norm_outputs")
_norm_backward = cpu_library.Kernel("rms_norm_backward", "rms_norm_inputs", "rms_norm_gradients")
_swiglu = cpu_library.Kernel("swiglu_forward", "swiglu_arguments")
_swiglu_backward = cpu_library.Kernel("swiglu_backward", "swiglu_gradients")
_rotary = cpu_library.Kernel("rotary", "rotary_arguments")


def serves(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a kernel takes these tensors: many numbers, all float32 or float64, on a CPU, nobody looking on.

    Tensors without memory count as those they stand for: a dry run keeps for the backward pass what a run keeps.
    """
    return (
        is_eager(x.device)
        and x.numel() >= LEAST_NUMBERS
        and x.dtype in (torch.float32, torch.float64)
        and all(each is None or _is_plain(each, x.dtype) for each in (x, *others))
        and (not has_dispatch_mode() or are_fake(x, *others))
        and cpu_library.unavailable() is None
    )


def _is_plain(x: Tensor, dtype: torch.dtype) -> bool:
    known = type(x) in (Tensor, nn.Parameter) or are_fake(x)
    return known and x.dtype is dtype and x.is_cpu and x.layout is torch.strided


def _run(kernel: cpu_library.Kernel, *arguments: dict[str, Any]) -> None:
    """Call a kernel, unless its tensors have no memory: then their shapes are all there is to know."""
    if not any(are_fake(each) for each in arguments[0].values() if isinstance(each, Tensor)):
        kernel(*arguments)


def _needs_torch(dy: Tensor) -> bool:
    """Whether a backward pass is differentiated again, transformed or batched: torch's functions go through that."""
    return torch.is_grad_enabled() or active_transform() is not None or is_batched(dy)


class Norm(NamedTuple):
    """What an RMS norm does beside dividing by the root of the mean square.

    Attributes:
        eps: added to the mean square.
        activation: of the gate; ``None`` without one.
        gate_first: whether the gate comes before the norm.
        groups: the last axis is normed in so many equal parts.
        factor: multiplies the result.
    """

    eps: float
    activation: Literal["silu", "sigmoid"] | None = None
    gate_first: bool = False
    groups: int = 1
    factor: float = 1.0


def rms_norm(x: Tensor, weight: Tensor | None, norm: Norm, z: Tensor | None = None) -> Tensor:
    """An RMS norm over the last axis, where :func:`serves` says so of these tensors.

    Args:
        x: ``[..., D]``.
        weight: ``[D]``, or ``None`` for ones.
        z: the gate before its activation, like x; ``None`` where ``norm`` has no gate.
    """
    return _RmsNorm.apply(x, z, weight, norm)  # type: ignore[return-value]


def _by_head(x: Tensor, groups: int) -> Tensor:
    """``[..., D]`` as the kernels take it: ``[batch, time, heads, width]``, numbers of the last side by side."""
    if x.ndim < 3 or x.ndim > 4 or (x.ndim == 4 and groups > 1):
        x = x.reshape(1, -1, x.shape[-1])
    x = x.unflatten(-1, (groups, -1)) if x.ndim == 3 else x
    return cpu_library.rows(x)


def _norm_fields(x: Tensor, z: Tensor | None, weight: Tensor | None, norm: Norm) -> dict[str, Any]:
    x = _by_head(x, norm.groups)
    batch, length, heads, width = x.shape
    return {
        "dtype": cpu_library.DTYPES[x.dtype],
        "activation": _ACTIVATIONS[norm.activation],
        "gate_first": norm.gate_first,
        "x": x,
        "z": None if z is None else _by_head(z, norm.groups),
        "weight": None if weight is None else weight.contiguous(),
        "eps": norm.eps,
        "factor": norm.factor,
        "batch": batch,
        "length": length,
        "heads": heads,
        "width": width,
        "weights": norm.groups,
    }


def _norm_by_torch(x: Tensor, z: Tensor | None, weight: Tensor | None, norm: Norm) -> Tensor:
    gate = None if z is None else z.sigmoid() if norm.activation == "sigmoid" else F.silu(z)
    if gate is not None and norm.gate_first:
        x = x * gate
    parts = x.unflatten(-1, (norm.groups, -1))
    y = (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + norm.eps) * norm.factor).flatten(-2)
    y = y if weight is None else y * weight
    return y if gate is None or norm.gate_first else y * gate


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor | None, weight: Tensor | None, norm: Norm) -> Tensor:
        fields = _norm_fields(x, z, weight, norm)
        y, scale = like(x), x.new_empty(fields["x"].shape[:3])
        _run(_norm, fields, {"y": y, "scale": scale})
        ctx.save_for_backward(x, z, weight, scale)
        ctx.norm = norm
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x, z, weight, scale), norm = ctx.saved_tensors, ctx.norm
        if _needs_torch(dy):
            return by_torch(_norm_by_torch, (x, z, weight, norm), ctx.needs_input_grad, (dy,))
        dx, dz = like(x), None if z is None else like(z)
        dweight = None if weight is None else torch.empty_like(weight, memory_format=torch.contiguous_format)
        written = {"dx": dx, "dz": dz, "dweight": dweight}
        given = {"dy": _by_head(dy, norm.groups), "scale": scale}
        _run(_norm_backward, _norm_fields(x, z, weight, norm), {**given, **written})
        return dx, dz, dweight, None


def swiglu(x: Tensor) -> Tensor:
    """``silu(a) b`` of ``x [..., 2 F]``, a and b its halves, where :func:`serves` says so."""
    return _SwiGlu.apply(x)  # type: ignore[return-value]


def _swiglu_by_torch(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        y = like(x, (*x.shape[:-1], x.shape[-1] // 2))
        _run(_swiglu, {**_swiglu_fields(x), "y": y})
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor | None:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        if _needs_torch(dy):
            return by_torch(_swiglu_by_torch, (x,), ctx.needs_input_grad, (dy,))[0]
        dx = like(x)
        _run(_swiglu_backward, {**_swiglu_fields(x), "dy": dy.contiguous(), "dx": dx})
        return dx


def _swiglu_fields(x: Tensor) -> dict[str, Any]:
    width = x.shape[-1] // 2
    return {
        "dtype": cpu_library.DTYPES[x.dtype],
        "x": x.contiguous(),
        "rows": x.numel() // max(1, 2 * width),
        "width": width,
    }


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn ``x [B, T, H, K]`` as :func:`seqarch.layers.modules.rotary.rotate`, where :func:`serves` says so.

    Args:
        cosine, sine: ``[1 or B, T, K']`` with ``2 K'`` at most K, without gradients.
    """
    return _Rotary.apply(x, cosine.contiguous(), sine.contiguous())  # type: ignore[return-value]


def _turned(x: Tensor, cosine: Tensor, sine: Tensor, back: bool) -> Tensor:
    (batch, length, heads, width), y = x.shape, like(x)
    arguments = {
        "dtype": cpu_library.DTYPES[x.dtype],
        "back": back,
        "x": cpu_library.rows(x),
        "cosine": cosine,
        "sine": sine,
        "y": y,
        "table_stride": 0 if len(cosine) == 1 else length,
        "batch": batch,
        "length": length,
        "heads": heads,
        "width": width,
        "half": cosine.shape[-1],
    }
    _run(_rotary, arguments)
    return y


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turned(x, cosine, sine, back=False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        cosine, sine = ctx.saved_tensors
        if _needs_torch(dy):
            return rotate_by_torch(dy, cosine, -sine), None, None
        return _turned(dy, cosine, sine, back=True), None, None


def rotate_by_torch(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The same by torch's functions, whatever the tensors are."""
    half = cosine.shape[-1]
    cosine, sine = cosine.unsqueeze(-2), sine.unsqueeze(-2)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], dim=-1)
