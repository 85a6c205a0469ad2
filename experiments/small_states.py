"""Measures what trained runs recall with their states in bfloat16, 8 and 4 bits, read token by token.

    seqarch run --multirun experiment=mqar model=gated_delta_net,mamba2 seed=0,1,2
    seqarch small-states runs/mqar/* --length 64 512 --folder runs/small-states

Each run is read in each format, rounded to the nearest, by chance and with error feedback. Writes records.jsonl, a line
a run, format and length, which are not measured again, and recall.png. Exit codes: 0 all is measured, 1 it is not, and
why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.util.errors import RunnerError, choices_hint
from experiments.util.files import make_folder
from experiments.util.output import exit_code
from experiments.util.program import program


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        program("small-states"),
        description="Measure what trained runs recall with their states in bfloat16, 8 and 4 bits.",
        allow_abbrev=False,
    )
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a finished run")
    command.add_argument("--length", nargs="+", type=int, default=[512], help="tokens of the sequences (default: 512)")
    command.add_argument("--sequences", type=int, default=32, help="of each run and length (default: 32)")
    command.add_argument("--format", nargs="+", metavar="FORMAT", help="such as 'int8, nearest' (default: all)")
    command.add_argument(
        "--folder", type=Path, default=Path("runs/small-states"), help="of the results (default: runs/small-states)"
    )
    return command


def small_states(arguments: argparse.Namespace) -> int:
    for name in ("length", "sequences"):
        given = getattr(arguments, name)
        for number in given if isinstance(given, list) else [given]:
            if number < 1:
                raise RunnerError(f"--{name} must be at least 1, got {number}")
    from experiments.runs.recorded import read_run
    from experiments.studies.small_states import FORMATS, measure
    from experiments.studies.small_states_page import draw

    formats = arguments.format or [*FORMATS]
    for name in formats:
        if name not in FORMATS:
            raise RunnerError(f"--format: {name!r} is none, {choices_hint(name, FORMATS)}")
    formats = ["float32", *(name for name in formats if name != "float32")]  # what all are compared with
    runs = [read_run(path) for path in arguments.runs]
    make_folder(arguments.folder)
    for line, new in measure(runs, arguments.length, arguments.sequences, formats, arguments.folder):
        if new:
            recall = sum(line.recall) / len(line.recall)
            print(
                f"{line.run}: {line.length:,} tokens, {line.format}: {line.bytes:,} bytes, recall {recall:.3f}",
                flush=True,
            )
    picture = draw(arguments.folder)
    print(f"Picture: {picture}" if picture else "No picture: it takes two runs of a mixer, as of two seeds")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_code(lambda: small_states(parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
