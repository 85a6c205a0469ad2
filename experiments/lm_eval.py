"""Scores a model on tasks of EleutherAI's lm-evaluation-harness (pip install 'seqarch[lm-eval]').

    seqarch lm-eval --model runs/text/mamba2-seed0-0123456789 --tasks lambada_openai arc_easy
    seqarch lm-eval --model mamba-130m --tasks my_task --include-path tasks --limit 100 --out mamba.json
    seqarch lm-eval --model mamba-130m --tasks niah_single_1 --max-seq-lengths 4096 16384

The model is any folder that LanguageModel.from_pretrained reads. What a run reaches is kept in its folder, a line of
lm_eval.jsonl for each call, and shown by seqarch report. Exit codes: 0 all tasks are scored, 1 they are not, and why.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.util.blocks import table
from experiments.util.errors import RunnerError
from experiments.util.files import make_folder, write_json
from experiments.util.output import exit_code
from experiments.util.program import program

if TYPE_CHECKING:
    from seqarch.models import LanguageModel

DTYPES = ("float64", "float32", "bfloat16", "float16")
LIMIT = "max_position_embeddings"


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        program("lm-eval"),
        description="Score a model on tasks of EleutherAI's lm-evaluation-harness.",
        allow_abbrev=False,
    )
    command.add_argument(
        "--model", type=Path, required=True, metavar="FOLDER", help="a model, a run, or its checkpoint"
    )
    command.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="tasks, groups, tags, or 'mmlu_*'")
    command.add_argument(
        "--include-path", nargs="+", type=Path, default=[], metavar="FOLDER", help="of tasks' yaml files"
    )
    command.add_argument("--limit", type=float, help="texts of each task, or, below 1, their share (default: all)")
    command.add_argument("--num-fewshot", type=int, help="examples before each question (default: the task's)")
    command.add_argument("--batch-size", type=int, default=8, help="texts that are read at a time, at most")
    command.add_argument("--device", help="such as cpu or cuda (default: torch's own)")
    command.add_argument("--dtype", choices=DTYPES, help="of the parameters (default: as they are stored)")
    command.add_argument(
        "--max-length", type=int, help=f"tokens that it reads at most (default: {LIMIT}, if it has that)"
    )
    command.add_argument(
        "--max-seq-lengths", nargs="+", type=int, help="in tokens, of tasks that make texts, as RULER's"
    )
    command.add_argument("--out", type=Path, help="a file for the results, too, such as results.json")
    return command


def check(arguments: argparse.Namespace) -> None:
    """Raise where an option is out of range, or the file for the results is there."""
    for name, least in (("num_fewshot", 0), ("batch_size", 1), ("max_length", 2)):
        if (value := getattr(arguments, name)) is not None and value < least:
            raise RunnerError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if arguments.limit is not None and not arguments.limit > 0:
        raise RunnerError(f"--limit must be above 0, got {arguments.limit:g}")
    if any(length < 1 for length in arguments.max_seq_lengths or []):
        raise RunnerError(f"--max-seq-lengths must be at least 1, got {min(arguments.max_seq_lengths)}")
    if arguments.out is not None and arguments.out.exists():
        raise RunnerError(f"{arguments.out} is there already; give another name for the results")


def score(arguments: argparse.Namespace) -> int:
    check(arguments)
    try:
        from experiments.harness.adapter import SeqarchLM
        from experiments.harness.evaluate import harness_version, scores, task_manager
    except ModuleNotFoundError as error:
        raise RunnerError(f"lm-eval needs {error.name}: pip install 'seqarch[lm-eval]'") from error
    from experiments.harness.tokenizer_folder import write_tokenizer

    names = [name for given in arguments.tasks for name in given.split(",") if name]
    model = read_model(arguments)
    lm = SeqarchLM(model, arguments.batch_size, arguments.max_length or limit_of(model))
    with tempfile.TemporaryDirectory(prefix="seqarch-lm-eval-") as folder:
        metadata: dict[str, Any] = {}
        if arguments.max_seq_lengths:
            write_tokenizer(model, Path(folder))
            metadata = {"max_seq_lengths": arguments.max_seq_lengths, "tokenizer": folder}
        manager, names = task_manager(names, arguments.include_path, metadata)
        limit = arguments.limit if arguments.limit is None or arguments.limit < 1 else int(arguments.limit)
        found = scores(lm, manager, names, limit, arguments.num_fewshot)
    line = {**described(arguments, model), "lm_eval": harness_version(), "tasks": found}
    keep(line, arguments.out, model)
    show(found)
    return 0


def read_model(arguments: argparse.Namespace) -> LanguageModel:
    import torch

    from seqarch import LanguageModel
    from seqarch.checkpoints.errors import CheckpointError

    try:
        dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
        return LanguageModel.from_pretrained(arguments.model, dtype, arguments.device)
    except CheckpointError as error:
        raise RunnerError(str(error)) from error
    except (RuntimeError, AssertionError) as error:  # an unknown device, or one that is not there
        first = str(error).partition("\n")[0]
        raise RunnerError(f"cannot load {arguments.model} to --device {arguments.device}: {first}") from error


def limit_of(model: LanguageModel) -> int | None:
    """The most tokens that a model of another library reads, by its settings; ``None`` where nothing says so."""
    settings = model.origin.settings if model.origin is not None else None
    limit = (settings or {}).get(LIMIT)
    return limit if type(limit) is int and limit > 0 else None


def described(arguments: argparse.Namespace, model: LanguageModel) -> dict[str, Any]:
    """What was scored, of which code, and how."""
    from experiments.util.environment import code_version
    from seqarch.layers.mixer import first_tensor

    tensor, code = first_tensor(model), code_version()[0]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": str(arguments.model),
        "checkpoint": model.origin.revision,
        "code": {name: code[name] for name in ("commit", "version", "dirty") if name in code},
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "device": str(tensor.device),
        "batch_size": arguments.batch_size,
        "limit": arguments.limit,
        "max_seq_lengths": arguments.max_seq_lengths,
    }


def keep(line: Mapping[str, Any], out: Path | None, model: LanguageModel) -> None:
    """Add the results to what a run's folder has of them, and write them to the file that was asked for."""
    from experiments.runs.folder import RunFolder

    if out is not None:
        make_folder(out.absolute().parent)
        write_json(out, dict(line))
        print(f"written to {out}")
    if model.origin.family == "run":
        folder = RunFolder(model.origin.folder)
        folder.append_lm_eval(line)
        print(f"added to {folder.lm_eval_file}")


def show(found: Mapping[str, Mapping[str, Any]]) -> None:
    rows = [
        [name, f"{task['texts']}", f"{task['shots']}", metric, f"{each['value']:.4f}", _stderr(each["stderr"])]
        for name, task in found.items()
        for metric, each in task["metrics"].items()
    ]
    print(table(["Task", "Texts", "Shots", "Metric", "Value", "Standard error"], rows))


def _stderr(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def main() -> int:
    arguments = parser().parse_args()
    return exit_code(lambda: score(arguments))


if __name__ == "__main__":
    sys.exit(main())
