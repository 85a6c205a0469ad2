"""The demo, ``make demo``: recall along the length and a needle map of small models, by two sweeps and a report.

Every model is trained until it has learnt the task or no longer improves. Runs the commands that a person could type,
and prints them. Finished runs are not done again.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from experiments.util.interrupts import INTERRUPTED
from experiments.util.paths import python_environment
from experiments.util.program import program

MODELS = "attention,hybrid,sliding_window,linear_attention,mamba2,gated_delta_net"
COMMANDS = (
    f"-m experiments.run --multirun experiment=demo_recall model={MODELS} seed=0,1,2 launcher=joblib",
    f"-m experiments.run --multirun experiment=demo_needle model={MODELS} seed=0,1 launcher=joblib",
    "-m experiments.report runs/demo",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the commands in order; the code of the first that was stopped, else the worst."""
    argparse.ArgumentParser(program("demo"), description=__doc__).parse_args(arguments)
    started, worst = time.monotonic(), 0
    for command in COMMANDS:
        _, module, *given = shlex.split(command)
        print(f"\n$ {program(module.removeprefix('experiments.'))} {' '.join(given)}", flush=True)
        code = run_to_the_end([sys.executable, *shlex.split(command)])
        if code == INTERRUPTED:
            print("stopped; the same command resumes with what is missing")
            return code
        worst = max(worst, code)
    print(f"The demo took {time.monotonic() - started:.0f} seconds.")
    return worst


def run_to_the_end(command: list[str]) -> int:
    """Like ``subprocess.call``, but a signal is passed on and waited for: the sweep ends its runs in order."""
    process = subprocess.Popen(command, env=python_environment())

    def pass_on(number: int, _: object) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
