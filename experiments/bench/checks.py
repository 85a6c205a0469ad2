"""Checks that what runs on the device is right, before anything is timed.

Every backend that runs there, on inputs of each dtype, against the reference in float64 on the CPU: values, the
gradients of all inputs, sequences packed and apart, and a sequence that is cut, its state handed on. Then the test
suites of the kernels, which run on the device where there is one.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.util.errors import RunnerError
from experiments.util.paths import ROOT
from seqarch import ops
from seqarch.ops import OPS

BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 0.02, torch.float16: 5e-3}
"""RMS of the difference over the RMS of the reference; the reference gets the same rounded numbers."""

OFFSETS = (0, 1, 70, 70, 200)
LENGTH, WIDTH, HEADS, CUT = OFFSETS[-1], 64, 4, 77
RECURRENT = ("causal_conv1d", "delta_rule", "linear_attention", "selective_scan")
"""Operations that hand on a state."""

SUITES = ("test_triton_*.py", "test_*_cuda*.py", "test_vendor*.py", "test_oracles.py")


@dataclass(frozen=True)
class Check:
    """One comparison: its name, its error and the bound on it."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # NaN never passes


def inputs_of(op: str) -> dict[str, Any]:
    """A call of each operation, in float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(1, LENGTH, *sizes, generator=generator, dtype=torch.float64)

    x = {"q": draw(2, WIDTH), "k": F.normalize(draw(2, WIDTH), dim=-1), "v": draw(HEADS, WIDTH)}
    if op in ("attention", "block_sparse_attention"):
        x |= {"q": draw(HEADS, WIDTH), "v": draw(2, WIDTH)}
    if op == "attention":
        return x | {"window": 90}
    if op == "block_sparse_attention":
        index = torch.randint(-1, 4, (1, LENGTH, 2, 3), generator=generator)
        return x | {"block_index": index, "block_size": 32, "window": 20}
    if op in ("linear_attention", "delta_rule"):
        rates = {"beta": draw(HEADS).sigmoid()} if op == "delta_rule" else {}
        return x | rates | {"log_decay": -draw(HEADS).exp()}
    if op == "compressed_attention":
        sizes = {"compressed_length": 1, "compressed_stride": 1, "block_size": 32, "selected_blocks": 4}
        return x | {"q": draw(HEADS, WIDTH), "v": draw(2, WIDTH)} | sizes
    if op == "index_topk":
        return {"q": draw(2, 16), "k": draw(16), "weight": draw(2), "top_k": 4}
    if op == "indexer_loss":
        index = torch.randint(-1, LENGTH, (1, LENGTH, 20), generator=generator)
        indexer = {"index_q": draw(2, 16), "index_k": draw(16), "weight": draw(2)}
        return indexer | {"q": draw(HEADS, WIDTH), "k": draw(2, WIDTH), "token_index": index}
    channels = draw(WIDTH)
    if op == "selective_scan":
        A = -torch.arange(1.0, 9.0, dtype=torch.float64).repeat(WIDTH, 1)
        return {"x": channels, "dt": 0.1 * draw(WIDTH).exp(), "A": A, "B": draw(8), "C": draw(8)}
    if op == "causal_conv1d":
        return {"x": channels, "weight": draw(4)[0, :WIDTH], "activation": "silu"}
    weights = {"w_in": draw(2 * WIDTH)[0, : 3 * 64].view(3, 64, -1), "w_out": draw(WIDTH).expand(3, -1, -1)[:, :128]}
    index = torch.randint(-1, 3, (1, LENGTH, 2), generator=generator)
    return {"x": channels, **weights, "expert_index": index, "expert_weight": draw(2).sigmoid()}


def rounded(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Decays and rates of change stay float32, as layers give them."""
    kept = ("log_decay", "A")
    narrow = {n: x.float() if n in kept else x.to(dtype) for n, x in inputs.items() if _is_float(x)}
    return inputs | narrow


def _is_float(x: Any) -> bool:
    return torch.is_tensor(x) and x.is_floating_point()


def gradients(op: str, backend: str, inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Outputs, and gradients of a weighted sum of the first: by what it depends on, and none of a choice."""
    leaves = {name: x.detach().requires_grad_() if _is_float(x) else x for name, x in inputs.items()}
    found = getattr(ops, op)(**leaves, **options, backend=backend)
    o = found[0] if isinstance(found, tuple) else found
    if not o.requires_grad:
        return {"output": o}
    weight = torch.linspace(-1, 1, o.numel(), dtype=torch.float64, device=o.device).view(o.shape)
    asked = {name: x for name, x in leaves.items() if _is_float(x)}
    grads = torch.autograd.grad((o * weight).sum(), [*asked.values()], allow_unused=True)
    found = {f"gradient of {name}": x for name, x in zip(asked, grads, strict=True) if x is not None}
    return {"output": o.detach(), **found}


def error(found: Tensor, expected: Tensor) -> float:
    difference = found.detach().cpu().double() - expected.detach().cpu().double()
    return float(difference.square().mean().sqrt() / expected.double().square().mean().sqrt().cpu())


def served(op: str, inputs: dict[str, Any], **options: Any) -> list[str]:
    """The backends that serve a call, but for the one that defines what is right."""
    prepared = OPS[op].inputs(**inputs, **options)
    names = [name for name in OPS[op].backends if name != OPS[op].reference]
    return [name for name in names if OPS[op].backends[name].unsupported(prepared) is None]


def compare(device: torch.device) -> Iterator[Check]:
    """Every operation on every backend that serves it on the device."""
    for op in OPS:
        exact = inputs_of(op)
        packs: list[dict[str, Any]] = [{}] if op == "experts" else [{}, {"cu_seqlens": OFFSETS}]
        for dtype, bound in BOUNDS.items():
            given = rounded(exact, dtype)
            wide = {name: x.double() if _is_float(x) else x for name, x in given.items()}
            there = {name: x.to(device) if torch.is_tensor(x) else x for name, x in given.items()}
            for options in packs:
                expected = gradients(op, OPS[op].reference, wide, **options)
                for backend in served(op, there, **options):
                    label = f"{op}, {backend}, {str(dtype)[6:]}{', packed' if options else ''}"
                    for name, x in gradients(op, backend, there, **options).items():
                        yield Check(f"{label}: {name}", error(x, expected[name]), bound)
            if op in RECURRENT:
                yield from cut(op, there, bound, str(dtype)[6:])


def cut(op: str, inputs: dict[str, Any], bound: float, label: str) -> Iterator[Check]:
    """Cut anywhere, with the state carried over the cut, a sequence has the same outputs and the same last state."""
    timed = [name for name, x in inputs.items() if torch.is_tensor(x) and x.shape[:2] == (1, LENGTH)]
    first = inputs | {name: inputs[name][:, :CUT] for name in timed}
    rest = inputs | {name: inputs[name][:, CUT:] for name in timed}
    for backend in served(op, inputs):
        whole, last = getattr(ops, op)(**inputs, backend=backend)
        start, state = getattr(ops, op)(**first, backend=backend)
        end, final = getattr(ops, op)(**rest, state=state, backend=backend)
        yield Check(f"{op}, {backend}, {label}, cut: output", error(torch.cat([start, end], 1), whole), bound)
        yield Check(f"{op}, {backend}, {label}, cut: last state", error(final, last), bound)


def suites(root: Path = ROOT) -> list[str]:
    """The tests that run their kernels on the device."""
    return sorted(str(path) for name in SUITES for path in (root / "tests" / "ops").rglob(name))


def run_suites() -> str | None:
    """The failure of the tests, ``None`` if they pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", "-p", "no:cacheprovider", *suites()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return None if done.returncode == 0 else done.stdout[-4000:] + done.stderr[-2000:]


def check(device: torch.device) -> dict[str, Any]:
    """Run all checks, and say so; the count of those that passed, and the worst of them against its bound.

    Raises:
        RunnerError: some fail; it names them.
    """
    found = list(compare(device))
    failed = [f"{one.name}: off by {one.error:.2g}, at most {one.bound:g} is right" for one in found if not one.passed]
    if failed:
        raise RunnerError("\n".join([*failed, f"{len(failed)} of {len(found)} checks failed: nothing was timed"]))
    print(f"{len(found)} checks against the references passed", flush=True)
    if (failures := run_suites()) is not None:
        raise RunnerError(f"{failures}\nthe tests of the kernels failed on the device: nothing was timed")
    print("the tests of the kernels passed on the device", flush=True)
    return {"passed": len(found), "worst": max(one.error / one.bound for one in found)}
