"""Checks by widths whether a model's learning rate would be right for a wider one, with and without muP.

    seqarch coordinate-check mamba2 "3*gated_delta_net attention" --widths 64 128 256 512

Trains each pattern for some steps at each width, with the library's starts and one learning rate, and with
mup_base_width, and compares what layers give with what they gave at first. In a right parametrisation changes do not
grow with the width. Writes records.jsonl, a line a model, width, parametrisation and seed, which are not measured
again, and coordinates.png. Exit codes: 0 all is measured, 1 it is not, and why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.util.errors import RunnerError
from experiments.util.files import make_folder
from experiments.util.output import exit_code
from experiments.util.program import program


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        program("coordinate-check"),
        description="Compare how much layers' outputs change in training at several widths, with muP and without.",
        allow_abbrev=False,
    )
    command.add_argument("models", nargs="+", metavar="PATTERN", help="such as mamba2 or '3*gla attention'")
    command.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256, 512], help="(default: 64 128 256 512)")
    command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    command.add_argument("--steps", type=int, default=5, help="of AdamW on one batch (default: 5)")
    command.add_argument("--rate", type=float, default=0.003, help="the learning rate (default: 0.003)")
    command.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/coordinate-check"),
        help="of the results (default: runs/coordinate-check)",
    )
    return command


def coordinate_check(arguments: argparse.Namespace) -> int:
    if len(set(arguments.widths)) < 3:
        raise RunnerError(f"--widths: growth is seen from three widths on, got {arguments.widths}")
    for name, given in (("widths", min(arguments.widths)), ("steps", arguments.steps), ("rate", arguments.rate)):
        if not given > 0:
            raise RunnerError(f"--{name} must be positive, got {given}")
    from experiments.studies.coordinate_check import exponents, measure
    from experiments.studies.coordinate_check_page import draw

    make_folder(arguments.folder)
    lines = []
    for line, new in measure(
        arguments.models,
        sorted(set(arguments.widths)),
        arguments.seeds,
        arguments.steps,
        arguments.rate,
        arguments.folder,
    ):
        lines.append(line)
        if new:
            sizes = ", ".join(f"{name} {values[-1]:.3g}" for name, values in line.sizes.items())
            print(f"{line.model}: {line.kind}, width {line.width}, seed {line.seed}: {sizes}", flush=True)
    for (model, kind, name), exponent in exponents(lines).items():
        print(f"{model}: {kind}: changes of {name} grow as width^{exponent:.2f}")
    print(f"Picture: {draw(arguments.folder)}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_code(lambda: coordinate_check(parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
