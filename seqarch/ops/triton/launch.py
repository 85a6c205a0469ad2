"""Launches Triton kernels: on the device of their tensors, in the configuration that was chosen for them."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqarch.ops.triton import autotune, availability, softmax
from seqarch.ops.triton.autotune import Choices, Configuration

TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

PIPELINED, PLAIN = (2, 1, 3), (1, 2)
"""How deep loops over memory are pipelined: what kernels choose from, the first without timing."""

WARM_UP_MS, TIMED_MS = 5, 25


@dataclass(frozen=True)
class Tuned:
    """A kernel and the configurations that it is tried in; the first is taken where none is timed.

    A kernel that adds to what it finds in memory must not be one: to be timed it runs many times.
    """

    kernel: Any
    configurations: tuple[Configuration, ...]

    def configuration(self, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Configuration:
        """The configuration to run in: the only one, the kept choice, or one made now; see
        :mod:`seqarch.ops.triton.autotune`."""
        first = self.configurations[0]
        if len(self.configurations) == 1 or availability.interpreting() or not autotune.enabled():
            return first
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        if programs < properties.multi_processor_count or torch.cuda.is_current_stream_capturing():
            return first

        def time(configuration: Configuration) -> float | None:
            return milliseconds(self.kernel, programs, arguments, constants | options(configuration))

        choices = _choices(f"{properties.name} {properties.major}.{properties.minor}")
        return choices.configuration(self.form(arguments, constants), self.configurations, time)

    def form(self, arguments: tuple[Any, ...], constants: dict[str, Any]) -> str:
        """The key of a choice: dtypes and constants, never sizes, with the source and Triton's version."""
        types = [str(argument.dtype).removeprefix("torch.") for argument in arguments if isinstance(argument, Tensor)]
        flags = [f"{name}={getattr(value, 'name', value)}" for name, value in sorted(constants.items())]
        source = f"source {self.kernel.cache_key[:8]}, Triton {triton.__version__}"
        return f"{self.kernel.__name__}({', '.join([*dict.fromkeys(types), *flags])}), {source}"


_choices = functools.cache(Choices)


@functools.cache
def tuned(kernel: Any, warps: int = 4, depths: tuple[int, ...] = PIPELINED) -> Tuned:
    """A kernel tried in several depths of its pipelines."""
    return Tuned(kernel, tuple(Configuration(warps, depth) for depth in depths))


def options(configuration: Configuration) -> dict[str, int]:
    """A configuration as keyword arguments of a launch."""
    return configuration.tiles | {"num_warps": configuration.warps, "num_stages": configuration.stages}


def milliseconds(kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> float | None:
    """The median time of a launch; ``None`` for one that needs more than the device has."""
    run = functools.partial(kernel[(programs,)], *arguments, enable_fp_fusion=True, **constants)
    try:
        return cast(float, triton.testing.do_bench(run, warmup=WARM_UP_MS, rep=TIMED_MS, return_mode="median"))
    except triton.runtime.errors.OutOfResources:
        return None


WARPGROUP_SWITCH = "DISABLE_MMA_V3"
"""Triton's environment variable, read as it compiles and part of its cache's key."""


@contextmanager
def multiplying(constants: dict[str, Any]) -> Iterator[None]:
    """Within it, kernels with these constants are compiled: products of float32 matrices without Hopper's instructions
    for groups of warps.

    ptxas 12.8, which Triton 3.6 and with it torch 2.11 bring, addresses the operands of many such products in one
    kernel by registers that hold something else, which ended the delta rule's backward pass in float32 with an illegal
    access to memory on an H200 (docs/log.md). Products of 16-bit matrices need a third as many or fewer.
    """
    exact = constants.get("PRECISION") == "tf32x3" or constants.get("WORK") is tl.float32
    if not exact or WARPGROUP_SWITCH in os.environ:
        yield
        return
    os.environ[WARPGROUP_SWITCH] = "1"
    try:
        yield
    finally:
        del os.environ[WARPGROUP_SWITCH]


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel, or a :class:`Tuned` one; nothing for no programs, which CUDA takes for an error."""
    tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
    with torch.cuda.device_of(tensor), multiplying(constants):
        if programs and isinstance(kernel, Tuned):
            constants |= options(kernel.configuration(programs, arguments, constants))
            kernel = kernel.kernel
        if programs:
            kernel[(programs,)](*arguments, enable_fp_fusion=True, **constants)


def combine(
    parts: Tensor, log_sums: Tensor, entries: Tensor | None, out: Tensor, log_sum: Tensor, count: int, shared: int,
    scale: float = 1.0, weighted: bool = True,
) -> None:  # fmt: skip
    """Add up ``count`` parts of each row into ``out [B, Tq, H, D]``, as :func:`softmax.combine` says."""
    heads, width = out.shape[2:]
    launch(
        softmax.combine, out.shape[:3].numel(),
        parts, log_sums, log_sum if entries is None else entries, out, log_sum, count, shared, heads, scale,
        out.stride(1), out.stride(2), D=width, BLOCK=block(width, 256), PARTS=16, WEIGHTED=weighted,
        LISTED=entries is not None, ACC=TYPES[log_sum.dtype], num_warps=4,
    )  # fmt: skip


def persistent(most: int, device: torch.device) -> int:
    """How many programs share out pieces of work, ``most`` or as many as a device runs at a time."""
    if device.type != "cuda":
        return min(most, 8)
    return min(most, 8 * torch.cuda.get_device_properties(device).multi_processor_count)


def block(width: int, most: int) -> int:
    """The tile for a dimension: a power of two from 16 to ``most``."""
    return min(most, max(16, triton.next_power_of_2(width)))


def rows(x: Tensor) -> Tensor:
    """``[B, T, ...]`` as ``[B T, ...]`` with its last dimensions side by side; copied only where that is not so."""
    flat = x.reshape(x.shape[0] * x.shape[1], math.prod(x.shape[2:]))
    return flat if flat.stride(1) == 1 else flat.contiguous()


def heads_of(x: Tensor, tokens: int = 128) -> Tensor:
    """``[B, T, H, D]`` as kernels of attention take it, in tiles of so many tokens at most.

    Copied only where numbers of a head do not lie side by side, or tokens so far apart that offsets inside a tile would
    not fit into 32 bits.
    """
    return x if x.stride(3) == 1 and x.stride(1) * tokens < 2**31 else x.contiguous()


def strides(packed: bool, *inputs: Tensor) -> tuple[int, ...]:
    """How far rows of the batch (0 where sequences share one), tokens and heads of each ``[B, T, H, D]`` are apart."""
    return tuple(stride for x in inputs for stride in (0 if packed else x.stride(0), x.stride(1), x.stride(2)))


def products(dtype: torch.dtype) -> dict[str, Any]:
    """The constants of attention's kernels that depend on the dtype of their inputs."""
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    # Triton's interpreter takes the bits of bfloat16 matrices for integers.
    work = sums if availability.interpreting() else dtype
    return {"ACC": TYPES[sums], "WORK": TYPES[work], "PRECISION": precision(exact=dtype.itemsize > 2)}


def precision(exact: bool) -> str:
    """How float32 matrices are multiplied: by one TF32 product, or by three where torch is asked to be exact."""
    return "tf32x3" if exact and torch.get_float32_matmul_precision() == "highest" else "tf32"
