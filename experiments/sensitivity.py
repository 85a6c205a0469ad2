"""Which of a model's layers can be converted at the least cost: each replaced alone by a student's, and scored.

    seqarch run experiment=conversion_outputs model=mamba2 train.start_from=TEACHER train.teacher=TEACHER
    seqarch sensitivity runs/conversion/outputs/mamba2-seed0-123456 --keep 2

The student is a finished run whose mixers learnt from a teacher's, layer by layer (``train.objective: mixer_outputs``).
Scores are of the validation split. Exit codes: 0 all is measured, 1 it is not, and why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.util.errors import RunnerError
from experiments.util.output import exit_code
from experiments.util.program import program


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        program("sensitivity"),
        description="Replace each layer of a student's teacher alone by the student's, and measure what that costs.",
        allow_abbrev=False,
    )
    command.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run that has a teacher")
    command.add_argument("--keep", type=int, default=0, help="how many layers to keep: says which (default: 0)")
    return command


def measure(arguments: argparse.Namespace) -> int:
    """Print what each layer's replacement costs, the dearest first; the exit code.

    Raises:
        RunnerError: the run is not finished, has no teacher, or one whose layers cannot be taken apart.
    """
    from experiments.config.build import build_task
    from experiments.config.schema import run_config
    from experiments.config.start import TEACHER
    from experiments.runs.recorded import read_run
    from experiments.training.engine import Engine
    from experiments.training.evaluate import evaluate_split
    from experiments.training.teacher import model_of
    from seqarch import LanguageModel, load
    from seqarch.checkpoints.errors import CheckpointError
    from seqarch.convert import most_costly, sensitivity

    run = read_run(arguments.run)
    if not run.finished:
        raise RunnerError(f"{run.path}: the run is {run.ending}, expected one that is finished")
    config = run_config({key: value for key, value in run.config.items() if key != "format"})
    if config.train.teacher is None:
        raise RunnerError(f"{run.path}: the run has no teacher (train.objective is {config.train.objective})")
    if config.train.objective == "logits":
        raise RunnerError(
            f"{run.path}: its norms and channel mixers were trained, too (train.objective is logits), so its layers do"
            " not fit into the teacher: expected a run of mixer_outputs or mixer_matrices"
        )
    if not 0 <= arguments.keep <= config.model.options.depth:
        raise RunnerError(f"--keep is {arguments.keep}, expected 0 to {config.model.options.depth}, the layers")
    engine, task = Engine(config.train), build_task(config)
    metric = task.metric

    def score(model: LanguageModel) -> float:
        return evaluate_split(model.to(engine.device), task, "validation", engine)[metric.name]

    teacher = model_of(TEACHER, config.train.teacher, config.train.teacher_sha256)
    try:
        costs = sensitivity(teacher, load(run.path, device="cpu"), score)
    except (CheckpointError, ValueError) as error:
        raise RunnerError(f"{run.path}: {error}") from error
    order = sorted(costs, key=lambda each: each.change, reverse=not metric.higher_is_better)
    print(f"{'layer':>5}  {'mixer':<24}  {metric.name:>12}  {'change':>10}")
    for each in order:
        print(f"{each.layer:>5}  {each.mixers:<24}  {each.score:>12.5g}  {each.change:>+10.3g}")
    if arguments.keep:
        kept = most_costly(costs, min(arguments.keep, len(costs)), metric.higher_is_better)
        print(f"to keep {len(kept)}: keep_layers={kept}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_code(lambda: measure(parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
