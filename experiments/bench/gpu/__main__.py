"""Check the kernels on this machine's GPU, then time them against what one would use without them.

No speed is reported unless every check passes. Each contest is run over lengths at a constant number of tokens, its
contestants in turn, and written to the folder as ``CONTEST.json``: medians with quartiles, TFLOP/s, the share of the
nearer ceiling, as measured in the same run, and the peak of memory; with the device, its driver and the versions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.bench.gpu import checks
from experiments.bench.gpu.contests import DECODED, GPU_CONTESTS
from experiments.bench.gpu.device import Cuda, ceilings
from experiments.bench.gpu.measure import LENGTHS, TOKENS, GpuRecord, Measurement, lines
from experiments.bench.measure import prepare
from experiments.util.errors import RunnerError, choices_hint

NO_DEVICE = "this bench times a CUDA device, and torch sees none: run it where there is one, with torch's CUDA build"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    said = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.gpu", description=said)
    parser.add_argument("--contests", nargs="+", metavar="CONTEST", help=f"of {', '.join(GPU_CONTESTS)}; default: all")
    parser.add_argument("--widths", nargs="+", type=int, default=(64, 128), help="of heads; default: 64 128")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help=f"in tokens; default: {LENGTHS}")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of all sequences together; default: {TOKENS}")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--budget", type=float, default=0.2, help="seconds a contestant, way and length; default: 0.2")
    parser.add_argument("--folder", type=Path, default=Path("docs/results/gpu"))
    parser.add_argument("--only-checks", action="store_true", help="check the kernels and time nothing")
    options = parser.parse_args(arguments)
    for name in options.contests or ():
        if name not in GPU_CONTESTS:
            parser.error(f"unknown contest {name!r}: {choices_hint(name, GPU_CONTESTS)}")
    for option in ("widths", "lengths"):
        if min(getattr(options, option)) < 1:
            parser.error(f"--{option} is {getattr(options, option)}, expected numbers of at least 1")
    if options.tokens < max(options.lengths):
        parser.error(f"--tokens is {options.tokens}, expected at least one sequence of {max(options.lengths)}")
    if not options.budget > 0:
        parser.error(f"--budget is {options.budget}, expected seconds, more than 0")
    return options


def check(device: torch.device, echo: Any = print) -> dict[str, Any]:
    """Run all checks.

    Raises:
        RunnerError: some fail; it names them.
    """
    found = list(checks.compare(device))
    failed = [f"{one.name}: off by {one.error:.2g}, at most {one.bound:g} is right" for one in found if not one.passed]
    if failed:
        raise RunnerError("\n".join([*failed, f"{len(failed)} of {len(found)} checks failed: nothing was timed"]))
    echo(f"{len(found)} checks against the references passed")
    if (told := checks.run_suites()) is not None:
        raise RunnerError(f"{told}\nthe tests of the kernels failed on the device: nothing was timed")
    echo("the tests of the kernels passed on the device")
    return {"passed": len(found), "worst": max(one.error / one.bound for one in found)}


def run(options: argparse.Namespace, device: Any, checked: dict[str, Any]) -> None:
    """Measure the contests on a device, and write each as it ends."""
    found = ceilings(device)
    told = ", ".join(f"{value / 1e12:.0f} TFLOP/s in {name}" for name, value in found.flops.items())
    print(f"{device.describe()['name']}; ceilings: {told}, {found.bandwidth / 1e9:.0f} GB/s", flush=True)
    for name in options.contests or GPU_CONTESTS:
        record = GpuRecord(name, GPU_CONTESTS[name].title, options.dtype, found, checked, device.describe())
        measurement = Measurement(GPU_CONTESTS[name], record, device, options.budget)
        for width in options.widths:
            for length in sorted(options.lengths):
                measurement.passes(max(1, options.tokens // length), length, width)
            for batch in (1, 64) if name in DECODED else ():
                measurement.token(batch, min(8192, max(options.lengths)), width)
        record.save(options.folder)
        print("\n".join(lines(record)), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if not torch.cuda.is_available():
        raise SystemExit(NO_DEVICE)
    try:
        if not options.only_checks:
            names = options.contests or GPU_CONTESTS
            prepare(options.folder, (GpuRecord.name(name, options.dtype) for name in names))
        checked = check(torch.device("cuda"))
        if not options.only_checks:
            run(options, Cuda(), checked)
    except RunnerError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
