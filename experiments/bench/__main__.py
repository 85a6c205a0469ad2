"""Time the backends of this machine against what one would use without them: ``python -m experiments.bench``.

Each contest is run over lengths, its contestants in turn, and written to a folder as ``CONTEST.json``, ``.csv`` and
``.png``: medians with quartiles, the ratio to the first contestant, the share of the machine's own ceilings and the
peak of memory. ``targets`` prints the project's table of targets instead, with what this machine reaches.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from experiments.bench import plots, targets
from experiments.bench.contest import LENGTHS
from experiments.bench.contests import CONTESTS
from experiments.bench.measure import Ceilings, ceilings, prepare
from experiments.bench.record import Measurement, Record, table
from experiments.util.environment import hardware
from experiments.util.errors import RunnerError, choices_hint

QUICK = (512, 2048, 8192)
DTYPES = ("float32", "bfloat16")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--ops", nargs="+", metavar="CONTEST", help=f"of {', '.join(CONTESTS)}; default: all")
    parser.add_argument("--lengths", nargs="+", type=int, help=f"in tokens, multiples of 64; default: {LENGTHS}")
    parser.add_argument("--quick", action="store_true", help=f"lengths {QUICK}, half a second a contestant")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--budget", type=float, help="seconds a contestant, way and length; default: 3")
    parser.add_argument("--minutes", type=float, help="for everything; long lengths are left out as time runs short")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"))
    commands = parser.add_subparsers(dest="command", metavar="targets")
    commands.add_parser("targets", help="print the targets beside what is reached").add_argument(
        "--only", default="", help="the rows whose work has this in it, which are shown and not written"
    )
    options = parser.parse_args(arguments)
    for name in options.ops or ():
        if name not in CONTESTS:
            parser.error(f"unknown contest {name!r}: {choices_hint(name, CONTESTS)}")
    for length in options.lengths or ():
        if length < 64 or length % 64:
            parser.error(f"--lengths has {length}, expected multiples of 64")
    if options.budget is None:
        options.budget = 0.5 if options.quick else 3.0
    if not 0 < options.budget < math.inf:
        parser.error(f"--budget is {options.budget}, expected seconds, more than 0")
    if options.minutes is not None and not 0 < options.minutes < math.inf:
        parser.error(f"--minutes is {options.minutes}, expected a time, more than 0")
    options.lengths = options.lengths or (QUICK if options.quick else LENGTHS)
    return options


def describe(console: Console, found: Ceilings) -> None:
    machine = hardware(torch.device("cpu"))
    flops = ", ".join(f"{value / 1e9:.0f} GFLOP/s in {name}" for name, value in found.flops.items())
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, torch {torch.__version__}; "
        f"ceilings: {flops}, {found.bandwidth / 1e9:.1f} GB/s"
    )


def run(options: argparse.Namespace) -> None:
    console = Console(markup=False)  # An error of a library may have brackets in it.
    names = options.ops or list(CONTESTS)
    prepare(options.folder, (Record.name(name, options.dtype) for name in names))
    found = ceilings()
    end = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    for i, name in enumerate(names):
        contest, found = CONTESTS[name], found.best(ceilings())
        describe(console, found)
        record = Record(name, contest.title, options.dtype, options.budget, found)
        now = time.monotonic()
        Measurement(contest, record, deadline=now + (end - now) / (len(names) - i)).run(options.lengths)
        for way in contest.ways:
            console.print(table(record, way))
        report(console, record)
        record.save(options.folder)
        plots.draw(record, options.folder)
        console.print(f"written to {options.folder / record.file}.*")


def report(console: Console, record: Record) -> None:
    for name, reason in record.absent.items():
        console.print(f"{name} is absent: {reason}")
    for one in record.left_out:
        console.print(
            f"{one['contestant']}, {one['way']}, T = {one['length']} is left out: expected are about"
            f" {one['expected_s']:g} s" + (f" and {one['expected_peak_mb']:g} MB" if one["expected_peak_mb"] else "")
        )

    for one in record.failed:
        console.print(f"{one['contestant']}, {one['way']}, T = {one['length']} failed: {one['reason']}")
    if record.out_of_time:
        console.print(f"for T = {', '.join(map(str, record.out_of_time))} there was no time")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        if options.command == "targets":
            targets.run(Console(markup=False), options.only, options.folder, options.budget)
        else:
            run(options)
    except RunnerError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
