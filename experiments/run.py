"""Composes configurations with Hydra and trains the run of each one to its end.

    seqarch run experiment=mqar model=attention seed=0
    seqarch run --multirun experiment=mqar model=attention,mamba2,hybrid seed=0,1,2 launcher=joblib

With ``--open`` the report on it is written in the end, and its explorer opened in a browser. From a checkout, ``python
-m experiments.run`` is the same. Running the same command again does only what is missing.
Exit codes: 0 every run is finished, 1 one is not, 130 stopped by a signal.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import shutil
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import CompactHydraException, MissingConfigException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config.names import placed
from experiments.config.overrides import Composer, config_folder, hydra_arguments, load, to_plain
from experiments.config.schema import RunConfig, folder_path
from experiments.run_help import ASKED, run_help
from experiments.sweeps import workers
from experiments.sweeps.execute import execute
from experiments.sweeps.session import Outcome, SweepSession
from experiments.sweeps.status import SweepStatus
from experiments.util.errors import ConfigError, RunnerError
from experiments.util.interrupts import INTERRUPTED
from experiments.util.output import exit_code, flush_output, print_error
from experiments.util.paths import CONFIGS
from experiments.util.program import record_command

OPEN = "--open"
"""Asks for the report on what was trained, in a browser."""

SESSION = SweepSession()
"""The sweep that this process started: Hydra calls the callback and the jobs with nothing but a configuration."""


def job(composed: DictConfig) -> None:
    """One job of a sweep, in whatever process the launcher put it.

    Raises:
        RunnerError: there is no sweep that this could be a job of.
    """
    this = HydraConfig.get()
    number = 0 if OmegaConf.is_missing(this.job, "num") else this.job.num
    sweep = SESSION.status or workers.join_sweep()
    launched, plain = sweep.launched(number), to_plain(composed)
    with workers.at_work:
        try:
            execute(_placed(plain, launched["place"]), sweep, launched["job"], dry_run=_dry_run)
        except RunnerError as error:  # The status itself cannot be written, so only here can it be reported.
            print_error(str(error))


def _placed(plain: dict[str, Any], place: Mapping[str, Any] | None) -> dict[str, Any]:
    """A job's configuration with the place that the sweep found for its run."""
    if place is not None:
        return {**{key: value for key, value in plain.items() if key != "name"}, **place}
    task = plain.get("task")
    return placed(plain, task.get("name") if isinstance(task, dict) else None)


def _dry_run(config: RunConfig) -> object:
    from experiments.training.dry_run import plan  # Takes as long to import as everything else here.

    return plan(config)


class SweepCallback(Callback):
    """Opens the sweep, in the process that starts it."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        _or_refuse(lambda: _start_run(config))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        _or_refuse(lambda: _start_sweep(config))


def sweeper() -> type[Any]:
    """Hydra's sweeper over choices."""
    Plugins.instance()  # Which executes the modules of all plugins again: the class is that from then on.
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    return BasicSweeper


@contextlib.contextmanager
def _sweeping_over_the_missing() -> Iterator[None]:
    """Within it, Hydra's sweeper launches the runs that are not finished alone, and composes none that it does not
    launch. Afterwards the sweeper is as it was, for the next sweep of this process.
    """
    of_hydra = sweeper()
    all_jobs = of_hydra.split_arguments
    names = "split_arguments", "validate_batch_is_legal"
    replaced = {name: inspect.getattr_static(of_hydra, name) for name in names}

    def missing_jobs(overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        (jobs,) = all_jobs(overrides, None)
        swept = {each.key_or_group for each in overrides if each.is_sweep_override()}
        missing = SESSION.pass_over_finished(_composed(jobs, swept))
        chunks = of_hydra.split_overrides_to_chunks([jobs[job] for job in missing], max_batch_size)
        return [list(chunk) for chunk in chunks] if missing else []

    of_hydra.split_arguments = staticmethod(missing_jobs)
    of_hydra.validate_batch_is_legal = lambda *_: None  # All of them have been composed by then.
    try:
        yield
    finally:
        for name, original in replaced.items():
            setattr(of_hydra, name, original)


def _composed(jobs: Sequence[Sequence[str]], swept: Container[str] = ()) -> list[dict[str, Any] | None]:
    """The configuration of every job; ``None`` of one that has interpolations which only its own process can resolve.

    Raises:
        CompactHydraException, MissingConfigException: Hydra refuses the overrides of one.
        ConfigError: the name that one gives its experiment cannot be one.
    """
    folder = config_folder(sys.argv[1:])
    composer = Composer(load, (CONFIGS, *([folder] if folder else [])))
    found: list[dict[str, Any] | None] = []
    for overrides in jobs:
        try:
            found.append(composer(overrides, swept))
        except OmegaConfBaseException:
            found.append(None)
    return found


def _or_refuse(action: Callable[[], None]) -> None:
    """Hydra would turn what a callback raises into a warning, and continue."""
    try:
        action()
    except Exception as error:
        _refuse(format_error(error))


def _start_run(config: DictConfig) -> None:
    folder_path("hydra.run.dir", config.hydra.run.dir)
    _start(config, 1)
    if not SESSION.pass_over_finished(_composed([list(config.hydra.overrides.task)])):
        raise SystemExit(0)  # Before Hydra composes the job.


def _start_sweep(config: DictConfig) -> None:
    launcher = config.hydra.launcher
    if launcher._target_.endswith("SlurmLauncher") and shutil.which("srun") is None:
        raise ConfigError("launcher=submitit needs Slurm, and there is no srun here; launcher=joblib runs here")
    if launcher.get("n_jobs") == 0:
        raise ConfigError("hydra.launcher.n_jobs is 0: expected how many runs at a time, or -1 for one per core")
    total = math.prod(_sizes(list(config.hydra.overrides.task)).values())
    _refuse_to_overwrite(folder_path("hydra.sweep.dir", config.hydra.sweep.dir) / "multirun.yaml")
    for name in ("submitit_folder", "temp_folder"):
        if launcher.get(name) is not None:
            folder_path(f"hydra.launcher.{name}", launcher[name])
    _start(config, total)
    if launcher._target_.endswith("JoblibLauncher"):
        workers.watch_from_the_start()


def _sizes(arguments: list[str]) -> dict[str, int]:
    """The number of choices of each key. As in Hydra, the last one of a key counts."""
    sizes: dict[str, int] = {}
    for override in OverridesParser.create().parse_overrides(arguments):
        given = str(override.input_line).lstrip("+")
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise ConfigError(f"{given}: a sweep needs choices; experiments.search searches intervals")
        size = len(list(override.sweep_iterator())) if override.is_sweep_override() else 1
        if size == 0:
            raise ConfigError(f"{given}: expected one choice at least, and there is none")
        sizes[override.get_key_element()] = size
    return sizes


def _refuse_to_overwrite(file: Path) -> None:
    """Hydra writes a sweep's configuration whatever is there.

    Raises:
        ConfigError: the file was not written for a sweep of this runner.
    """
    mark = f"experiments.run.{SweepCallback.__name__}"
    if os.path.lexists(file) and not (file.is_file() and mark in file.read_text(errors="replace")):
        raise ConfigError(f"{file} is not of a sweep, and Hydra would write over it; give another hydra.sweep.dir")


def _start(config: DictConfig, total: int) -> None:
    if config.hydra.job.chdir:
        raise ConfigError("hydra.job.chdir is true: runs=FOLDER places the runs, as seen from where the command began")
    if config.hydra.output_subdir is not None:
        raise ConfigError("hydra.output_subdir is set: a run has its configuration in its own config.json")
    os.environ[workers.SWEEP] = str(SESSION.open(config.runs, total).path.absolute())


def _refuse(reason: str) -> NoReturn:
    """End before any job begins."""
    print_error(reason)
    raise SystemExit(1)


def main() -> int:
    if any(argument in ASKED for argument in sys.argv[1:]):
        return exit_code(lambda: print(run_help(sys.argv[1:])) or 0)
    opens = OPEN in sys.argv[1:]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != OPEN]
    record_command("run")
    os.environ.pop(workers.SWEEP, None)
    try:
        sys.argv[1:] = hydra_arguments(sys.argv[1:])
    except RunnerError as error:
        print_error(str(error))
        return 1
    SESSION.watch_signals()
    code, killed = 0, False
    try:
        _compose_and_run()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:  # From a worker that had not begun its job yet.
        code = INTERRUPTED
    except BrokenProcessPool:
        code, killed = 1, True
    if killed and SESSION.status is not None:
        _interrupt_running(SESSION.status)
    outcome = SESSION.close()
    if killed and not SESSION.stopped.is_set():
        print_error(_killed_text(outcome))
    if outcome.done < outcome.total or not outcome.shown or not flush_output():
        code = code or 1
    if opens and not SESSION.stopped.is_set():
        code = max(code, exit_code(lambda: _report_and_open(outcome)))
    return INTERRUPTED if SESSION.stopped.is_set() else code


def _report_and_open(outcome: Outcome) -> int:
    from experiments.report.opening import report_and_open  # Takes longer to import than everything else here.

    print(report_and_open(entry["folder"] for entry in outcome.entries if "folder" in entry))
    return 0


def _killed_text(outcome: Outcome) -> str:
    began = len(outcome.entries)
    return (
        f"a worker of the sweep was killed, perhaps because memory ran out: of {outcome.total} runs,"
        f" {outcome.total - began} were not started and {began - outcome.done} not finished."
        " The same command resumes them"
    )


def _compose_and_run() -> None:
    """Hydra's own main, with errors printed here in a line: left to itself, it prints tracebacks for many of them.

    Its own files, such as a sweep's ``multirun.yaml``, may be those that a full disk cannot take. Jobs report their own
    errors, so any other one is of Hydra or a launcher, about what they were given.
    """
    wanted = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with _sweeping_over_the_missing():
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")(job)()
    except BrokenProcessPool:
        raise
    except Exception as error:
        if wanted:
            raise
        _refuse(format_error(error))


def format_error(error: Exception) -> str:
    """An error of Hydra, a launcher or the system, for people."""
    if isinstance(error, OSError) and not isinstance(error, MissingConfigException):
        where = error.filename or (SESSION.status.path if SESSION.status else "the standard output")
        return f"cannot write {where}: {error.strerror or error}"
    if isinstance(error, (RunnerError, CompactHydraException, MissingConfigException, OmegaConfBaseException)):
        cause = error.__cause__
        return f"{error}\n{cause}" if isinstance(cause, OmegaConfBaseException) else str(error)
    return f"{type(error).__name__}: {error} (HYDRA_FULL_ERROR=1 shows where)"


def _interrupt_running(sweep: SweepStatus) -> None:
    """Runs whose worker is gone are in training no more: without its parent, a training process stops by itself."""
    for entry in sweep.entries():
        if entry["status"] == "running":
            with contextlib.suppress(RunnerError):  # A full disk: the entry stays as it is.
                sweep.update(**{**entry, "status": "interrupted", "message": "its worker was killed"})


if __name__ == "__main__":
    # Under its own name, so that workers import the job instead of receiving a copy of this module.
    from experiments import run

    sys.exit(run.main())
