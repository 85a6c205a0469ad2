"""Compose configurations with Hydra and bring each one's run to its end.

    python -m experiments.run experiment=mqar model=attention seed=0
    python -m experiments.run --multirun experiment=mqar model=attention,mamba2,hybrid seed=0,1,2 launcher=joblib

Running the same command again does only what is missing. Exit codes: 0 every run is finished, 1 one is not,
130 stopped by a signal.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config.overrides import hydra_arguments
from experiments.config.schema import folder_path
from experiments.sweeps import workers
from experiments.sweeps.execute import execute
from experiments.sweeps.monitor import Monitor
from experiments.sweeps.status import DONE, SWEEPS, Board, sweep_name
from experiments.sweeps.workers import INTERRUPTED
from experiments.util.errors import ConfigError, RunnerError
from experiments.util.output import complain, flush_output
from experiments.util.paths import CONFIGS

BOARD = "SEQARCH_BOARD"
"""The variable that names a sweep's board to its workers."""

_monitors: list[tuple[Board, Monitor]] = []
"""The board and monitor of the sweep that this process started, once Hydra has composed where it lies."""


def job(composed: DictConfig) -> None:
    """One job of a sweep, in whatever process the launcher put it.

    Raises:
        RunnerError: there is no board to post to, and so no sweep that this could be a job of.
    """
    this = HydraConfig.get()
    number = 0 if OmegaConf.is_missing(this.job, "num") else this.job.num
    board = _monitors[-1][0] if _monitors else _board_of_worker()
    plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    with workers.at_work:
        try:
            execute({str(key): value for key, value in plain.items()}, board, number)
        except RunnerError as error:  # The board itself cannot be written, so here is the only place to tell.
            complain(str(error))


def _board_of_worker() -> Board:
    """In a worker, which from here on ends with the process that started the sweep."""
    board = Board(os.environ.get(BOARD, ""))
    owner = board.owner()
    if owner is None:
        where = f"{board.path} is none" if BOARD in os.environ else f"the variable {BOARD} is not set"
        raise RunnerError(f"a job looks for the board of its sweep, and {where}: the sweep is over, or never began")
    workers.begin(owner)
    return board


class SweepCallback(Callback):
    """Puts up the board and the monitor, in the process that starts the sweep."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        _or_refuse(lambda: _start_run(config))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        _or_refuse(lambda: _start_sweep(config))


def _or_refuse(action: Callable[[], None]) -> None:
    """Hydra would turn what a callback raises into a warning, and go on."""
    try:
        action()
    except Exception as error:
        _refuse(_told(error))


def _start_run(config: DictConfig) -> None:
    folder_path("hydra.run.dir", config.hydra.run.dir)
    _start(config, 1)


def _start_sweep(config: DictConfig) -> None:
    launcher = config.hydra.launcher
    if launcher._target_.endswith("SlurmLauncher") and shutil.which("srun") is None:
        raise ConfigError("launcher=submitit needs Slurm, and there is no srun here; launcher=joblib runs here")
    if launcher.get("n_jobs") == 0:
        raise ConfigError("hydra.launcher.n_jobs is 0: expected how many runs at a time, or -1 for one a core")
    total = math.prod(_sizes(list(config.hydra.overrides.task)).values())
    _keep_from_writing_over(folder_path("hydra.sweep.dir", config.hydra.sweep.dir) / "multirun.yaml")
    for name in ("submitit_folder", "temp_folder"):
        if launcher.get(name) is not None:
            folder_path(f"hydra.launcher.{name}", launcher[name])
    _start(config, total)
    if launcher._target_.endswith("JoblibLauncher"):
        workers.watch_from_the_start()


def _sizes(arguments: list[str]) -> dict[str, int]:
    """How many choices each key has. As in Hydra, the last one of a key counts."""
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


def _keep_from_writing_over(file: Path) -> None:
    """Hydra writes a sweep's configuration without a look at what is there.

    Raises:
        ConfigError: what is there was not written for a sweep of this runner.
    """
    mark = f"experiments.run.{SweepCallback.__name__}"
    if os.path.lexists(file) and not (file.is_file() and mark in file.read_text(errors="replace")):
        raise ConfigError(f"{file} is not of a sweep, and Hydra would write over it; give another hydra.sweep.dir")


def _start(config: DictConfig, total: int) -> None:
    if config.hydra.job.chdir:
        raise ConfigError("hydra.job.chdir is true: runs=FOLDER places the runs, as seen from where the command began")
    if config.hydra.output_subdir is not None:
        raise ConfigError("hydra.output_subdir is set: a run has its configuration in its own config.json")
    os.environ[BOARD] = str(open_board(config.runs, total).path.absolute())


def open_board(runs: object, total: int) -> Board:
    """Put up the board of a sweep of so many runs, and show what happens on it until :func:`close_boards`.

    Args:
        runs: the folder of the runs, below which the board lies.

    Raises:
        ConfigError: it names no folder.
        StorageError: the board cannot be written.
    """
    board = Board(folder_path("runs", runs) / SWEEPS / sweep_name())
    board.create()
    _monitors.append((board, Monitor(board, total)))
    return board


def _refuse(reason: str) -> NoReturn:
    """End before any job begins."""
    complain(reason)
    raise SystemExit(1)


def watch_signals() -> threading.Event:
    """From here on SIGINT, SIGTERM and SIGHUP stop the sweep in order, and a second one ends this process at once."""
    stopped = threading.Event()
    first = [0.0]

    def stop(*received: object) -> None:
        # Ctrl-C often comes twice, from the terminal and passed on by whoever started this process.
        if not _monitors or (stopped.is_set() and time.monotonic() - first[0] > 1):
            os._exit(INTERRUPTED)
        if not stopped.is_set():
            first[0] = time.monotonic()
            stopped.set()
            for board, _ in _monitors:
                with contextlib.suppress(RunnerError):  # Its runs go on, and a second signal ends them, too.
                    board.stop()
            with contextlib.suppress(OSError):  # The terminal may be gone.
                os.write(2, b"stopping: what is in training writes a checkpoint first; once more to leave at once\n")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # As nohup asks for.
            signal.signal(number, stop)
    return stopped


def main() -> int:
    os.environ["SEQARCH_COMMAND"] = shlex.join(["python", "-m", "experiments.run", *sys.argv[1:]])
    os.environ.pop(BOARD, None)
    try:
        sys.argv[1:] = hydra_arguments(sys.argv[1:])
    except RunnerError as error:
        complain(str(error))
        return 1
    stopped = watch_signals()
    code, killed = 0, False
    try:
        _compose_and_run()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:  # From a worker that had not begun its job yet.
        code = INTERRUPTED
    except BrokenProcessPool:
        code, killed = 1, True
    wanted = sum(monitor.total for _, monitor in _monitors)
    if killed:
        for board, _ in _monitors:
            _give_up(board)
    entries, shown = close_boards()
    done = sum(entry["status"] in DONE for entry in entries)
    if killed and not stopped.is_set():
        complain(
            f"a worker of the sweep was killed, perhaps because memory ran out: of {wanted} runs,"
            f" {wanted - len(entries)} were not started and {len(entries) - done} not finished."
            " The same command goes on with them"
        )
    if done < wanted or not shown or not flush_output():
        code = code or 1
    return INTERRUPTED if stopped.is_set() else code


def close_boards() -> tuple[list[dict[str, Any]], bool]:
    """Take down what :func:`open_board` put up; what every job posted last, and whether all could be shown."""
    entries, shown = [], True
    while _monitors:
        board, monitor = _monitors[-1]
        entries += monitor.close()
        shown = shown and monitor.problem is None
        try:
            board.remove()
        except RunnerError as error:
            complain(str(error))
        _monitors.pop()
    return entries, shown


def _compose_and_run() -> None:
    """Hydra's own main, with errors told here in a line: left to itself, it prints tracebacks for many of them.

    Its own files, such as a sweep's ``multirun.yaml``, may be those that a full disk cannot take. Jobs tell of their
    own errors, so any other one is of Hydra or a launcher, about what they were given.
    """
    wanted = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")(job)()
    except BrokenProcessPool:
        raise
    except Exception as error:
        if wanted:
            raise
        _refuse(_told(error))


def _told(error: Exception) -> str:
    """An error of Hydra, a launcher or the system, for people."""
    if isinstance(error, OSError):
        where = error.filename or (_monitors[0][0].path if _monitors else "the standard output")
        return f"cannot write {where}: {error.strerror or error}"
    if isinstance(error, (RunnerError, CompactHydraException, OmegaConfBaseException)):
        cause = error.__cause__
        return f"{error}\n{cause}" if isinstance(cause, OmegaConfBaseException) else str(error)
    return f"{type(error).__name__}: {error} (HYDRA_FULL_ERROR=1 shows where)"


def _give_up(board: Board) -> None:
    """Runs whose worker is gone are in training no more: without its parent, a training process stops by itself."""
    for entry in board.entries():
        if entry["status"] == "running":
            with contextlib.suppress(RunnerError):  # A full disk: what was posted before stands.
                board.post(**{**entry, "status": "interrupted", "message": "its worker was killed"})


if __name__ == "__main__":
    # Under its own name, so that workers import the job instead of receiving a copy of this module.
    from experiments import run

    sys.exit(run.main())
