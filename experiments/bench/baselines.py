"""The alternatives to this library: torch's own attention, published loops, other packages.

Each is given the benchmark's inputs in its own layout, made before it is timed. Packages are imported no sooner than
then; one that is not installed is absent.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.bench.benchmark import Absent, Call, Implementation, Inputs


def _taking(call: Call, names: str, forward_only: bool = False) -> Implementation:
    """A function of some of the benchmark's inputs, by the names that these have there."""

    def bind(inputs: Inputs) -> tuple[Call, Inputs]:
        return call, {name: inputs[name] for name in names.split()}

    return Implementation(bind, forward_only)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (m.transpose(1, 2) for m in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _padded_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    channels, width = weight.shape
    y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=width - 1, groups=channels)
    return F.silu(y[..., : x.shape[1]]).transpose(1, 2)


def _sums_between(x: Tensor) -> Tensor:
    """``[..., C, C]``: the sum of ``x[j + 1 .. i]`` for ``i >= j``, else -inf."""
    size = x.shape[-1]
    below, upto = (torch.ones(size, size, dtype=torch.bool).tril(diagonal) for diagonal in (-1, 0))
    sums = x.unsqueeze(-1).expand(*x.shape, size).masked_fill(~below, 0).cumsum(-2)
    return sums.masked_fill(~upto, -torch.inf)


def _minimal_ssd(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, chunk: int = 64) -> Tensor:
    """Dao and Gu 2024, "Transformers are SSMs", listing 1: chunks, and a product over all of them for the states."""
    C, B, X, A = (m.unflatten(1, (-1, chunk)) for m in (q * q.shape[-1] ** -0.5, k, v, log_decay.to(v.dtype)))
    A = A.permute(0, 3, 1, 2)
    sums = A.cumsum(-1)
    inside = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, _sums_between(A).exp(), X)
    to_end = (sums[..., -1:] - sums).exp()
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, to_end, X)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    between = _sums_between(F.pad(sums[..., -1], (1, 0))).exp()
    states = torch.einsum("bhzc,bchpn->bzhpn", between, states)[:, :-1]
    return (inside + torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states, sums.exp())).flatten(1, 2)


def _step_loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Gu and Dao 2023, "Mamba": as in the release's ``selective_scan_ref``, all steps discretised before the loop."""
    decay = torch.exp(torch.einsum("btd,dn->bdtn", dt, A))
    written = torch.einsum("btd,btn,btd->bdtn", dt, B, x)
    state, outputs = torch.zeros_like(written[:, :, 0]), []
    for t in range(x.shape[1]):
        state = decay[:, :, t] * state + written[:, :, t]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, t]))
    return torch.stack(outputs, dim=1)


def _mambapy(inputs: Inputs) -> tuple[Call, Inputs]:
    """Its scan alone, on steps that are discretised already: ``[B, T, D, N]``."""
    from mambapy.pscan import pscan

    decay = torch.exp(inputs["dt"].unsqueeze(-1) * inputs["A"])
    written = (inputs["dt"] * inputs["x"]).unsqueeze(-1) * inputs["B"].unsqueeze(-2)
    return lambda decay, written: pscan(decay, written), {"decay": decay, "written": written}


def _transformers_delta_rule(inputs: Inputs) -> tuple[Call, Inputs]:
    from transformers.models.qwen3_next import modeling_qwen3_next

    # Unwrapped, as what it is wrapped in prefers the GPU kernels of another package wherever that is installed.
    rule = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)
    names = {"query": "q", "key": "k", "value": "v", "g": "log_decay", "beta": "beta"}
    return lambda **own: rule(**own)[0], {name: inputs[ours] for name, ours in names.items()}


def _dense_mlp(x: Tensor, w_in: Tensor, w_gate: Tensor, w_out: Tensor) -> Tensor:
    """As many hidden units for every token as its experts have together."""
    return (F.silu(x @ w_gate) * (x @ w_in)) @ w_out


def _dense(inputs: Inputs) -> tuple[Call, Inputs]:
    chosen = inputs["expert_index"].shape[-1]
    wide = {name: inputs[name][:chosen].transpose(0, 1).flatten(1) for name in ("w_in", "w_gate")}
    return _dense_mlp, {"x": inputs["x"], **wide, "w_out": inputs["w_out"][:chosen].flatten(0, 1)}


def _flex_mask(length: int, window: int, block: int = 128) -> Any:
    """The causal window as FlexAttention's blocks, made without a table of all pairs."""
    from torch.nn.attention.flex_attention import BlockMask

    index = torch.arange(-(-length // block))
    apart = (index[:, None] - index) * block
    seen = (apart >= 0) & (apart - block + 1 < window)
    whole = (apart > 0) & (apart + block - 1 < window)

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.int().argsort(stable=True, dim=-1, descending=True)
        return blocks.sum(-1).int()[None, None], order.int()[None, None]

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key < window)

    lists = (*listed(seen & ~whole), *listed(whole))
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=block, mask_mod=visible, seq_lengths=(length, length))


def _flex(inputs: Inputs) -> tuple[Call, Inputs]:
    """Compiled before it is timed, once per length; torch has no backward pass of it on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise Absent("torch.compile finds no C++ compiler")
    length = inputs["q"].shape[1]
    mask = _flex_mask(length, inputs.get("window") or length)
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (m.transpose(1, 2) for m in (q, k, v))
        return compiled(q, k, v, block_mask=mask).transpose(1, 2)

    own = {name: inputs[name] for name in ("q", "k", "v")}
    with torch.no_grad():
        call(**own)
    return call, own


def without_gpu_kernels(bind: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse where ``transformers`` would pick kernels that do not run on a CPU, which happens as it is imported."""

    def guarded(*arguments: Any) -> Any:
        for package in ("fla", "mamba_ssm", "causal_conv1d"):
            if importlib.util.find_spec(package):
                raise Absent(f"transformers picks the GPU kernels of {package}, which is installed, on a CPU too")
        return bind(*arguments)

    return guarded


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


def _fused_sdpa(kind: SDPBackend) -> Implementation:
    """torch's attention over all keys by one of its kernels, heads first as it takes them."""

    def bind(inputs: Inputs) -> tuple[Call, Inputs]:
        if inputs["q"].dtype not in HALF:
            raise Absent(f"torch's fused attention takes no {inputs['q'].dtype}")
        q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
        causal = q.shape[2] > 1

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

        return call, {"q": q, "k": k, "v": v}

    return Implementation(bind)


def _flash_attn(inputs: Inputs) -> tuple[Call, Inputs]:
    attend = _function("flash_attn", "flash_attn_func")
    if inputs["q"].dtype not in HALF:
        raise Absent(f"flash_attn takes no {inputs['q'].dtype}")
    window = (inputs["window"] - 1, 0) if "window" in inputs else (-1, -1)
    call = lambda q, k, v: attend(q, k, v, causal=True, window_size=window)  # noqa: E731
    return call, {name: inputs[name] for name in "qkv"}


def _fla(module: str, name: str, *options: str) -> Implementation:
    """A function of flash-linear-attention, which takes q, k, v and those of its other arguments that there are."""
    names = {"q": "q", "k": "k", "v": "v"} | {theirs: FLA_NAMES[theirs] for theirs in options}

    def bind(inputs: Inputs) -> tuple[Call, Inputs]:
        function = _function(f"fla.ops.{module}", name)
        own = {theirs: inputs[ours] for theirs, ours in names.items() if ours in inputs}
        return lambda **given: function(**given)[0], own

    return Implementation(bind)


FLA_NAMES = {"g": "log_decay", "beta": "beta", "initial_state": "state"}


def _fla_with_step(module: str, *options: str) -> Implementation:
    """Its kernel in chunks for many tokens, and its recurrent one, which takes a state, for a single token."""
    chunk = _fla(module, f"chunk_{module}", *options)
    step = _fla(module, f"fused_recurrent_{module}", *options, "initial_state")

    def bind(inputs: Inputs) -> tuple[Call, Inputs]:
        return (step if inputs["q"].shape[1] == 1 else chunk).bind(inputs)

    return Implementation(bind)


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


def _mamba_ssm_scan(inputs: Inputs) -> tuple[Call, Inputs]:
    """Channels before time, as it takes them."""
    scan = _function("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    across = {ours: inputs[ours].transpose(1, 2).contiguous() for ours in ("x", "dt", "B", "C")}
    call = lambda x, dt, B, C, A: scan(x, dt, A, B, C).transpose(1, 2)  # noqa: E731
    return call, across | {"A": inputs["A"]}


def _causal_conv1d(inputs: Inputs) -> tuple[Call, Inputs]:
    convolve = _function("causal_conv1d", "causal_conv1d_fn")
    own = {"x": inputs["x"].transpose(1, 2), "weight": inputs["weight"], "bias": inputs["bias"]}
    return lambda x, weight, bias: convolve(x, weight, bias, activation="silu").transpose(1, 2), own


# By operation and kind of device; ratios are to the first that is installed.
SDPA = {"SDPA": _taking(_sdpa, "q k v")}
FLEX = {"FlexAttention": Implementation(_flex, forward_only=True)}
FLASH = {"SDPA, flash": _fused_sdpa(SDPBackend.FLASH_ATTENTION)}
FUSED = {**FLASH, "SDPA, cuDNN": _fused_sdpa(SDPBackend.CUDNN_ATTENTION), "flash_attn": Implementation(_flash_attn)}

HEAD_DECAY = {
    "cpu": {"minimal SSD": _taking(_minimal_ssd, "q k v log_decay"), **SDPA},
    "cuda": {"fla, simple_gla": _fla_with_step("simple_gla", "g"), "mamba_ssm, SSD": Implementation(_ssd), **FLASH},
}
KEY_DECAY = {"cpu": SDPA, "cuda": {"fla, gla": _fla("gla", "chunk_gla", "g"), **FLASH}}
RETENTION = {"cuda": {"fla, retention": _fla("retention", "chunk_retention"), **FLASH}}
DELTA_RULE = {
    "cpu": {"transformers": Implementation(_transformers_delta_rule), **SDPA},
    "cuda": {"fla, gated_delta_rule": _fla_with_step("gated_delta_rule", "g", "beta"), **FLASH},
}
DELTA_RULE_PER_KEY = {"cpu": SDPA, "cuda": {"fla, kda": _fla("kda", "chunk_kda", "g", "beta"), **FLASH}}
SCAN = {
    "cpu": {
        "mambapy": Implementation(_mambapy),
        # Its backward pass fills a tensor of all steps for every step.
        "step loop": _taking(_step_loop, "x dt A B C", forward_only=True),
    },
    "cuda": {"mamba_ssm, scan": Implementation(_mamba_ssm_scan)},
}
ATTENTION = {"cpu": {**SDPA, **FLEX}, "cuda": FUSED}
BLOCK_SPARSE = {"cpu": SDPA, "cuda": FUSED}
CONVOLUTION = {
    "cpu": {"torch conv1d": _taking(_padded_conv1d, "x weight bias")},
    "cuda": {"causal_conv1d": Implementation(_causal_conv1d)},
}
EXPERTS = {"cpu": {"dense MLP": Implementation(_dense)}, "cuda": {}}
