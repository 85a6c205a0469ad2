"""Checks that what runs on the device is right, before anything is timed.

Every backend that runs there, on inputs of each dtype, against the reference in float64 on the CPU: values, the
gradients of all inputs, sequences packed and apart, and a sequence that is cut, its state handed on. Then the test
suites of the kernels, which run on the device where there is one. Checks share out processes, as many as there are
cores; a kernel that fails can take the device from its process, so what fails is checked again in a process of its own.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.bench import mixer_checks
from experiments.bench.check import Check, failed, guarded
from experiments.bench.mixer_checks import CheckedMixer
from experiments.util.errors import RunnerError
from experiments.util.paths import ROOT
from seqarch import ops
from seqarch.ops import OPS

BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 0.02, torch.float16: 5e-3}
"""RMS of the difference over the RMS of the reference; the reference gets the same rounded numbers."""

OFFSETS = (0, 1, 70, 70, 200)
LENGTH, WIDTH, HEADS, CUT = OFFSETS[-1], 64, 4, 77
RECURRENT = ("causal_conv1d", "delta_rule", "gated_rnn", "linear_attention", "log_linear_attention", "selective_scan")
"""Operations that hand on a state."""

PROCESSES = 12
"""At most; each holds a context of the device."""

PLUGINS = {"xdist": "xdist", "pytest_timeout": "pytest_timeout"}
"""Of pytest, by module: those that the tests use where they are, and no others that the machine may have."""

SUITES = ("test_triton_*.py", "test_cuda_*.py", "test_vendor*.py", "test_oracles.py")


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
    if op == "path_attention":
        factors = {"w": F.normalize(draw(2, WIDTH), dim=-1), "beta": 2 * draw(2).sigmoid()}
        return x | {"q": draw(HEADS, WIDTH), "v": draw(2, WIDTH)} | factors
    if op == "stick_breaking_attention":
        return x | {"q": draw(HEADS, WIDTH), "v": draw(2, WIDTH)}
    if op in ("linear_attention", "delta_rule"):
        rates = {"beta": draw(HEADS).sigmoid()} if op == "delta_rule" else {}
        return x | rates | {"log_decay": -draw(HEADS).exp()}
    if op == "log_linear_attention":
        levels = draw(HEADS, 9).exp()
        return x | {"level_weight": levels, "beta": draw(HEADS).sigmoid(), "log_decay": -draw(HEADS).exp()}
    if op == "compressed_attention":
        sizes = {"compressed_length": 1, "compressed_stride": 1, "block_size": 32, "selected_blocks": 4}
        return x | {"q": draw(HEADS, WIDTH), "v": draw(2, WIDTH)} | sizes
    if op == "index_topk":
        return {"q": draw(2, 16), "k": draw(16), "weight": draw(2), "top_k": 4}
    if op == "indexer_loss":
        index = torch.randint(-1, LENGTH, (1, LENGTH, 20), generator=generator)
        indexer = {"index_q": draw(2, 16), "index_k": draw(16), "weight": draw(2)}
        return indexer | {"q": draw(HEADS, WIDTH), "k": draw(2, WIDTH), "token_index": index}
    if op == "gated_rnn":
        weight = 0.1 * draw(4, 16)[0, :32].view(2, 4, 16, 16)
        return {"x": draw(2, 4, 16), "weight": weight, "cell": "slstm"}
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
    kept = ("log_decay", "A", "level_weight")
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


@dataclass(frozen=True)
class Checked:
    """A backend of an operation on inputs of one dtype, on a device."""

    op: str
    backend: str
    dtype: torch.dtype
    device: torch.device

    @property
    def name(self) -> str:
        return f"{self.op}, {self.backend}, {str(self.dtype)[6:]}"

    def serves(self, inputs: dict[str, Any]) -> bool:
        return OPS[self.op].backends[self.backend].unsupported(OPS[self.op].inputs(**inputs)) is None

    def checks(self) -> Iterator[Check]:
        """Values and gradients, apart and packed, and a sequence that is cut; nothing where it does not serve them."""
        given, bound = rounded(inputs_of(self.op), self.dtype), BOUNDS[self.dtype]
        wide = {name: x.double() if _is_float(x) else x for name, x in given.items()}
        there = {name: x.to(self.device) if torch.is_tensor(x) else x for name, x in given.items()}
        packs: list[dict[str, Any]] = [{}] if self.op == "experts" else [{}, {"cu_seqlens": OFFSETS}]
        for packed in packs:
            if self.serves(there | packed):
                label = f"{self.name}{', packed' if packed else ''}"
                expected = gradients(self.op, OPS[self.op].reference, wide, **packed)
                for name, x in gradients(self.op, self.backend, there, **packed).items():
                    yield Check(f"{label}: {name}", error(x, expected[name]), bound)
        if self.op in RECURRENT and self.serves(there):
            yield from self.cut(there, bound)

    def cut(self, inputs: dict[str, Any], bound: float) -> Iterator[Check]:
        """Cut anywhere, with the state carried over the cut, a sequence has the same outputs and last state."""
        timed = [name for name, x in inputs.items() if torch.is_tensor(x) and x.shape[:2] == (1, LENGTH)]
        first = inputs | {name: inputs[name][:, :CUT] for name in timed}
        rest = inputs | {name: inputs[name][:, CUT:] for name in timed}
        run = getattr(ops, self.op)
        whole, last = run(**inputs, backend=self.backend)
        start, state = run(**first, backend=self.backend)
        where = {"before": CUT} if self.op == "log_linear_attention" else {}
        end, final = run(**rest, state=state, **where, backend=self.backend)
        yield Check(f"{self.name}, cut: output", error(torch.cat([start, end], 1), whole), bound)
        yield Check(f"{self.name}, cut: last state", error(final, last), bound)

    def run(self) -> list[Check]:
        return guarded(self.name, self.checks)


def checked(device: torch.device) -> list[Checked]:
    """Every backend that is here, but for those that define what is right, on inputs of every dtype."""
    return [
        Checked(op, name, dtype, device)
        for op in OPS
        for name, backend in OPS[op].backends.items()
        if name != OPS[op].reference and backend.unavailable() is None
        for dtype in BOUNDS
    ]


def compare(device: torch.device) -> Iterator[Check]:
    """Every operation on every backend that serves it on the device, and on a GPU every mixer."""
    everything: list[Checked | CheckedMixer] = [*checked(device)]
    if device.type == "cpu":
        for one in everything:
            yield from one.run()
        return
    everything += mixer_checks.checked(device)
    for one, found in zip(everything, in_processes(everything, min(PROCESSES, os.cpu_count() or 1)), strict=True):
        again = any(check.raised for check in found)
        yield from next(in_processes([one], 1)) if again else found


def in_processes(everything: Sequence[Checked | CheckedMixer], processes: int) -> Iterator[list[Check]]:
    """The checks of each, in so many processes. One that loses its device, or its life, fails what comes after it.

    The references take one thread each: as many as there are cores in every process wait for one another.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for one, waiting in [(one, pool.submit(one.run)) for one in everything]:
            try:
                yield waiting.result()
            except BrokenProcessPool as error:
                yield [failed(one.name, f"the process died: {error}")]


def suites(root: Path = ROOT) -> list[str]:
    """The tests that run their kernels on the device."""
    return sorted(str(path) for name in SUITES for path in (root / "tests" / "ops").rglob(name))


def run_suites() -> str | None:
    """The failure of the tests, ``None`` if they pass."""
    plugins = [name for name in PLUGINS if importlib.util.find_spec(name)]
    apart = ["-n", str(min(PROCESSES, os.cpu_count() or 1))] if "xdist" in plugins else []
    named = [text for name in plugins for text in ("-p", PLUGINS[name])]
    options = ["-q", "-m", "slow or not slow", "-p", "no:cacheprovider", *named, *apart]
    command = [sys.executable, "-m", "pytest", *options, *suites()]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    return None if done.returncode == 0 else done.stdout[-4000:] + done.stderr[-2000:]


def check(device: torch.device) -> dict[str, Any]:
    """Run all checks, and say so; the count of those that passed, and the worst of them against its bound.

    Raises:
        RunnerError: some fail; it names them.
    """
    found = list(compare(device))
    wrong = [str(one) for one in found if not one.passed]
    if wrong:
        raise RunnerError("\n".join([*wrong, f"{len(wrong)} of {len(found)} checks failed: nothing was timed"]))
    print(f"{len(found)} checks against the references passed", flush=True)
    if (failures := run_suites()) is not None:
        raise RunnerError(f"{failures}\nthe tests of the kernels failed on the device: nothing was timed")
    print("the tests of the kernels passed on the device", flush=True)
    return {"passed": len(found), "worst": max(one.error / one.bound for one in found)}
