"""What one would use on a GPU without this library: torch's fused attention, and packages that may be installed.

Each is given the contest's inputs in its own layout, made before it is timed, and is imported no sooner than then.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.bench.contest import Absent, Call, Contestant, Inputs

HALF = (torch.bfloat16, torch.float16)


def _function(module: str, name: str) -> Callable[..., Any]:
    """A package's function.

    Raises:
        Absent: the package is not installed, cannot be loaded or has no such function.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Absent(f"{module}.{name}: {reason}") from error


def _sdpa(kind: SDPBackend) -> Contestant:
    """torch's attention over all keys by one of its kernels, heads first as it takes them."""

    def enter(inputs: Inputs) -> tuple[Call, Inputs]:
        if inputs["q"].dtype not in HALF:
            raise Absent(f"torch's fused attention takes no {inputs['q'].dtype}")
        q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
        causal = q.shape[2] > 1

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

        return call, {"q": q, "k": k, "v": v}

    return Contestant(enter)


def _flash(inputs: Inputs) -> tuple[Call, Inputs]:
    attend = _function("flash_attn", "flash_attn_func")
    if inputs["q"].dtype not in HALF:
        raise Absent(f"flash_attn takes no {inputs['q'].dtype}")
    window = (inputs["window"] - 1, 0) if "window" in inputs else (-1, -1)
    call = lambda q, k, v: attend(q, k, v, causal=True, window_size=window)  # noqa: E731
    return call, {name: inputs[name] for name in "qkv"}


def _fla(module: str, name: str, **names: str) -> Contestant:
    """A function of flash-linear-attention: its arguments from the contest's by their names there."""

    def enter(inputs: Inputs) -> tuple[Call, Inputs]:
        function = _function(f"fla.ops.{module}", name)
        own = {theirs: inputs[ours] for theirs, ours in names.items() if ours in inputs}
        return lambda **given: function(**given)[0], own

    return Contestant(enter)


def _step_of(chunk: Contestant, step: Contestant) -> Contestant:
    """The one for many tokens, and the other for one."""

    def enter(inputs: Inputs) -> tuple[Call, Inputs]:
        return (step if inputs["q"].shape[1] == 1 else chunk).enter(inputs)

    return Contestant(enter)


def _ssd(inputs: Inputs) -> tuple[Call, Inputs]:
    """Mamba-2's scan: a decay ``exp(dt A)`` with A = -1, and inputs that the step size does not scale again."""
    scan = _function("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    if inputs["q"].shape[1] == 1:
        raise Absent("mamba_chunk_scan_combined is for many tokens")
    dt = -inputs["log_decay"]
    A = -torch.ones(dt.shape[2], device=dt.device)
    x = inputs["v"] / dt.unsqueeze(-1).to(inputs["v"].dtype)
    call = lambda x, dt, B, C: scan(x, dt, A, B, C, chunk_size=256)  # noqa: E731
    return call, {"x": x, "dt": dt, "B": inputs["k"], "C": inputs["q"] * inputs["q"].shape[-1] ** -0.5}


def _scan(inputs: Inputs) -> tuple[Call, Inputs]:
    """Channels before time, as it takes them."""
    scan = _function("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    across = {ours: inputs[ours].transpose(1, 2).contiguous() for ours in ("x", "dt", "B", "C")}
    call = lambda x, dt, B, C, A: scan(x, dt, A, B, C).transpose(1, 2)  # noqa: E731
    return call, across | {"A": inputs["A"]}


def _conv(inputs: Inputs) -> tuple[Call, Inputs]:
    convolve = _function("causal_conv1d", "causal_conv1d_fn")
    own = {"x": inputs["x"].transpose(1, 2), "weight": inputs["weight"], "bias": inputs["bias"]}
    return lambda x, weight, bias: convolve(x, weight, bias, activation="silu").transpose(1, 2), own


HEADS = {"q": "q", "k": "k", "v": "v"}
STATE = {"initial_state": "state"}
SOFTMAX = {
    "SDPA, flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA, cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash_attn": Contestant(_flash),
}
FLASH = {"SDPA, flash": SOFTMAX["SDPA, flash"]}
RETENTION = {"fla, retention": _fla("retention", "chunk_retention", **HEADS), **FLASH}
HEAD_DECAY = {
    "fla, simple_gla": _step_of(
        _fla("simple_gla", "chunk_simple_gla", **HEADS, g="log_decay"),
        _fla("simple_gla", "fused_recurrent_simple_gla", **HEADS, g="log_decay", **STATE),
    ),
    "mamba_ssm, SSD": Contestant(_ssd),
    **FLASH,
}
KEY_DECAY = {"fla, gla": _fla("gla", "chunk_gla", **HEADS, g="log_decay"), **FLASH}
DELTA_RULE = {
    "fla, gated_delta_rule": _step_of(
        _fla("gated_delta_rule", "chunk_gated_delta_rule", **HEADS, g="log_decay", beta="beta"),
        _fla("gated_delta_rule", "fused_recurrent_gated_delta_rule", **HEADS, g="log_decay", beta="beta", **STATE),
    ),
    **FLASH,
}
DELTA_RULE_PER_KEY = {"fla, kda": _fla("kda", "chunk_kda", **HEADS, g="log_decay", beta="beta"), **FLASH}
SCAN = {"mamba_ssm, scan": Contestant(_scan)}
CONV = {"causal_conv1d": Contestant(_conv)}
