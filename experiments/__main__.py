"""The command ``seqarch``: one name for all that the runner does. In a checkout ``python -m experiments`` is the same.

Each command is the module of its name, which is imported when it is called and has a ``main`` of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from experiments.util.errors import choices_hint
from experiments.util.paths import add_working_directory
from experiments.util.program import call_as

WRONG_USAGE = 2
OWN = ("experiments", "seqarch")
"""Packages that are there; what else cannot be imported is to be installed."""


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        module: below ``experiments``.
        summary: in the list of all commands.
        words: its options but ``--help``, and what it calls its parts, for a shell to complete.
    """

    module: str
    summary: str
    words: str = ""


COMMANDS = {
    "run": Command(
        "run",
        "train the run of a configuration, or a sweep of them, and resume what is missing",
        "--multirun --config-dir --cfg --open",
    ),
    "report": Command(
        "report.__main__",
        "tables and plots of recorded runs, in the terminal, as a page, and to be explored in a browser",
        "--explorer --open",
    ),
    "search": Command("search", "search the setting that is best on validation data, with Optuna", "--config-dir"),
    "runs": Command(
        "runs.__main__",
        "list, show, compare, clean and export recorded runs",
        "list show diff gc export --root --status --checkpoints --failed --delete",
    ),
    "replay": Command("replay", "repeat a bad step of a run, from the batch that it kept"),
    "corpora": Command(
        "corpora",
        "list, fetch and measure corpora of text",
        "list fetch show baselines path --cache --again --length --files --order --train-bytes --cut",
    ),
    "tokenizer": Command(
        "tokenizer",
        "train a tokenizer of byte pairs on text of your own",
        "--vocab-size --out --again --bytes --field --extensions --cut --held-out --unusable --data-cache",
    ),
    "lm-eval": Command(
        "lm_eval",
        "score a model on tasks of EleutherAI's lm-evaluation-harness",
        "--model --tasks --include-path --limit --num-fewshot --batch-size --device --dtype --max-length"
        " --max-seq-lengths --out",
    ),
    "bench": Command(
        "bench.__main__",
        "time this machine's kernels against what one would use without them",
        "targets tokens quantized loading offload decode --device --benchmarks --lengths --widths --tokens --quick"
        " --dtype --budget --minutes --folder --only-checks --only --model --peers --rows --contexts --rounds",
    ),
    "study": Command(
        "study",
        "answer a published question anew: train, select, draw and write its page",
        "--all --version --plan --draw --results --runs --config-dir --jobs",
    ),
    "small-states": Command(
        "small_states",
        "measure what trained runs recall with their states in bfloat16, 8 and 4 bits",
        "--length --sequences --format --folder",
    ),
    "sensitivity": Command(
        "sensitivity",
        "replace each layer of a run's teacher alone by the run's, and say which cost most",
        "--keep",
    ),
    "coordinate-check": Command(
        "coordinate_check",
        "check by widths whether a model's learning rate would be right for a wider one (muP)",
        "--widths --seeds --steps --rate --folder",
    ),
    "demo": Command("demo", "train six small models on recall and needles, and report on them"),
    "completion": Command("completion", "print the completion of this command for a shell", "bash zsh"),
}


def usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: seqarch COMMAND [ARGUMENT ...]",
            "",
            "Trains and compares sequence architectures on the same tasks and seeds.",
            "",
            *lines,
            "",
            "`seqarch COMMAND --help` describes one, `python -m seqarch` shows what runs on this machine.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("--help", "-h"):
        print(usage())
        return 0
    if name == "--version":
        print(f"seqarch {_version()}")
        return 0
    if name not in COMMANDS:
        print(f"seqarch: error: unknown command {name!r}, {choices_hint(name, COMMANDS)}", file=sys.stderr)
        return WRONG_USAGE
    add_working_directory()
    call_as(name, rest)
    try:
        command = import_module(f"experiments.{COMMANDS[name].module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in OWN:
            raise
        needed = f"seqarch {name} needs {error.name}, which is not installed"
        print(f"error: {needed}: pip install 'seqarch[experiments]'", file=sys.stderr)
        return 1
    return command.main() or 0


def _version() -> str:
    try:
        return version("seqarch")
    except PackageNotFoundError:
        return "of a checkout that is not installed"


if __name__ == "__main__":
    sys.exit(main())
