"""Time the backends of this machine against what one would use without them: ``python -m experiments.bench [OP ...]``.

All contestants of a contest run in turn, round after round, so that a machine whose speed drifts treats them alike.
Shown are medians with quartiles, and the ratio to the first contestant, taken round by round. The same numbers go to
``runs/bench/OP.json`` and ``.csv``, with the machine and the code that they are of.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from experiments.environment import code_version, hardware, software
from experiments.errors import RunnerError, writing
from seqarch.ops import OPS
from seqarch.ops.common.checks import unknown_name

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Contest:
    """One call of an operation, and what it is measured against.

    Attributes:
        title: the sizes, for people.
        inputs: makes the operation's arguments by keyword; float tensors among them get gradients.
        rivals: by name, functions of the same keyword arguments that return the same output; ratios are to the first.
    """

    title: str
    inputs: Callable[[], Inputs]
    rivals: dict[str, Callable[..., Tensor]]


@dataclass(frozen=True)
class Row:
    """One contestant in one direction: milliseconds over the rounds, and how many times faster than the first."""

    contestant: str
    direction: str
    median_ms: float
    quartile1_ms: float
    quartile3_ms: float
    times_faster: float


def _conv_inputs() -> Inputs:
    return {
        "x": torch.randn(4, 2048, 512),
        "weight": torch.randn(512, 4),
        "bias": torch.randn(512),
        "activation": "silu",
    }


def _padded_conv1d(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    channels, width = weight.shape
    y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=width - 1, groups=channels)
    return F.silu(y[..., : x.shape[1]]).transpose(1, 2)


def _matrix_inputs(length: int = 2048) -> Inputs:
    shape = 1, length, 8, 64
    q, k = (F.normalize(torch.randn(shape), dim=-1) for _ in range(2))
    return {"q": q, "k": k, "v": torch.randn(shape), "log_decay": -torch.rand(shape[:3])}


def _delta_inputs() -> Inputs:
    inputs = _matrix_inputs()
    return inputs | {"beta": torch.rand(inputs["v"].shape[:3])}


def _sums_between(x: Tensor) -> Tensor:
    """``[..., C, C]``: the sum of ``x[j + 1 .. i]`` for ``i >= j``, else -inf."""
    size = x.shape[-1]
    below, upto = (torch.ones(size, size, dtype=torch.bool).tril(diagonal) for diagonal in (-1, 0))
    sums = x.unsqueeze(-1).expand(*x.shape, size).masked_fill(~below, 0).cumsum(-2)
    return sums.masked_fill(~upto, -torch.inf)


def _minimal_ssd(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, chunk: int = 64) -> Tensor:
    """Dao and Gu 2024, "Transformers are SSMs", listing 1: chunks, and a product over all of them for the states."""
    C, B, X, A = (m.unflatten(1, (-1, chunk)) for m in (q * q.shape[-1] ** -0.5, k, v, log_decay))
    A = A.permute(0, 3, 1, 2)
    sums = A.cumsum(-1)
    inside = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, _sums_between(A).exp(), X)
    to_end = (sums[..., -1:] - sums).exp()
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, to_end, X)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    between = _sums_between(F.pad(sums[..., -1], (1, 0))).exp()
    states = torch.einsum("bhzc,bchpn->bzhpn", between, states)[:, :-1]
    return (inside + torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states, sums.exp())).flatten(1, 2)


def _transformers_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule(q, k, v, log_decay, beta)[0]


CONTESTS = {
    "causal_conv1d": Contest("x [4, 2048, 512] float32, W = 4", _conv_inputs, {"torch conv1d": _padded_conv1d}),
    "linear_attention": Contest(
        "v [1, 2048, 8, 64] float32, one decay a head and step", _matrix_inputs, {"minimal SSD": _minimal_ssd}
    ),
    "delta_rule": Contest(
        "v [1, 2048, 8, 64] float32, one decay a head and step",
        _delta_inputs,
        {"transformers": _transformers_delta_rule},
    ),
}


def contestants(op: str, contest: Contest) -> dict[str, Callable[..., Tensor]]:
    """The rivals, then every backend that serves this call here."""
    arguments = OPS[op].prepare(**contest.inputs())
    serving = [name for name, backend in OPS[op].backends.items() if backend.refuse(*arguments) is None]

    def ours(backend: str) -> Callable[..., Tensor]:
        def call(**inputs: Any) -> Tensor:
            output = OPS[op](backend, **inputs)
            return output[0] if isinstance(output, tuple) else output

        return call

    return contest.rivals | {name: ours(name) for name in serving}


def _forward(call: Callable[..., Tensor], inputs: Inputs, cotangent: Tensor) -> float:
    with torch.no_grad():
        start = time.perf_counter()
        call(**inputs)
        return time.perf_counter() - start


def _forward_backward(call: Callable[..., Tensor], inputs: Inputs, cotangent: Tensor) -> float:
    leaves = {
        name: value.detach().clone().requires_grad_() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    start = time.perf_counter()
    call(**leaves).backward(cotangent)
    return time.perf_counter() - start


DIRECTIONS = {"forward": _forward, "forward + backward": _forward_backward}


def measure(op: str, contest: Contest, rounds: int) -> list[Row]:
    """Time every contestant forward, and forward and backward, ``rounds`` times in turn after one round to warm up."""
    calls, inputs = contestants(op, contest), contest.inputs()
    cotangent = torch.randn_like(next(iter(calls.values()))(**inputs))
    rows = []
    for direction, run in DIRECTIONS.items():
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds + 1):
            for name, call in calls.items():
                times[name].append(1e3 * run(call, inputs, cotangent))
        baseline = next(iter(times.values()))
        rows += [summary(name, direction, values[1:], baseline[1:]) for name, values in times.items()]
    return rows


def summary(name: str, direction: str, values: Sequence[float], baseline: Sequence[float]) -> Row:
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    ratios = [other / own for other, own in zip(baseline, values, strict=True)]
    return Row(name, direction, median, first, third, statistics.median(ratios))


def table(title: str, rows: Sequence[Row]) -> Table:
    shown = Table(title=title, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column in ("contestant", "direction"):
        shown.add_column(column, no_wrap=True)
    for column in ("median, ms", "quartiles, ms", "speed-up"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        quartiles = f"{row.quartile1_ms:.2f} to {row.quartile3_ms:.2f}"
        shown.add_row(row.contestant, row.direction, f"{row.median_ms:.2f}", quartiles, f"{row.times_faster:.2f}")
    return shown


def save(folder: Path, op: str, record: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write ``OP.json`` with the whole record and ``OP.csv`` with the rows alone."""
    values = [asdict(row) for row in rows]
    with writing(folder):
        (folder / f"{op}.json").write_text(json.dumps(record | {"rows": values}, indent=2) + "\n")
        with (folder / f"{op}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(values[0]))
            writer.writeheader()
            writer.writerows(values)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(CONTESTS)}; default: all")
    parser.add_argument("--rounds", type=int, default=20, help="rounds that count, at least 2")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"))
    options = parser.parse_args(arguments)
    for op in options.ops:
        if op not in CONTESTS:
            parser.error(str(unknown_name("operation to time", op, CONTESTS)))
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}, expected at least 2")
    return options


def run(ops: Sequence[str], rounds: int, folder: Path) -> None:
    console, machine = Console(), hardware(torch.device("cpu"))
    with writing(folder):  # before the work, not after it
        folder.mkdir(parents=True, exist_ok=True)
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, torch {torch.__version__}"
    )
    for op in ops:
        torch.manual_seed(0)
        rows = measure(op, CONTESTS[op], rounds)
        console.print(table(f"{op}: {CONTESTS[op].title}", rows))
        record = {"op": op, "title": CONTESTS[op].title, "rounds": rounds, "hardware": machine}
        save(folder, op, record | {"software": software(), "code": code_version()[0]}, rows)
        console.print(f"written to {folder / op}.json and .csv")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        run(options.ops or list(CONTESTS), options.rounds, options.folder)
    except RunnerError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
