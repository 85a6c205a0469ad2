"""Time the backends of this machine against what one would use without them: ``seqarch bench``.

Each benchmark is run at several sizes, its implementations in turn, and written to a folder as ``BENCHMARK.json`` and
``.csv``, on a CPU with its plot too: medians with quartiles, the ratio to the first baseline, the share of the device's
own ceilings, measured in the same run, and the peak of memory. ``--device cuda`` measures this machine's GPU, and only
once the kernels have passed every check on it. ``targets`` prints the project's table of targets for a CPU instead,
with what this machine reaches, ``tokens`` one decoded token of each mixer beside reading its weights once,
``quantized`` one with weights of fewer bits, ``loading`` a model's folder beside reading its bytes, ``offload`` a
trained model of which some experts are in memory and the others on disk, and ``decode`` whole models beside what one
would pick instead.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.bench import checks, decode, loading, peers, quantized, targets, tokens
from experiments.bench.benchmarks import BENCHMARKS, names_on
from experiments.bench.devices import DEVICES, Ceilings, Device
from experiments.bench.measure import Measurement, plan
from experiments.bench.record import Record, file_name, lines, prepare_folder
from experiments.bench.sizes import SETUPS, Setup
from experiments.util.errors import RunnerError, choices_hint
from experiments.util.paths import INSTALLED
from experiments.util.program import program

QUICK = (512, 2048, 8192)
QUICK_BUDGET = 0.5
NO_DEVICE = "this bench times a CUDA device, and torch sees none: run it where there is one, with torch's CUDA build"
NO_TESTS = "this bench first runs the kernels' tests on a GPU, and only a checkout of seqarch has them: run it from one"


def _by_name(run: Callable[[str, Path, float], None]) -> Callable[[argparse.Namespace], None]:
    """A command that takes a part of the rows' names, a folder and seconds."""
    return lambda given: run(given.only, given.folder, given.budget)


def _offload(given: argparse.Namespace) -> None:
    from experiments.bench import offload  # a machine with a GPU may have no safetensors

    offload.run(given.model, given.folder)


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], None], str]] = {
    "loading": (_by_name(loading.run), "load folders of a gigabyte, beside reading their bytes"),
    "targets": (_by_name(targets.run), "print the targets beside what is reached"),
    "tokens": (_by_name(tokens.run), "one decoded token of each mixer, beside reading its weights once"),
    "quantized": (_by_name(quantized.run), "one decoded token with weights of 16, 8 and 4 bits, beside float32"),
    "offload": (_offload, "a model with few experts in memory and the others on disk"),
    "decode": (decode.run, "prompts and tokens of whole models, beside transformers, mambapy and llama.cpp"),
}
ONLY = {"default": "", "help": "the rows whose name has this in it, which are shown and not written"}
DECODE: dict[str, dict[str, Any]] = {
    "--only": {"default": "", "help": f"the models whose name has this in it, of {', '.join(peers.MODELS)}"},
    "--peers": {"nargs": "*", "choices": peers.PEERS, "default": peers.PEERS, "help": "beside seqarch; default: all"},
    "--rows": {"nargs": "+", "type": int, "choices": peers.ROWS, "default": peers.ROWS, "help": "decoded together"},
    "--contexts": {
        "nargs": "+",
        "type": int,
        "choices": peers.CONTEXTS,
        "default": peers.CONTEXTS,
        "help": "in tokens",
    },
    "--rounds": {"type": int, "default": peers.ROUNDS, "help": "of bursts that count"},
}
MODEL = {"required": True, "type": Path, "help": "a finished run's folder, of seqarch run experiment=experts"}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program("bench"), description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument(
        "--benchmarks", nargs="+", metavar="BENCHMARK", help=f"of {', '.join(BENCHMARKS)}; default: all"
    )
    parser.add_argument("--lengths", nargs="+", type=int, help="in tokens, multiples of 64; default: powers of 2")
    parser.add_argument("--widths", nargs="+", type=int, help="of heads, on a GPU; default: 64 128")
    parser.add_argument("--tokens", type=int, help="of all sequences of a call together, on a GPU; default: 131072")
    parser.add_argument("--quick", action="store_true", help=f"lengths {QUICK}, half a second per implementation")
    parser.add_argument("--dtype", help="; ".join(f"{kind}: {', '.join(one.dtypes)}" for kind, one in SETUPS.items()))
    parser.add_argument("--budget", type=float, help="seconds per implementation, mode and sizes; default: 3, GPU 0.2")
    parser.add_argument("--minutes", type=float, help="for everything; long lengths are left out as time runs short")
    parser.add_argument("--folder", type=Path, help=", ".join(f"{k}: {one.folder}" for k, one in SETUPS.items()))
    parser.add_argument("--only-checks", action="store_true", help="check the kernels on a GPU and time nothing")
    commands = parser.add_subparsers(dest="command", metavar="|".join(COMMANDS))
    for name, (_, what) in COMMANDS.items():
        command = commands.add_parser(name, help=what, allow_abbrev=False)
        for option, about in {"offload": {"--model": MODEL}, "decode": DECODE}.get(name, {"--only": ONLY}).items():
            command.add_argument(option, **about)
    options = parser.parse_args(arguments)
    setup = SETUPS[options.device]
    if problem := _for_the_other_device(options, setup):
        parser.error(problem)
    _fill_in(options, setup)
    if problem := _out_of_range(options, setup):
        parser.error(problem)
    return options


def _for_the_other_device(options: argparse.Namespace, setup: Setup) -> str | None:
    if setup.kind == "cuda":
        return f"{options.command} are those of a CPU: leave --device out" if options.command else None
    given = [name for name in ("widths", "tokens", "only_checks") if getattr(options, name)]
    return f"--{given[0].replace('_', '-')} is of --device cuda" if given else None


def _fill_in(options: argparse.Namespace, setup: Setup) -> None:
    """Set what was not given to the device's defaults."""
    quick = {"lengths": QUICK, "budget": min(QUICK_BUDGET, setup.budget)} if options.quick else {}
    defaults = {name: getattr(setup, name) for name in ("lengths", "widths", "tokens", "budget", "folder")} | quick
    for name, value in (defaults | {"benchmarks": names_on(setup.kind), "dtype": setup.dtypes[0]}).items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def _out_of_range(options: argparse.Namespace, setup: Setup) -> str | None:
    for name in options.benchmarks:
        if name not in names_on(setup.kind):
            return f"unknown benchmark {name!r}: {choices_hint(name, names_on(setup.kind))}"
    if options.dtype not in setup.dtypes:
        return f"argument --dtype: invalid choice: {options.dtype!r} (choose from {', '.join(setup.dtypes)})"
    for length in options.lengths:
        if length < 64 or length % 64:
            return f"--lengths has {length}, expected multiples of 64"
    if min(options.widths) < 1:
        return f"--widths is {options.widths}, expected numbers of at least 1"
    if options.tokens is not None and options.tokens < max(options.lengths):
        return f"--tokens is {options.tokens}, expected at least one sequence of {max(options.lengths)}"
    if not 0 < options.budget < math.inf:
        return f"--budget is {options.budget}, expected seconds, more than 0"
    if options.minutes is not None and not 0 < options.minutes < math.inf:
        return f"--minutes is {options.minutes}, expected a time, more than 0"
    return None


def describe(device: Device, found: Ceilings) -> str:
    flops = ", ".join(f"{value / 1e12:.3g} TFLOP/s in {name}" for name, value in found.flops.items())
    return f"{device.name}, torch {torch.__version__}; ceilings: {flops}, {found.bandwidth / 1e9:.3g} GB/s"


def run(options: argparse.Namespace, device: Device, checked: dict[str, Any]) -> None:
    """Measure the benchmarks on a device, and write each as it ends."""
    found, names = device.ceilings(), options.benchmarks
    end = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    for i, name in enumerate(names):
        benchmark, found = BENCHMARKS[name], found.best(device.ceilings())
        print(describe(device, found), flush=True)
        title = device.setup.describe(benchmark.title)
        record = Record(name, title, device.setup.kind, options.dtype, options.budget, found, checked)
        now = time.monotonic()
        measurement = Measurement(benchmark, record, device, deadline=now + (end - now) / (len(names) - i))
        measurement.run(plan(benchmark, device, options.dtype, options.lengths, options.widths, options.tokens))
        print("\n".join(lines(record)))
        record.save(options.folder, device)
        if device.setup.kind == "cpu":
            from experiments.bench import plots  # a machine with a GPU may have no Matplotlib

            plots.draw(record, options.folder)
        print(f"written to {options.folder / record.file}.*", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(NO_DEVICE)
    if options.device == "cuda" and INSTALLED:
        raise SystemExit(NO_TESTS)
    try:
        if options.command:
            COMMANDS[options.command][0](options)
            return
        if not options.only_checks:
            prepare_folder(options.folder, (file_name(n, options.device, options.dtype) for n in options.benchmarks))
        checked = checks.check(torch.device("cuda")) if options.device == "cuda" else {}
        if not options.only_checks:
            run(options, DEVICES[options.device](), checked)
    except RunnerError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
