"""Compose configurations with Hydra and bring each one's run to its end.

    python -m experiments.run experiment=mqar model=attention seed=0
    python -m experiments.run --multirun experiment=mqar model=attention,mamba2,hybrid seed=0,1,2 launcher=joblib

Running the same command again does only what is missing. Exit codes: 0 every run is finished, 1 one is not,
130 stopped by a signal.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
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

from experiments.board import DONE, Board
from experiments.errors import RunnerError
from experiments.monitor import Monitor
from experiments.overrides import CONFIGS, as_override
from experiments.supervise import execute

INTERRUPTED = 130
WATCH_SECONDS = 1.0
_at_work = threading.Lock()
"""Held by this process while it is at a job."""

_monitors: list[tuple[Board, Monitor]] = []
"""The board and monitor of the sweep that this process started, once Hydra has composed where it lies."""


def job(composed: DictConfig) -> None:
    """One job of a sweep, in whatever process the launcher put it."""
    this = HydraConfig.get()
    number = 0 if OmegaConf.is_missing(this.job, "num") else this.job.num
    if not _monitors:
        # A worker: Ctrl-C in a terminal reaches it too, and would tear it down while it waits for its run to end.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _leave_when_abandoned(this.runtime.output_dir)
    plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    with _at_work:
        try:
            execute({str(key): value for key, value in plain.items()}, Board(this.runtime.output_dir), number)
        except RunnerError as error:  # The board itself cannot be written, so here is the only place to tell.
            print(f"error: {error}", file=sys.stderr, flush=True)


@functools.cache
def _leave_when_abandoned(path: str) -> None:
    """From here on this worker ends, after the job that it is at, when the process that started the sweep is gone.

    A launcher's worker does not notice: it would wait for more work, for minutes.
    """

    def watch() -> None:
        while not Board(path).is_abandoned():
            time.sleep(WATCH_SECONDS)
        with _at_work:
            os._exit(INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()


class SweepCallback(Callback):
    """Puts up the board and the monitor, in the process that starts the sweep."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        open_board(Path(config.hydra.run.dir), 1)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if config.hydra.launcher._target_.endswith("SlurmLauncher") and shutil.which("srun") is None:
            _refuse("launcher=submitit needs Slurm, and there is no srun here; launcher=joblib runs on this machine")
        sizes: dict[str, int] = {}
        for override in OverridesParser.create().parse_overrides(list(config.hydra.overrides.task)):
            if override.is_sweep_override() and not override.is_discrete_sweep():
                _refuse(f"{override.input_line}: a sweep needs choices; experiments.search searches intervals")
            # As in Hydra, the last one of a key counts.
            sizes[override.get_key_element()] = (
                len(list(override.sweep_iterator())) if override.is_sweep_override() else 1
            )
        total = math.prod(sizes.values())
        open_board(Path(config.hydra.sweep.dir), total)


def sweep_name() -> str:
    """Of a sweep that this process starts now, different from all others of this machine."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def open_board(path: Path, total: int) -> Board:
    """Put up the board of a sweep of so many runs, and show what happens on it until :func:`close_boards`."""
    board = Board(path)
    try:
        board.create()
    except RunnerError as error:
        _refuse(str(error))
    _monitors.append((board, Monitor(board, total)))
    return board


def _refuse(reason: str) -> NoReturn:
    """End before any job begins. Hydra would turn another exception of a callback into a warning and go on."""
    print(f"error: {reason}", file=sys.stderr)
    raise SystemExit(1)


def watch_signals() -> threading.Event:
    """From here on SIGINT and SIGTERM stop the sweep in order, and a second one ends this process at once."""
    stopped = threading.Event()
    first = [0.0]

    def stop(*received: object) -> None:
        # Ctrl-C often comes twice, from the terminal and passed on by whoever started this process.
        if not _monitors or (stopped.is_set() and time.monotonic() - first[0] > 1):
            os._exit(INTERRUPTED)
        if not stopped.is_set():
            first[0] = time.monotonic()
            stopped.set()
            os.write(2, b"stopping: what is in training writes a checkpoint first; once more to leave at once\n")
            for board, _ in _monitors:
                board.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return stopped


def main() -> int:
    os.environ["SEQARCH_COMMAND"] = shlex.join(["python", "-m", "experiments.run", *sys.argv[1:]])
    try:
        sys.argv[1:] = [as_override(argument) for argument in sys.argv[1:]]
    except RunnerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    os.environ["SEQARCH_SWEEP"] = sweep_name()
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
    for board, monitor in _monitors:
        if killed:
            _give_up(board)
        entries = monitor.close()
        board.remove()
        done = sum(entry["status"] in DONE for entry in entries)
        if killed and not stopped.is_set():
            print(
                f"error: a worker of the sweep was killed, perhaps because memory ran out: of {monitor.total} runs,"
                f" {monitor.total - len(entries)} were not started and {len(entries) - done} not finished."
                " The same command goes on with them",
                file=sys.stderr,
            )
        if done < monitor.total:
            code = code or 1
    return INTERRUPTED if stopped.is_set() else code


def close_boards() -> list[dict[str, Any]]:
    """Take down what :func:`open_board` put up; what every job posted last."""
    entries = []
    while _monitors:
        board, monitor = _monitors.pop()
        entries += monitor.close()
        board.remove()
    return entries


def _compose_and_run() -> None:
    """Hydra's own main, with errors told here: left to itself, it prints a traceback for a worker that was killed.

    Its own files, such as a sweep's ``multirun.yaml``, may be those that a full disk cannot take.
    """
    wanted = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")(job)()
    except (CompactHydraException, OmegaConfBaseException) as error:
        if wanted:
            raise
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error.__cause__, OmegaConfBaseException):
            print(error.__cause__, file=sys.stderr)
        raise SystemExit(1) from error
    except OSError as error:
        if wanted:
            raise
        where = error.filename or (_monitors[0][0].path if _monitors else "the folder of the sweep")
        print(f"error: cannot write {where}: {error.strerror or error}", file=sys.stderr)
        raise SystemExit(1) from error


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
