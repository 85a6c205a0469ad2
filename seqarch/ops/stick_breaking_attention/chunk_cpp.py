"""The compiled CPU kernel (``csrc/cpu/stick_breaking_attention.cpp``): 64 queries over 64 keys at a time, from the last
key on until nothing is left of their sticks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.native import cpu_library
from seqarch.ops.native.custom_op import Operator, Upstream, empty_gradients
from seqarch.ops.native.huge_pages import in_huge_pages
from seqarch.ops.stick_breaking_attention import chunk_torch
from seqarch.ops.stick_breaking_attention.inputs import StickBreakingInputs

_forward = cpu_library.Kernel(
    "stick_breaking_attention_forward", "stick_breaking_attention_inputs", "stick_breaking_attention_outputs"
)
_backward = cpu_library.Kernel(
    "stick_breaking_attention_backward", "stick_breaking_attention_inputs", "stick_breaking_attention_gradients"
)

unavailable = cpu_library.unavailable


def unsupported(inputs: StickBreakingInputs) -> str | None:
    return None if inputs.device.type == "cpu" else f"q is on {inputs.device}, expected cpu"


def _fields(inputs: StickBreakingInputs) -> dict[str, Any]:
    """``seqarch_stick_breaking_attention_inputs``, copied where the last dimension is strided."""
    q, k, v, offsets = inputs.q, inputs.k, inputs.v, inputs.offsets
    return {
        "dtype": cpu_library.DTYPES[v.dtype],
        "q": cpu_library.rows(q),
        "k": cpu_library.rows(k),
        "v": cpu_library.rows(v),
        "scale": inputs.scale,
        "key_start": None if inputs.key_start is None else inputs.key_start.contiguous(),
        "offsets": offsets,
        "sequences": q.shape[0] if offsets is None else len(offsets) - 1,
        "queries": q.shape[1],
        "keys": k.shape[1],
        "groups": k.shape[2],
        "heads": q.shape[2],
        "key_width": q.shape[3],
        "value_width": v.shape[3],
    }


def _outputs(inputs: StickBreakingInputs) -> tuple[Tensor, Tensor]:
    q, v = inputs.q, inputs.v
    return in_huge_pages(v.new_empty(*q.shape[:3], v.shape[3])), v.new_empty(q.shape[:3], dtype=accumulation_dtype(v))


def forward(inputs: StickBreakingInputs) -> tuple[Tensor, Tensor]:
    """Of ``q, k, v`` in one dtype, and ``key_start`` in int64."""
    o, rest = _outputs(inputs)
    _forward(_fields(inputs), {"o": o, "rest": rest})
    return o, rest


def backward(inputs: StickBreakingInputs, upstream: Upstream) -> list[Tensor]:
    gradients, (do, drest) = empty_gradients(inputs), upstream.gradients
    above = {"dout": cpu_library.rows(do), "drest": drest.contiguous()}
    _backward(_fields(inputs), above | dict(zip(("dq", "dk", "dv"), gradients, strict=False)))
    return gradients


operator = Operator(
    "stick_breaking_attention",
    StickBreakingInputs,
    forward,
    backward,
    chunk_torch.run,
    _outputs,
    results=2,
    devices="cpu",
)


def run(inputs: StickBreakingInputs) -> tuple[Tensor, Tensor]:
    q, k, v, key_start = inputs.q, inputs.k, inputs.v, inputs.key_start
    dtype = cpu_library.common_dtype(q, k, v)
    start = None if key_start is None else key_start.long()
    o, rest = operator(inputs.replace(q=q.to(dtype), k=k.to(dtype), v=v.to(dtype), key_start=start))
    return o.to(v.dtype), rest
